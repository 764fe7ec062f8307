"""Example inputs that were given, as the model takes them: by position, by name, or as one container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .forward import Forward
from .tensors import from_array

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def arrangements(given: Any, forward: Forward) -> list[Inputs]:
    """(args, kwargs) that ``given`` may mean to a model that takes ``forward``, the likeliest first.

    A mapping holds inputs by name, or is the one input itself (modules of sentence-transformers take such a dict); a
    sequence holds them by position, or is the one input, or is (args, kwargs).
    """
    if isinstance(given, Mapping):
        return _of_mapping(dict(given), forward)
    if not isinstance(given, tuple | list):
        return [((given,), {})]
    found: list[Inputs] = [(tuple(given), {})]
    if len(given) == 2 and isinstance(given[0], tuple | list) and isinstance(given[1], Mapping):
        found.append((tuple(given[0]), dict(given[1])))
    if _takes_one(forward):
        found.append(((given,), {}))
    return found


def _of_mapping(given: dict[str, Any], forward: Forward) -> list[Inputs]:
    by_name: Inputs = ((), given)
    one: list[Inputs] = [((given,), {})] if _takes_one(forward) else []
    if len(given) == 1 and not set(given) & set(forward.names):
        one.append(((next(iter(given.values())),), {}))
    return [by_name, *one] if forward.takes(given) or set(given) & set(forward.names) else [*one, by_name]


def _takes_one(forward: Forward) -> bool:
    """Whether a single input is enough."""
    return len(forward.required) == 1 or (not forward.required and (bool(forward.names) or forward.any_name))


def as_tensors(given: Any, floats: torch.dtype, where: str) -> Any:
    """``given`` in plain containers, with arrays as tensors, floating ones in the type ``floats``: an array's own says
    little (numpy makes float64 of everything). Tensors stay as they are. Raises LoadError for arrays of texts or
    objects."""
    if isinstance(given, np.ndarray):
        tensor = from_array(given, where)
        return tensor.to(floats) if tensor.is_floating_point() else tensor
    if isinstance(given, np.generic):
        return given.item()
    if isinstance(given, Mapping):
        return {key: as_tensors(value, floats, where) for key, value in given.items()}
    if type(given) in (tuple, list):
        return type(given)(as_tensors(value, floats, where) for value in given)
    return given
