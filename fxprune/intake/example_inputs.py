"""Inputs to capture a model with: as the user wrote them, as the model describes itself, or by its first layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import LoadError
from ..ir.provenance import first_line
from ..process.silence import quiet
from .evaluation import evaluation_form, own_inputs, run
from .forward import Forward, float_type, forward_of
from .stated import StatesInputs
from .tensors import SUFFIXES

BATCH = 2  # torch.export takes a batch of 1 for a constant
LENGTH = 32  # tokens of an example text, or fewer where the model allows fewer

_DTYPES = {
    "float32": torch.float32, "float": torch.float32, "float16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16, "float64": torch.float64, "double": torch.float64, "int64": torch.int64,
    "long": torch.int64, "int32": torch.int32, "int": torch.int32, "uint8": torch.uint8, "int8": torch.int8,
    "bool": torch.bool,
}  # fmt: skip
_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>[a-z]+\d*))?")
_LARGEST = 2**31  # elements of one example input
CURE = "write `--input 1x3x224x224`, or `--input 1x128:int64` for token ids; several inputs are separated by commas"


def from_text(
    text: str, forward: Forward, ids_below: int = 2, floats: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Example inputs from ``"1x3x224x224"``, ``"2x128:int64"``, ``"input_ids=2x16:int64,attention_mask=2x16:int64"``.

    Floats are normal random numbers, integers lie below ``ids_below``, names that end in ``mask`` and booleans are
    ones. Without a type they are ``floats``, what the model computes in. Unnamed ones take the positions of
    ``forward``; whether the model has those that are named is for whoever tries them to say.
    Raises LoadError if the text is not understood.
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    parts = [part.strip() for part in text.split(",")]
    for index, part in enumerate(parts):
        match = _SPEC.fullmatch(part)
        if match is None:
            raise LoadError("the input shape is not understood", where=f"--input {text}", why=f"'{part}'", cure=CURE)
        dtype = _DTYPES.get(match["dtype"]) if match["dtype"] else floats
        if dtype is None:
            why = f"no type is called '{match['dtype']}'"
            raise LoadError("the input type is unknown", where=f"--input {text}", why=why, cure=", ".join(_DTYPES))
        shape = [int(length) for length in match["shape"].split("x")]
        size = 1
        for length in shape:
            size *= length
        if not 0 < size <= _LARGEST:
            why = f"{part} has {size} elements"
            raise LoadError("the input size makes no sense", where=f"--input {text}", why=why, cure=CURE)
        name = match["name"] or (forward.names[index] if index < len(forward.names) else "")
        tensor = make(shape, dtype, ids_below, ones=name.endswith("mask"))
        if match["name"] or kwargs:
            if not name or name in kwargs:
                raise LoadError("the inputs cannot be told apart", where=f"--input {text}", cure="name each of them")
            kwargs[name] = tensor
        else:
            args.append(tensor)
    return tuple(args), kwargs


def make(shape: Sequence[int], dtype: torch.dtype, ids_below: int = 2, *, ones: bool = False, seed: int = 0) -> Tensor:
    """A seeded tensor: normal numbers, ids in [0, ids_below), or ones."""
    generator = torch.Generator().manual_seed(seed)
    if ones or dtype is torch.bool:
        return torch.ones(*shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(0, max(1, min(ids_below, torch.iinfo(dtype).max)), tuple(shape), generator=generator).to(dtype)


def is_file(text: str) -> bool:
    """True if ``--input`` names a file of tensors rather than shapes."""
    return Path(text).suffix.lower() in SUFFIXES


def vocabulary(model: nn.Module | ExportedProgram) -> int:
    """Rows of the first embedding table that the model has, or 2: ids below it are always valid for that table."""
    if isinstance(model, StatesInputs):
        return model.vocabulary
    if isinstance(model, nn.Module):
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        return tables[0].num_embeddings if tables else 2
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.embedding.default:
            value = node.args[0].meta.get("val")
            if isinstance(value, Tensor):
                return int(value.shape[0])
    return 2


def from_program(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs an exported program carries, or new ones of the shapes its placeholders were traced with."""
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs)
    user = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    made = []
    for value in values:
        if not isinstance(value, Tensor):
            raise LoadError(
                "the exported program carries no example inputs",
                why="one of its inputs is no tensor",
                cure="give them with `--input`",
            )
        shape = [_hint(length) for length in value.shape]
        made.append(make(shape, value.dtype, vocabulary(program)))
    filled = torch.utils._pytree.tree_unflatten(made, program.call_spec.in_spec)
    return tuple(filled[0]), dict(filled[1])


