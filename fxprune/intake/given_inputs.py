"""Example inputs that the user gave, in the first arrangement that the model takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import LoadError
from .arrange import Inputs, arrangements, as_tensors
from .example_inputs import CURE, failure, from_text, is_file, vocabulary
from .forward import Forward, float_type, forward_of
from .own_description import derive_inputs, is_transformers
from .tensors import read_tensors

INPUT_CURE = "give them: `--input 1x3x224x224` (or `--input 1x128:int64` for token ids), or `--data`"
_MASKED = "the result takes an attention_mask beside token ids: name the inputs (input_ids=..) to leave it out"


def read_inputs(
    model: nn.Module | ExportedProgram, given: Any, name: str, folder: Path | None = None
) -> tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]:
    """(args, kwargs, notes) of what was given: tensors or arrays, in containers or not, a file of them, or shapes.

    Raises LoadError with what the model says where it takes them in no arrangement.
    """
    forward, text = forward_of(model), given if isinstance(given, str) and not is_file(given) else None
    ways = _ways(model, given, text, forward, name)
    named = [n for part in (ways[0][1], *ways[0][0]) if isinstance(part, dict) for n in part]
    if is_transformers(model) and ways[0][0]:
        ways = _by_name(model, ways, forward, folder, text is not None)
    ways = [to_device(model, *way) for way in ways]
    if not isinstance(model, nn.Module):
        return *ways[0], ()
    said: str | None = None
    for args, kwargs in ways:
        why = failure(model, args, kwargs)
        if why is None:
            masked = text is not None and "attention_mask" in kwargs and "attention_mask" not in text
            return args, kwargs, (_MASKED,) if masked else ()
        said = said or why
    unknown = [n for n in named if n not in forward.names]
    if text is not None and unknown and not forward.any_name:
        why = f"the model takes {', '.join(forward.names)}"
        raise LoadError(f"the model has no input '{unknown[0]}'", where=f"--input {text}", why=why, cure=CURE)
    raise _not_accepted(model, *ways[0], name, folder, said or "")


def _ways(
    model: nn.Module | ExportedProgram, given: Any, text: str | None, forward: Forward, name: str
) -> list[Inputs]:
    """What was given, in all arrangements, the likeliest first. text: where it is shapes"""
    if text is not None:
        args, kwargs = from_text(text, forward, vocabulary(model), float_type(model))
        return [(args, kwargs)] if args else arrangements(kwargs, forward)
    if isinstance(given, str | os.PathLike):
        return arrangements(_of_file(Path(given), forward), forward)
    return arrangements(as_tensors(given, float_type(model), name), forward)


def _of_file(path: Path, forward: Forward) -> Any:
    """The tensors of a file that are inputs: by name where the names are the model's, else a single one."""
    tensors = read_tensors(path)
    known = {name: tensor for name, tensor in tensors.items() if name in forward.names}
    if known and not forward.any_name:
        return known  # labels may lie beside them
    if len(tensors) == 1 or forward.any_name or len(forward.required) == 1:
        return tensors
    raise LoadError(
        "the tensors do not say which input they are",
        where=str(path),
        why=f"it holds {', '.join(tensors)}; the model takes {', '.join(forward.names) or 'unnamed inputs'}",
        cure="name the arrays after the model's inputs, or keep a single one",
    )


def _by_name(
    model: nn.Module | ExportedProgram, ways: Sequence[Inputs], forward: Forward, folder: Path | None, of_shapes: bool
) -> list[Inputs]:
    """A transformers model takes its inputs by name: those given by position get the names of what it reads first.

    Tensors that it takes by position stay so: what was given is what the result takes. A shape alone (``of_shapes``)
    gives no inputs: ids of that shape get the mask that their tokenizer makes.
    """
    args, kwargs = ways[0]
    main = getattr(model, "main_input_name", None) or next(iter(forward.names), "input_ids")
    own = derive_inputs(model, folder)[1]
    named = {**dict(zip(dict.fromkeys([main, *own, *forward.names]), args, strict=False)), **kwargs}
    if not of_shapes:
        return [*ways, ((), named)]
    ids, masked = named.get("input_ids"), dict(named)
    if isinstance(ids, Tensor) and "attention_mask" in forward.names:
        masked.setdefault("attention_mask", torch.ones_like(ids))
    return [((), masked), ((), named)]


def _not_accepted(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, folder: Path | None, said: str
) -> LoadError:
    given, own = (
        ", ".join(f"{list(t.shape)} {t.dtype}" for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
        for inputs in ((args, dict(kwargs)), derive_inputs(model, folder))
    )
    known = bool(own) and own != given
    return LoadError(
        "the model does not accept these inputs",
        where=f"{name}: {given}",
        why=f"it takes {own}; on these it says: {said}" if known else f"it says: {said}",
        cure="leave `--input` away, or give the shapes the model was built for" if known else INPUT_CURE,
    )


def to_device(model: nn.Module | ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """The inputs where the model's weights lie."""
    if isinstance(model, ExportedProgram):
        return tuple(args), dict(kwargs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    positional, named = pytree.tree_map_only(Tensor, lambda t: t.to(device), (tuple(args), dict(kwargs)))
    return positional, named
