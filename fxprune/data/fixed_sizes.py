"""Data for a graph whose sizes could not stay open: batches of the one size that it takes, lengths cut to its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LoadError
from ..intake.load import Loaded
from ..ir.program import Program
from ..ir.signature import input_values
from .batch import Batch, Calibration
from .sources import generate


def fit_sizes(program: Program, data: Calibration) -> tuple[Calibration, list[str]]:
    """(``data`` as ``program`` takes it, what was done to it): the same object and no words where it fits as it is.

    A fixed batch size: samples are put together in batches of it. A fixed length: what is longer is cut to it, and
    samples that are shorter are left out. Raises LoadError where nothing is left.
    """
    size, notes = find_batch_size(program), list[str]()
    batches = [kept for batch in data.batches if (kept := _cut(program, batch)) is not None]
    if len(batches) < len(data.batches) or any(a is not b for a, b in zip(batches, data.batches, strict=True)):
        left = sum(b.size for b in batches)
        notes.append(
            f"the data is cut to the length that is fixed: {left} of {data.samples} samples are as long or longer"
        )
    if size is not None and any(batch.size != size for batch in batches):
        before = sum(b.size for b in batches)
        batches = _in_batches_of(size, batches)
        left = sum(b.size for b in batches)
        notes.append(f"the data is cut to batches of {size}, the size that is fixed: {left} of {before} samples")
    if not batches:
        raise LoadError(
            "the data does not fill the one batch that the model takes",
            where=data.origin,
            why=f"the graph takes batches of {size} samples" if size is not None else "all of it is too short",
            cure="give more samples, or example inputs of the data's size",
        )
    return (replace(data, batches=tuple(batches)), notes) if notes else (data, [])


def find_batch_size(program: Program) -> int | None:
    """The one batch size that ``program`` takes; None where it is open. A 1 beside an open one goes with all."""
    inputs = [v for v in input_values(program) if isinstance(v, Tensor) and v.dim()]
    sizes = [_number(v.shape[0]) for v in inputs]
    batch = next((len(t) for t in pytree.tree_leaves(program.example_inputs) if isinstance(t, Tensor) and t.dim()), 0)
    return batch if batch in sizes and (batch > 1 or sizes[0] == 1) else None


def generate_for(program: Program, inputs: Loaded, samples: int, seed: int) -> Calibration:
    """Made-up inputs (:func:`fxprune.data.sources.generate`) of sizes that ``program`` takes."""
    size = find_batch_size(program)
    if size is None:
        return generate(inputs, samples=samples, seed=seed)
    return generate(inputs, samples=max(samples // size, 1) * size, seed=seed, batch=size)


def open_dimensions(program: Program) -> dict[str, frozenset[int]]:
    """Input -> its dimensions of which any size is taken."""
    return {
        name: frozenset(i for i, size in enumerate(value.shape) if _number(size) is None)
        for name, value in zip(program.user_inputs, input_values(program), strict=True)
        if isinstance(value, Tensor)
    }


def _number(size: int | torch.SymInt) -> int | None:
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return None if known is None else int(known)
    return int(size)


def _cut(program: Program, batch: Batch) -> Batch | None:
    """``batch`` with every length that is fixed cut to it; None where one is shorter, itself where all fit."""
    leaves, spec = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    values = dict(zip(program.user_inputs, input_values(program), strict=True))
    names = _names(program, batch)
    cut: list[Any] = []
    for name, leaf in zip(names, leaves, strict=True):
        value = values.get(name)
        if isinstance(leaf, Tensor) and isinstance(value, Tensor) and leaf.dim() == value.dim():
            for position in range(1, leaf.dim()):
                size = _number(value.shape[position])
                if size is not None and leaf.shape[position] < size:
                    return None
                if size is not None and leaf.shape[position] > size:
                    leaf = leaf.narrow(position, 0, size)
        cut.append(leaf)
    if all(a is b for a, b in zip(cut, leaves, strict=True)):
        return batch
    args, kwargs = pytree.tree_unflatten(cut, spec)
    return Batch(args, kwargs, batch.labels)


def _names(program: Program, batch: Batch) -> list[str]:
    """The names of a batch's leaves: those of the positional inputs in order, then those of the keywords."""
    count = len(pytree.tree_leaves(batch.args))
    names = program.user_inputs[:count]
    for key, value in batch.kwargs.items():
        inner = len(pytree.tree_leaves(value))
        names += [key] if inner == 1 else [f"{key}_{i}" for i in range(inner)]
    return names


def _in_batches_of(size: int, batches: list[Batch]) -> list[Batch]:
    """The samples in batches of ``size``; those of one shape that are left over are joined, the last ones dropped."""
    whole: list[Batch] = []
    rest: dict[Any, Batch] = {}
    for batch in batches:
        shape = tuple(
            tuple(t.shape[1:]) for t in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(t, Tensor)
        )
        joined = _join_batches(rest.pop(shape), batch) if shape in rest else batch
        full = joined.size // size * size
        whole += [joined.pick(torch.arange(start, start + size)) for start in range(0, full, size)]
        if full < joined.size:
            rest[shape] = joined.pick(torch.arange(full, joined.size))
    return whole


def _join_batches(one: Batch, two: Batch) -> Batch:
    def join(a: Any, b: Any) -> Any:
        return torch.cat([a, b]) if isinstance(a, Tensor) and a.dim() and len(a) == one.size else a

    args, kwargs = pytree.tree_map(join, (one.args, dict(one.kwargs)), (two.args, dict(two.kwargs)))
    both = one.labels is not None and two.labels is not None
    return Batch(args, kwargs, join(one.labels, two.labels) if both else None)
