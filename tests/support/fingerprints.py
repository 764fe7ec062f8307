"""What a module, its containers and its tensors are, bit by bit, to be compared before and after a call."""

from __future__ import annotations

import enum
import io
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = ("builtins", "torch", "functools", "_thread")


def fingerprint(*roots: Any) -> list[tuple[str, Any]]:
    """(path, what lies there) of everything that is reached through attributes and containers.

    The same object is told by its identity, so a container that was replaced by an equal one differs.
    """
    found: list[tuple[str, Any]] = [("random numbers", bytes(torch.get_rng_state().tolist()))]
    for i, root in enumerate(roots):
        _describe(root, str(i), found, set())
    return found


def _describe(value: Any, path: str, found: list[tuple[str, Any]], seen: set[int]) -> None:
    if isinstance(value, Tensor):
        bits = io.BytesIO()
        torch.save(value.detach(), bits)
        found.append((path, (id(value), type(value), value.requires_grad, value.grad is None, value._version)))
        found.append((f"{path} bits", bits.getvalue()))
        return
    if isinstance(value, str | int | float | bool | type(None) | type | enum.Enum):
        found.append((path, value))
        return
    found.append((path, (id(value), type(value))))
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, item in value.items():
            _describe(item, f"{path}[{key!r}]", found, seen)
    elif isinstance(value, list | tuple | set):
        for i, item in enumerate(value):
            _describe(item, f"{path}[{i}]", found, seen)
    elif isinstance(value, nn.Module) or type(value).__module__ not in _LIBRARIES:
        if hasattr(value, "__dict__"):
            _describe(vars(value), path, found, seen)
        for name in getattr(type(value), "__slots__", ()):
            _describe(getattr(value, name, None), f"{path}.{name}", found, seen)
