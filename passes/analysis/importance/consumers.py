"""Where each group is consumed: the operands to tap, found once from the graph and its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....errors import InternalError
from ....ir.axes import Axes
from ....ir.axis import OPEN, Axis, Dims, atoms, element_of, leaves, real_size, total
from ....ir.dataflow import bind, bind_values, product
from ....ir.group import PruneGroup
from ....ir.program import Program
from ....ir.signature import batch_axes
from .criterion import CannotScore, prunable


@dataclass(frozen=True)
class Operand:
    """One tensor argument of a node, and the dimension of it that is summed over.

    path      a schema name, or ``name.i`` for the i-th tensor of a list
    sampled   the dimension that numbers samples, alone or merged with others; None for weights and constants
    """

    node: Node
    path: str
    position: int
    dims: Dims
    sampled: int | None

    def value(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        name, _, index = self.path.partition(".")
        value = bind_values(self.node.target, args, kwargs)[name]
        tensor: Tensor = value[int(index)] if index else value
        return tensor

    def put(
        self, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with this operand replaced."""
        name, _, index = self.path.partition(".")
        at = self._index(name)
        new: Any = tensor
        if index:
            new = list(kwargs[name] if name in kwargs else args[at])
            new[int(index)] = tensor
        if name in kwargs:
            return tuple(args), {**kwargs, name: new}
        return (*args[:at], new, *args[at + 1 :]), kwargs

    def _index(self, name: str) -> int:
        schema = self.node.target._schema  # type: ignore[union-attr]
        return next(i for i, a in enumerate(schema.arguments) if a.name == name)


@dataclass(frozen=True)
class Consumer:
    """A node that sums over ``groups``: the operand to mask, and the other side of the product if it is a tensor.

    Masking one operand removes the element from the sum; masking both would count it twice in a gradient.
    """

    operand: Operand
    other: Operand | None
    groups: tuple[PruneGroup, ...]


def consumers(program: Program) -> list[Consumer]:
    """Every place where a prunable group is really summed over, in graph order.

    A depthwise convolution hands its channels on, so it is no consumer of them: their mask acts further down.
    """
    axes: Axes = program.need("axes")
    nodes = {n.name: n for n in program.graph.nodes}
    groups = {g.axis: g for g in prunable(program)}
    summed: dict[str, set[Axis]] = {}
    for m in axes.matmuls:
        summed.setdefault(m.node, set()).update(leaves(m.k))
    batch = batch_axes(program)
    found = []
    for c in axes.contractions:
        here = [a for a in dict.fromkeys(leaves(c.dim)) if a in groups]
        really = [a for a in here if a in summed.get(c.node, {a})]
        operands = [_operand(axes, nodes[c.node], path, position, batch) for path, position in c.operands]
        operands.sort(key=lambda o: o.sampled is None)  # stable: the first operand that carries samples
        if not really:
            continue
        other = operands[1] if len(operands) > 1 else _kernel(axes, nodes[c.node], operands[0], batch)
        found.append(Consumer(operands[0], other, tuple(groups[a] for a in really)))
    return found


def _operand(axes: Axes, node: Node, path: str, position: int, batch: set[Axis]) -> Operand:
    name, _, index = path.partition(".")
    source = bind(node)[name]
    dims = axes.dims[(source[int(index)] if index else source).name]
    return Operand(node, path, position, dims, find_sample_dim(dims, batch, position))


def find_sample_dim(dims: Dims, batch: set[Axis], but: int = -1) -> int | None:
    """The dimension of ``dims`` that numbers samples, alone or merged with others; None where there is none."""
    return next((i for i, dim in enumerate(dims) if i != but and batch & set(atoms(dim))), None)


def _kernel(axes: Axes, node: Node, operand: Operand, batch: set[Axis]) -> Operand | None:
    """The weight of a convolution, whose contracted channels sit in dim 1 (dim 0 when transposed)."""
    weight = bind(node).get("weight")
    if not isinstance(weight, Node) or operand.path != "input":
        return None
    one, turned = product(node), bind(node).get("transposed")
    position = 0 if turned or (one is not None and one.form == "deconv") else 1
    return _operand(axes, node, "weight", position, batch)


def elements(operand: Operand, tensor: Tensor, axis: Axis) -> Tensor:
    """Which element of ``axis`` each position along the operand's dimension is; -1 for none. [length]"""
    dim = operand.dims[operand.position]
    if total(dim) != tensor.shape[operand.position]:
        raise InternalError(
            f"{operand.node.name} sums over {tensor.shape[operand.position]} positions, its axes say {total(dim)}"
        )
    return element_of(dim, axis).to(tensor.device)


# ---------------------------------------------------------------- samples


def sample_of(operand: Operand, shape: Sequence[int], batch: set[Axis], samples: int, sizes: dict[int, int]) -> Tensor:
    """Which sample each position along ``operand.sampled`` is, also where the batch is merged with heads, windows or
    tokens. [length]

    ``sizes`` holds the symbols' sizes in this run.
    """
    assert operand.sampled is not None
    parts, length = atoms(operand.dims[operand.sampled]), shape[operand.sampled]
    where = next(i for i, axis in enumerate(parts) if axis in batch)
    outer, inner = parts[:where], parts[where + 1 :]
    if any(axis.size > OPEN for axis in inner) and all(axis.size <= OPEN for axis in outer):
        each = length // (total(outer) * samples)
    else:
        each = math.prod(real_size(axis.size, sizes) for axis in inner)
    if length % (samples * each):
        raise CannotScore(
            "it cannot be told where the samples are",
            where=operand.node.name,
            why=f"{length} positions hold no {samples} samples of {each}",
            cure="use a criterion that needs no gradients per sample, such as l2 or activation",
        )
    return torch.arange(length) // each % samples
