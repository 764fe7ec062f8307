"""Batches out of whatever a loader or an iterable yields: tensors, arrays, mappings, tuples with or without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FxpruneError, LoadError
from ..intake.arrange import as_tensors
from ..intake.forward import float_type
from ..intake.load import Loaded
from ..intake.rehearsal import first_line
from .batch import Batch
from .fit import finish, match

LABEL_NAMES = ("labels", "label", "y", "targets", "target")
_MOST_BATCHES = 100_000  # of an iterable that never ends


def batches_of(
    source: Iterable[Any], loaded: Loaded, origin: str, samples: int, seed: int, skip: int = 0
) -> list[Batch]:
    """The first ``samples`` samples that ``source`` yields behind ``skip``, as ``loaded`` takes its inputs.

    A loader that shuffles gives the same batches every time. Raises LoadError for a batch that does not fit, or that is
    of another kind.
    """
    batches: list[Batch] = []
    left = samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, item in enumerate(_guard(source, origin)):
            where = f"{origin}, batch {number}"
            made = item if isinstance(item, Batch) else batch_of(item, loaded, where)
            if not any(isinstance(t, Tensor) and t.dim() for t in made.leaves):
                raise LoadError("a batch holds no tensor", where=where, cure="give batches of tensors [batch, ...]")
            over = min(skip, made.size)
            skip -= over
            if over == made.size:
                continue
            made = first_samples(made.pick(torch.arange(over, made.size)) if over else made, left)
            if made.size:
                batches.append(made)
                left -= made.size
            if left <= 0 or number >= _MOST_BATCHES:
                break
    return batches


def _guard(source: Iterable[Any], origin: str) -> Iterator[Any]:
    """The items of a user's iterable; its own exceptions come back as LoadError with the cause attached."""
    try:
        yield from source
    except FxpruneError:
        raise
    except Exception as failure:
        raise LoadError("the data could not be iterated", where=origin, why=first_line(failure)) from failure


def batch_of(item: Any, loaded: Loaded, where: str) -> Batch:
    """A batch in the model's form from a tensor or array, a mapping, or a tuple of inputs with or without labels.

    What lies in containers is known by its keys, as the inputs of ``loaded`` are; what has no key by its place.
    """
    item = as_tensors(item, float_type(loaded.model), where)
    if isinstance(item, tuple | list) and len(item) == 1:
        item = item[0]
    if isinstance(item, Tensor):
        return Batch(*finish(match({"x": item}, loaded, where), None, loaded, where))
    if not isinstance(item, Mapping | tuple | list):
        raise LoadError(
            "a batch is of a kind that is not understood",
            where=where,
            why=f"it is a {type(item).__name__}",
            cure="give tensors, (inputs, labels), dicts of tensors, or fxprune.data.batch.Batch",
        )
    named, unnamed, labels = _sort_leaves(item, loaded, where)
    free = [name for name in loaded.input_names or ("x",) if name not in named]
    if unnamed and not named and len(unnamed) not in (len(free), len(free) + 1):
        why = f"{len(unnamed)} tensors; the model takes {len(free)} ({', '.join(free)})"
        raise LoadError("a batch has another number of inputs than the model", where=where, why=why)
    if named:  # (features, labels), as loaders yield them
        labels = unnamed[0] if unnamed and labels is None else labels
    else:
        named = dict(zip(free, unnamed, strict=False))
        labels = unnamed[len(free)] if len(unnamed) > len(free) else None
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LoadError(
            "a batch holds no tensor",
            where=where,
            why=f"it holds {', '.join(sorted({type(v).__name__ for v in pytree.tree_leaves(item)})) or 'nothing'}",
            cure="give batches of tensors [batch, ...]: torch.utils.data.DataLoader makes them of samples",
        )
    return Batch(*finish(match(tensors, loaded, where), labels if isinstance(labels, Tensor) else None, loaded, where))


def _sort_leaves(item: Any, loaded: Loaded, where: str) -> tuple[dict[str, Any], list[Any], Any]:
    """(leaves with a key, leaves without one in order, labels) of a batch in containers."""
    named: dict[str, Any] = {}
    unnamed: list[Any] = []
    for path, leaf in pytree.tree_flatten_with_path(item)[0]:
        keys = [str(step.key) for step in path if isinstance(step, pytree.MappingKey)]
        if not isinstance(leaf, Tensor | int):
            if not keys and leaf is not None:
                raise LoadError(
                    "a batch is of a kind that is not understood",
                    where=where,
                    why=f"it holds a {type(leaf).__name__}",
                    cure="give tensors, (inputs, labels), dicts of tensors, or fxprune.data.batch.Batch",
                )
        elif keys:
            named[".".join(keys) if keys[-1] in named else keys[-1]] = leaf
        else:
            unnamed.append(leaf)
    name = next((n for n in LABEL_NAMES if n in named and n not in loaded.input_names), None)
    return named, unnamed, named.pop(name) if name else None


def first_samples(batch: Batch, count: int) -> Batch:
    """At most ``count`` samples of a batch."""
    return batch if batch.size <= count else batch.pick(torch.arange(count))