def _hint(length: Any) -> int:
    if isinstance(length, int):
        return length
    known = getattr(length.node, "hint", None)
    return int(known) if known is not None else BATCH


def propose(model: nn.Module, hints: Sequence[tuple[int, int, int]] = ()) -> tuple[Tensor, ...] | None:
    """One example input that the model accepts, guessed from its first layers and tried out on fake tensors.

    hints: picture sizes (channels, height, width) to try first. None if the model takes several inputs or accepts none.
    """
    if len(forward_of(model).required) > 1:
        return None
    for tensor in _candidates(model, hints):
        if accepts(model, (tensor,), {}):
            return (tensor,)
    return None


def _candidates(model: nn.Module, hints: Sequence[tuple[int, int, int]]) -> Iterator[Tensor]:
    dtype = float_type(model)
    for hint in hints:
        yield make((BATCH, *hint), dtype)
    first: list[Callable[[], Iterable[Tensor]]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels
            sides = dict.fromkeys([*_own_sizes(model), (224, 224), (32, 32), (28, 28), (64, 64), (16, 16), (8, 8)])
            first.append(lambda c=channels, s=sides: [make((BATCH, c, *side), dtype) for side in s])  # type: ignore[misc]
        elif isinstance(module, nn.Conv1d):
            channels = module.in_channels
            first.append(lambda c=channels: [make((BATCH, c, n), dtype) for n in (128, 1024, 16000, 16)])  # type: ignore[misc]
        elif isinstance(module, nn.Embedding):
            rows = module.num_embeddings
            first.append(lambda r=rows: [make((BATCH, n), torch.int64, r) for n in (16, 8, 4)])  # type: ignore[misc]
        elif isinstance(module, nn.Linear):
            width = module.in_features
            first.append(lambda w=width: [make((BATCH, w), dtype), make((BATCH, 8, w), dtype)])  # type: ignore[misc]
        elif isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            first.append(lambda w=width: [make((BATCH, 8, w), dtype)])  # type: ignore[misc]
        if len(first) == 3:
            break
    for proposals in first:
        yield from proposals()


def _own_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Picture sides in pixels that the model's modules remember under the usual names."""
    sizes: list[tuple[int, int]] = []
    for module in model.modules():
        for name in ("img_size", "image_size", "input_size", "input_resolution"):
            size = vars(module).get(name)
            pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
            if len(pair) == 2 and all(isinstance(side, int) and 0 < side <= 4096 for side in pair):
                sizes.append((pair[0], pair[1]))
    return list(dict.fromkeys(sizes))


def picture_hints(model: nn.Module, stated: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """Picture sizes to try: what the model's modules remember, then what its description states.

    A description (``pretrained_cfg``) is that of the pretrained weights; the model may have been built for another
    size or number of channels.
    """
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = next((m.in_channels for m in convs if m.in_channels <= 16), None)
    hints: list[tuple[int, int, int]] = []
    sides = _own_sizes(model)[:1]
    if stated is not None and len(stated) == 3:
        sides.append((int(stated[1]), int(stated[2])))
        channels = channels or int(stated[0])
        hints.append((int(stated[0]), int(stated[1]), int(stated[2])))
    return list(dict.fromkeys([(channels or 3, *side) for side in sides] + hints))


def accepts(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if the model computes something from these inputs. Nothing is computed: the tensors are fake."""
    from torch._functorch import config
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    positional, keyword = own_inputs(args, kwargs)
    # an extension that asks a fake tensor for its memory gets an error, and not the address 0
    with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False), evaluation_form(model), quiet():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake, named = pytree.tree_map_only(Tensor, mode.from_tensor, (positional, keyword))
                model(*fake, **named)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # it got as far as its own decisions; capture will say more
        except Exception:
            return False
    return True


def failure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What the model says when it is run on these inputs in earnest; None where it runs."""
    try:
        with quiet():
            run(model, args, kwargs)
    except Exception as error:
        return first_line(error) or type(error).__name__
    return None
