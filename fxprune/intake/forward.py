"""What a model's ``forward`` takes, also where a wrapper hides it behind ``*args, **kwargs``; and inputs by name."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_INNER = ("base_model", "module", "model")  # where peft, accelerate and everybody else keep what they wrap


@dataclass(frozen=True)
class Forward:
    """What a ``forward`` takes.

    names     of its inputs, in order
    required  those of them without a default
    any_name  whether it takes others by name as well
    """

    names: tuple[str, ...]
    required: tuple[str, ...] = ()
    any_name: bool = False

    def takes(self, given: Mapping[Any, Any]) -> bool:
        """Whether these are inputs by name: all that it needs, and none that it does not know."""
        return set(self.required) <= set(given) and (self.any_name or set(given) <= set(self.names))


def forward_of(model: nn.Module | ExportedProgram) -> Forward:
    """What ``model`` takes. A wrapper that passes everything on takes what the module in it takes."""
    if isinstance(model, ExportedProgram):
        names = tuple(n for n in model.graph_signature.user_inputs if isinstance(n, str))
        return Forward(names, names)
    own = _find_stated(model)
    if own.names:
        return own
    inner = _find_inner(model)
    return own if inner is None else Forward(forward_of(inner).names, (), own.any_name)


def parameter_names(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """Names of the model's inputs in order; () for a ``forward(*args)`` that wraps nothing."""
    return forward_of(model).names


def _find_stated(model: nn.Module) -> Forward:
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind in _NAMED]
    return Forward(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is inspect.Parameter.empty),
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
    )


def _find_inner(model: nn.Module) -> nn.Module | None:
    """The module that a wrapper passes its inputs on to: under a usual name, or its only child."""
    children = dict(model.named_children())
    usual = [children[name] for name in _INNER if name in children]
    return usual[0] if usual else next(iter(children.values())) if len(children) == 1 else None


def leaf_names(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each leaf of the inputs: the input's own, or within a container the key under which it lies, dotted
    where two leaves would have the same.

    >>> leaf_names(["features"], [{"ids": 1, "mask": 2}], {}), leaf_names(["a", "b"], [{"x": 1}, {"x": 2}], {"c": 3})
    (('ids', 'mask'), ('a.x', 'b.x', 'c'))
    """
    words = [*names[: len(args)], *(f"input_{i}" for i in range(len(names), len(args))), *kwargs]
    found: list[tuple[str, str]] = []
    for word, value in zip(words, (*args, *kwargs.values()), strict=True):
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            steps = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
            found.append((next((s for s in reversed(steps) if not s.isdigit()), word), ".".join([word, *steps])))
    counts = Counter(short for short, _ in found)
    return tuple(short if counts[short] == 1 else whole for short, whole in found)


def float_type(model: nn.Module | ExportedProgram) -> torch.dtype:
    """The type of the model's first floating parameter: what its floating inputs are in."""
    values = model.state_dict.values() if isinstance(model, ExportedProgram) else model.parameters()
    return next((t.dtype for t in values if t.dtype.is_floating_point), torch.float32)
