"""``PermuteChannels``: reorder hidden neurons so that two of every four lose less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import OptionError, PlanError
from ...ir.axis import Axis, kept_index, leaves
from ...ir.group import Kind
from ...ir.linear_layers import Matrix, matrices
from ...ir.pipeline import Transform
from ...ir.program import Program
from .sparsify_blocks import with_parameters


@dataclass(frozen=True)
class PermuteChannels(Transform):
    """Permute the neurons of every feed-forward part: rows of what makes them, columns of what reads them. The outputs
    stay (up to the order of sums), for the order of hidden neurons means nothing; the 2:4 pattern of the second layer
    then finds larger weights to keep. Across a residual width this would cost a gather at run time, so it is not done.

    rounds   of exchanges: all fours are paired at random, and the best of the sixteen exchanges between two fours is
             made where it gains

    orders    weight that reads neurons -> their order, from a plan: nothing is searched then

    Needs ``axes`` and ``groups`` of slicing (``FindGroups``). Law: the kept magnitude of no layer falls; same seed,
    same order.
    Source   Pool and Yu 2021, channel permutations for N:M sparsity (NeurIPS); its search is exhaustive over fours,
             ours is random
    """

    needs: ClassVar[tuple[str, ...]] = ("axes", "groups")

    rounds: int = 50
    seed: int = 0
    orders: Mapping[str, Sequence[int]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise OptionError("at least one round of exchanges is needed", where=f"rounds={self.rounds}")

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, dict[str, tuple[int, ...]]]:
        """(the permuted program, the order of every weight that reads neurons: what ``orders`` takes)."""
        sides = _neurons(program)
        found: dict[Axis, Tensor] = {}
        if self.orders is not None:
            for name, order in self.orders.items():
                axis = next((a for a, readers in sides.items() if name in [m.parameter for m in readers]), None)
                if axis is None or len(order) != axis.size:
                    raise PlanError(
                        "the plan orders the inputs of a weight that reads no neurons of its own here",
                        where=f"blocks of '{name}'",
                        why="it was made for another architecture, or edited",
                        cure="make a new plan with `fxprune plan`",
                    )
                found[axis] = torch.tensor(order, dtype=torch.long)
        else:
            for axis, readers in sides.items():
                weights = [m.matrix(program.tensors[m.parameter].detach()).float().abs() for m in readers]
                found[axis] = exchange_channels(torch.cat(weights), self.rounds, self.seed)
        if not found:
            return program, {}
        orders = {m.parameter: tuple(order.tolist()) for axis, order in found.items() for m in sides[axis]}
        return program.without_facts(exported=with_parameters(program, _permute(program, found))), orders


def _neurons(program: Program) -> dict[Axis, list[Matrix]]:
    """Axes of feed-forward neurons, and the layers that read them and nothing else, neighbour by neighbour."""
    axes, layers = program.need("axes"), matrices(program)
    parameters = program.exported.graph_signature.inputs_to_parameters.values()
    found = {}
    for group in program.need("groups"):
        if group.kind is not Kind.FFN or group.frozen or group.size % 4 or group.size < 8:
            continue
        readers = [m for m in layers if m.node in group.nodes and not m.dense]
        sides = [axes.dims[m.weight][0 if m.transposed else 1] for m in readers]
        alone = all(tuple(leaves(side)) == (group.axis,) for side in sides)
        if readers and alone and all(slot.parameter in parameters for slot in group.slots):
            found[group.axis] = readers
    return found


def _permute(program: Program, orders: Mapping[Axis, Tensor]) -> dict[str, Tensor]:
    changed: dict[str, Tensor] = {}
    for placeholder, name in program.tensor_of_placeholder.items():
        for position, dim in enumerate(program.need("axes").dims[placeholder] or ()):
            if set(leaves(dim)) & set(orders):
                old = changed.get(name, program.tensors[name].detach())
                changed[name] = old.index_select(position, kept_index(dim, dict(orders)).to(old.device))
    return changed


def exchange_channels(weight: Tensor, rounds: int, seed: int) -> Tensor:
    """An order of the columns of |W| [out, in] in which two of every four keep more. [in] int64"""
    generator = torch.Generator().manual_seed(seed)
    count = weight.shape[1] // 4
    order = torch.arange(weight.shape[1])
    for _ in range(rounds):
        pairs = torch.randperm(count, generator=generator)[: count // 2 * 2].view(2, -1)
        columns = order.view(count, 4)[pairs]  # [2, pairs, 4]
        both = weight[:, columns.flatten()].view(-1, 2, pairs.shape[1], 4)
        now = _sum_kept(both).sum(0)
        best, where = torch.zeros_like(now), torch.full(now.shape, -1)
        for i in range(16):
            trial = both.clone()
            trial[:, 0, :, i // 4], trial[:, 1, :, i % 4] = both[:, 1, :, i % 4], both[:, 0, :, i // 4]
            gain = _sum_kept(trial).sum(0) - now
            where = torch.where(gain > best, i, where)
            best = torch.maximum(gain, best)
        new = columns.clone()
        for p in (where >= 0).nonzero()[:, 0].tolist():
            i = int(where[p])
            new[0, p, i // 4], new[1, p, i % 4] = columns[1, p, i % 4], columns[0, p, i // 4]
        order.view(count, 4)[pairs] = new
    return order


def _sum_kept(fours: Tensor) -> Tensor:
    """Magnitude that two of each four keep, over rows. [out, 2, pairs, 4] -> [2, pairs]"""
    return fours.topk(2, -1).values.sum((0, -1))
