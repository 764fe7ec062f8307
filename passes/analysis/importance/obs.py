"""Structured OBS (ZipLM): elements go one by one while the weights that stay make up for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data.batch import Batch, Calibration, sample_count
from ....errors import InternalError, OptionError
from ....ir.group import Kind, PruneGroup
from ....ir.program import Program
from .criterion import Criterion, prunable
from .curves import fill, slopes, some
from .damage import Change, Damage
from .l2 import L2
from .readers import Inputs, Reader, gather, readers
from .removal import Layer, removal

RIDGE = 0.3  # of the layer update whose damage is measured: what recovery uses (recovery.md 3)


@dataclass(frozen=True)
class Obs(Criterion):
    """Order within a group by greedy structured OBS; worth between groups by the damage that is left after the update.

    Order     ``removal``: every layer that reads the group contributes ``tr(W_S (Hi_SS)^-1 W_S^T)`` with moments of its
              inputs, rows weighted by the norm behind the layer as in recovery, so that a massive activation that the
              norm divides away does not rule it
    Damage    ``measured``: at a few counts per group the group alone is cut, its readers are solved for in closed form,
              and the output's deviation from the dense one is taken (KL of logits, else squared deviation of the
              standardised output less its mean over samples). ``local``: the squared error of the readers' outputs in
              units of what their norm divides by (ZipLM's layer error)
    Scores    element that is kept as the k-th best: the slope there of the damage curve's convex hull, so that the
              best k are worth what their removal would cost

    samples   that moments are gathered on;  judged: of these, that damage is measured on
    levels    counts per group at which damage is measured
    rel       damping of the moments, relative to their mean diagonal

    Unit      nats or squared deviation (``measured``), relative squared error (``local``); comparable across groups
    Law       a group element whose reading weights are zero is worth nothing; scores do not depend on batch order;
              curves never rise with the number kept
    Source    Kurtic et al. 2023 (ZipLM), arXiv:2302.04089, sections 3.1 and 3.2: levels per layer, damage after the
              update; allocated by ``SearchPlan`` where ZipLM runs SPDY. Moments are centred because a bias moves for
              free; the reference does not centre. A group with a reader that cannot be solved for (two activations, a
              grouped convolution) is ordered by weight norm, its damage measured by masking
    """

    damage: str = "measured"
    samples: int = 512
    judged: int = 128
    levels: int = 8
    rel: float = 0.01

    name = "obs"
    unit = "damage"
    needs_data = True
    comparable = True

    def __post_init__(self) -> None:
        if self.damage not in ("measured", "local"):
            raise OptionError(
                f"unknown damage '{self.damage}'", where="--importance obs", cure="known: measured, local"
            )
        if min(self.samples, self.judged, self.levels) < 1 or not self.rel > 0:
            raise OptionError("samples, judged, levels and rel must be positive", where=f"--importance {self}")

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {name: found["values"] for name, found in self.assess(program, data, seed).items()}

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        """Scores, and the order and the damage curve they stand for: a search may use the curve as it is."""
        batches = _take_batches(data, self.samples)
        found, _ = readers(program)
        inputs = gather(program, found, batches)
        judge = Damage(program, first(batches, self.judged)) if self.damage == "measured" else None
        result = {}
        for group in prunable(program):
            order, added = self._order(program, group, found, inputs)
            curve = self._measure(program, group, order, found, inputs, judge) if judge else _local(order, added)
            result[group.name] = {
                "values": slopes(order, curve),
                "curve": fill(curve, group.size),
                "order": torch.tensor(order[::-1], dtype=torch.long),
            }
        return result

    def ranks(self, program: Program, data: Calibration | None, kinds: Sequence[Kind]) -> dict[str, Tensor]:
        """Group name -> [size] elements, the most important first, of the groups that have a reader to solve for."""
        found = [r for r in readers(program)[0] if r.group.kind in kinds]
        inputs = gather(program, found, _take_batches(data, self.samples))
        solved = {r.group.name for r in found if r.node in inputs}
        return {
            g.name: torch.tensor(self._order(program, g, found, inputs)[0][::-1], dtype=torch.long)
            for g in prunable(program)
            if g.name in solved
        }

    def _order(
        self, program: Program, group: PruneGroup, found: Sequence[Reader], inputs: dict[str, Inputs]
    ) -> tuple[list[int], list[float]]:
        """(elements in the order of removal, squared error that each adds)."""
        mine = [r for r in found if r.group is group and r.node in inputs]
        if not mine:
            norms = L2().scores(program, None, 0)[group.name]
            order = torch.argsort(norms, stable=True)
            return order.tolist(), norms[order].tolist()
        bound, tensors = program.tensor_of_placeholder, program.tensors
        layers = []
        for one in mine:
            weight = one.matrix(tensors[bound[one.weight]].detach()).double().cpu()
            have = inputs[one.node]
            layers.append(Layer(have.g * have.level, weight, one.unit))
        return removal(layers, group.size, self.rel)

    def _measure(
        self,
        program: Program,
        group: PruneGroup,
        order: Sequence[int],
        found: Sequence[Reader],
        inputs: dict[str, Inputs],
        judge: Damage,
    ) -> list[tuple[int, float]]:
        """(count kept, damage) at a few counts, ascending."""
        mine = [r for r in found if r.group is group and r.node in inputs]
        counts = some([n for n in {*group.levels(), group.floor} if n < group.size], self.levels)
        changes = []
        for count in counts:
            keep = torch.zeros(group.size, dtype=torch.bool)
            keep[torch.tensor(list(order[group.size - count :]), dtype=torch.long)] = True
            changes.append(
                Change(group, keep, {k: v for r in mine for k, v in _solve(program, r, inputs[r.node], keep).items()})
            )
        return [*zip(counts, judge.of(changes), strict=True), (group.size, 0.0)]


def _solve(program: Program, one: Reader, have: Inputs, keep: Tensor) -> dict[str, Tensor]:
    """Placeholder -> tensor of a reader whose kept columns make up for the others in closed form (methods 8.1)."""
    bound, tensors = program.tensor_of_placeholder, program.tensors
    old = tensors[bound[one.weight]].detach()
    weight = one.matrix(old).double().cpu()
    gone = (one.unit >= 0) & ~keep[one.unit.clamp_min(0)]
    stay = ~gone
    g = have.g[stay][:, stay]
    new = weight.clone()
    new[:, gone] = 0
    if bool(stay.any()):
        damped = g + (RIDGE * float(g.diagonal().mean()) or 1.0) * torch.eye(len(g), dtype=g.dtype)
        new[:, stay] += torch.linalg.solve(damped, have.g[stay][:, gone] @ weight[:, gone].T).T
    made = {one.weight: one.shape_like(new, old).to(old.device)}
    if one.bias:
        bias = tensors[bound[one.bias]].detach()
        made[one.bias] = (bias.double().cpu() + (weight - new) @ have.mean).to(bias)
    return made


def _local(order: Sequence[int], added: Sequence[float]) -> list[tuple[int, float]]:
    total, curve = 0.0, [(len(order), 0.0)]
    for number, cost in enumerate(added, 1):
        total += cost
        curve.append((len(order) - number, total))
    return curve[::-1]


def _take_batches(data: Calibration | None, samples: int) -> list[Batch]:
    if data is None or not data.batches:
        raise InternalError("OBS needs calibration data")
    return first(data.batches, samples)


def first(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Whole batches until there are ``samples`` samples."""
    chosen: list[Batch] = []
    for batch in batches:
        if sample_count(chosen) >= samples:
            break
        chosen.append(batch)
    return chosen
