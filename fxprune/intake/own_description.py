"""Example inputs by what a model says about itself: its config, its ``pretrained_cfg``, or its first layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from . import huggingface
from .arrange import Inputs, arrangements
from .example_inputs import BATCH, failure, from_program, make, picture_hints, propose
from .forward import float_type, forward_of
from .pooling import SentenceEncoder
from .stated import StatesInputs


def derive_inputs(model: nn.Module | ExportedProgram, folder: Path | None = None) -> Inputs:
    """(args, kwargs) of batch 2 that the model takes, as far as it says what these are; ((), {}) where it does not.

    folder   the Hugging Face folder that it came from
    """
    if isinstance(model, ExportedProgram):
        return from_program(model)
    if isinstance(model, StatesInputs):
        return model.examples, {}
    if isinstance(model, SentenceEncoder):
        own = None if folder is None else folder / model.inside
        return (), huggingface.example_kwargs(model.transformer, own)
    if is_transformers(model):
        kwargs = in_type_of(model, huggingface.example_kwargs(model, folder))
        if kwargs:
            return (), kwargs
    cfg = timm_cfg(model)
    hints = picture_hints(model, cfg.get("input_size"))
    proposed = propose(model, hints if cfg else ())
    if proposed is not None:
        return proposed, {}
    if cfg:  # fake tensors may fail where real ones do not
        return (make((BATCH, *hints[0]), float_type(model)),), {}
    return _by_inner_model(model, folder) or ((), {})


def _by_inner_model(model: nn.Module, folder: Path | None) -> Inputs | None:
    """What the transformers model inside a wrapper, a classifier or a sentence encoder says, as the outer one takes it;
    tried in earnest."""
    inner = next((m for m in model.modules() if m is not model and is_transformers(m)), None)
    if inner is None:
        return None
    kwargs = in_type_of(model, huggingface.example_kwargs(inner, folder))
    for args, named in arrangements(kwargs, forward_of(model)) if kwargs else ():
        if failure(model, args, named) is None:
            return args, named
    return None


def in_type_of(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with floating ones in the type that the model computes in."""
    dtype = float_type(model)
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, dict(kwargs))


def is_transformers(model: Any) -> bool:
    """A transformers model, or a wrapper that shows all its attributes; told without importing transformers."""
    return isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "main_input_name")


def timm_cfg(model: Any) -> Mapping[str, Any]:
    """timm's description of a model: the size of its pictures, mean and deviation; {} for other models."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}
