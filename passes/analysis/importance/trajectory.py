"""Trajectory importance (OPTIN): what removing an element does to the features of later layers and to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ....data import Calibration
from ....errors import InternalError
from ....group import Kind
from ....program import Program
from .consumers import Consumer, consumers
from .criterion import Criterion, prunable
from .mask_gradients import Gradients, TappedRun, notes_on_samples, without_samples
from .objective import objectives, padding

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Trajectory(Criterion):
    """``I[i] = sum over taps z > layer of i of || dM(F_z)/dm[i] ||_F^2 + lambda * output Fisher[i]``

    M(F) = F F^T is the relational map over the rows (tokens) of a batch, F_z the output of the z-th feed-forward layer
    before its residual sum, found by analysis: the linear layers that sum over a group of kind ``ffn``. The first term
    is the leading one of the manifold distillation loss ``|| F' F'^T - F F^T ||_F^2`` for removing the element.

    All elements of the model are scored together: with random signs u, v per row and e per tap, the scalar
    ``s = sum_z e_z (F_z^T u) . (F_z^T v)`` has ``E (ds/dm)^2 = sum_z || dM(F_z)/dm ||_F^2``; one backward pass gives
    ds/dm for every mask. What an element does to the tap of its own layer (the first one at or after its consumer) is
    taken out again by a backward pass from that tap over that one layer; with no later tap, its own is all there is.

    The second term is the Fisher information of the output (``Fisher``, without labels), the leading term of the KL.
    ``lambda = weight * median(first per MAC) / median(second per MAC)``, one number for the model: monotone in both.

    probes      backward passes per batch for the first term (each with a second, shorter one)
    samples     samples that the first term looks at, in whole batches
    weight      lambda relative to the balance of medians; 0 leaves the features alone
    output_probes  random directions per sample for the second term, over all data
    normalised  rows of F have length one (a scale-free cosine map, robust to massive activations), else raw
    taps        ``later``: i+1..N, the last layer its own (the paper's best); ``from``: i..N; ``next``: i+1; ``own``: i

    Shapes   F_z is [rows, width]; padding rows (by an input called ..mask) are left out
    Unit     change of the relational map per pair of rows; comparable across groups
    Source   OPTIN, eq. 2 and 3; the reference code's index prior, head decay and padding rows are left out on purpose
             (they carry no information about an element); probes: methods 0.5 and 0.6
    Law      zero for an element that no weight reads; relabelling elements relabels scores; the same seed, the same
             scores
    """

    probes: int = 16
    samples: int = 128
    weight: float = 0.3
    output_probes: int = 4
    normalised: bool = True
    taps: str = "later"

    name = "trajectory"
    unit = "map change"
    needs_data = True
    comparable = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> Scores:
        features, output = self.parts(program, data, seed)
        return combine(program, features, output, self.weight)

    def parts(self, program: Program, data: Calibration | None, seed: int) -> tuple[Scores, Scores]:
        """(feature term, output Fisher) by group, before they are balanced."""
        if data is None or not data.batches:
            raise InternalError("trajectory importance needs calibration data")
        groups, watched, sides = prunable(program), tap_nodes(program), consumers(program)
        owner, lumped = owners(program, sides, watched), without_samples(sides)
        features = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
        output = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
        drawn = seen = first = 0
        for number, batch in enumerate(replace(b, labels=None) for b in data.batches):
            look = bool(watched) and first < self.samples
            run = TappedRun(program, sides, lumped, batch, watched if look else ())
            results = run.forward()
            for loss in objectives(program, results, batch, run.samples, seed, first, self.output_probes) \
                    if self.weight else ():
                for name, g in run.gradients_of(loss).items():
                    output[name] += 0.5 * g.square().sum(0)
                seen += run.samples
            if look:
                mask = padding(program, batch)
                rows = {name: _rows(run.watched[name], mask, self.normalised) for name in watched}
                for probe in range(self.probes):
                    generator = torch.Generator().manual_seed(hash((seed, number, probe)) % 2**63)
                    for name, g in self._probe(run, rows, watched, owner, generator).items():
                        features[name] += g.sum(0).square()
                drawn += self.probes
            first += run.samples
        return ({k: v / max(drawn, 1) for k, v in features.items()}, {k: v / max(seen, 1) for k, v in output.items()})

    def _probe(self, run: TappedRun, rows: Mapping[str, Tensor], watched: Sequence[str], owner: Mapping[str, int],
               generator: torch.Generator) -> Gradients:
        """ds/dm of one random probe, each group collecting only the taps it should."""
        scalars = [random_product(rows[name], generator) for name in watched]
        last = len(watched) - 1
        if self.taps in ("later", "from"):
            total = dict(run.gradients_of(torch.stack(scalars).sum()))
        else:
            total = {}
        for z, scalar in enumerate(scalars):
            mine = [name for name, own in owner.items() if own == z]
            alone = self.taps == "own" or (self.taps == "next" and z == last)
            if self.taps == "from" or (self.taps == "later" and z == last):
                continue
            if self.taps == "next" and z < last:
                own, sign = run.gradients_of(scalars[z + 1], _aliases(run, mine)), 1
            else:
                own, sign = run.gradients_of(scalar, _aliases(run, mine)), 1 if alone else -1
            for name in mine:
                if name in own:
                    total[name] = total[name] + sign * own[name] if name in total else sign * own[name]
        return total

    def notes(self, program: Program) -> Sequence[str]:
        notes = notes_on_samples(program)
        if not tap_nodes(program):
            notes.append("trajectory importance found no feed-forward layer to tap: scores are the output's Fisher")
        return notes


def combine(program: Program, features: Scores, output: Scores, weight: float) -> Scores:
    """``features + lambda * output``, balanced by their medians per MAC over the elements that matter."""
    cost = {g.name: max(g.macs, 1) for g in prunable(program)}

    def median(scores: Scores) -> float:
        each = torch.cat([s / cost[name] for name, s in scores.items()]) if scores else torch.zeros(0)
        each = each[each > 0]
        return float(each.median()) if len(each) else 0.0

    one, two = median(features), median(output)
    if not one or not two:
        return output if not one else features
    return {name: f + weight * one / two * output[name] for name, f in features.items()}


def tap_nodes(program: Program) -> list[str]:
    """Names of the layers that sum over a feed-forward group, in graph order: their outputs are the features."""
    linear = {m.node for m in program.need("axes").matmuls if m.form == "linear"}
    found = {c.operand.node.name for c in consumers(program)
             if c.operand.node.name in linear and any(g.kind is Kind.FFN for g in c.groups)}
    return [n.name for n in program.graph.nodes if n.name in found]


def owners(program: Program, sides: Sequence[Consumer], watched: Sequence[str]) -> dict[str, int]:
    """Group -> the tap of its own layer: the first at or after the first node that sums over it, else the last."""
    place = {n.name: i for i, n in enumerate(program.graph.nodes)}
    owner: dict[str, int] = {}
    for side in sides if watched else ():
        at = place[side.operand.node.name]
        own = next((z for z, name in enumerate(watched) if place[name] >= at), len(watched) - 1)
        for group in side.groups:
            owner[group.name] = min(own, owner.get(group.name, own))
    return owner


def random_product(rows: Tensor, generator: torch.Generator) -> Tensor:
    """``e (F^T u).(F^T v) / rows`` with random signs: its gradient's square has ``||dM||_F^2 / rows^2`` as its mean."""
    u, v = ((torch.randint(0, 2, (len(rows),), generator=generator) * 2 - 1).to(rows) for _ in range(2))
    sign = float(torch.randint(0, 2, (1,), generator=generator) * 2 - 1)
    return sign * (u @ rows) @ (v @ rows) / max(len(rows), 1)


def map_change(changed: Tensor, dense: Tensor) -> Tensor:
    """``|| F' F'^T - F F^T ||_F^2`` of two [rows, width] in the difference form (methods 0.4.3).

    With S = F' + F and E = F' - F it is ``(<S^T S, E^T E> + <E^T S, (E^T S)^T>) / 2``; the Gram identity would subtract
    nearly equal numbers. Smaller Grams over rows are used where there are fewer rows than columns.
    """
    s, e = changed + dense, changed - dense
    if len(s) < s.shape[1]:
        return ((s @ e.T + e @ s.T) / 2).square().sum()
    es = e.T @ s
    return (((s.T @ s) * (e.T @ e)).sum() + (es * es.T).sum()) / 2


def _aliases(run: TappedRun, groups: Sequence[str]) -> list[Tensor]:
    wanted = set(groups)
    return [alias for side, alias in run.aliases if any(g.name in wanted for g in side.groups)]


def _rows(features: Tensor, mask: Tensor | None, normalised: bool) -> Tensor:
    """[rows, width] of the real positions, in at least fp32."""
    x = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    flat = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(flat):
        flat = flat[mask.reshape(-1).to(flat.device)]
    return functional.normalize(flat, dim=1) if normalised else flat
