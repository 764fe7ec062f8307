"""All elements of a model scored together: random directions, and one backward pass for the gradients of every mask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....data.batch import Batch, sample_count
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.jobs import run_jobs
from .consumers import Consumer, consumers
from .distance import Measure
from .features import Tap, View, find_taps, views
from .mask_gradients import Gradients, TappedRun, without_samples
from .objective import objectives

Scores = dict[str, Tensor]


@dataclass
class FeatureProbes:
    """The leading term of the feature loss for every element of ``groups`` at once, over ``batches``.

    Removing an element moves rows F of a layer by E, and their map, to first order, by
    ``||E F^T + F E^T||^2 = 2 tr(E G E^T) + 2 tr(C^2)``, G = F^T F and C = F^T E. What is estimated is the first part:
    each row gets a random direction v_r of covariance G, and ``s = sum_r v_r . F_r`` has ``E (ds_b/dm)^2 = sum over
    rows of sample b of E_r G E_r^T``: one
    backward pass gives an independent square *per sample*, where the map itself (whose probe ``u^T M v`` couples all
    rows) gives one per batch. The second part is left out on purpose. It is small (on MiniLM its share of the first has
    quartiles of -2 % and +1 %, extremes of -46 % and +40 %, and the first part alone ranks neurons like exact removal
    with Spearman 0.996), and its estimate has more noise than it has size (16 passes: 0.985 without it, 0.95 with it,
    0.93 for the map's own probe).

    Feature maps of convolutions: ``s = <v, mean_b F_b> / sqrt(entries)`` with random signs v, squared after the sum
    over samples, or with directions per sample and squared before (``Measure.per_sample``).

    Source   the leading term of OPTIN, arXiv:2403.17921, eq. 2, by random directions as Hutchinson (1990) estimates
             traces; the paper removes every element in turn

    A layer's own features, where they do not count, are taken out by a second pass that stops at that layer's masks.
    All layers share one pass: their directions are independent, so that squares add up.
    """

    program: Program
    batches: Sequence[Batch]
    measure: Measure
    probes: int
    seed: int
    groups: Collection[str]
    name: str = "trajectory.probes"

    def __post_init__(self) -> None:
        self.taps: list[Tap] = find_taps(self.program, self.measure.location)
        sides = consumers(self.program)
        self.views: dict[str, View] = {
            k: v for k, v in views(sides, self.taps, self.measure.taps).items() if k in self.groups and v.wanted
        }
        self.sides = only(sides, self.views)
        self._run: tuple[int, _Look] | None = None

    def scores(self) -> Scores:
        """Group -> [size]."""
        sizes = {g.name: g.size for g in self.program.need("groups")}
        total = {name: torch.zeros(sizes[name], dtype=torch.float64) for name in self.groups}
        if not self.taps or not self.views:
            return total
        count = len(self.batches) * self.probes
        for found in run_jobs(self.name, count, self._job):
            for name, squares in found.items():
                total[name] += squares / count
        return total

    def _job(self, i: int) -> Scores:
        number, probe = divmod(i, self.probes)
        if self._run is None or self._run[0] != number:
            self._run = (number, _Look(self, self.batches[number]))
        generator = torch.Generator().manual_seed(hash((self.seed, number, probe)) % 2**63)
        return self._run[1].squares(generator)


class _Look:
    """One batch: its forward pass, kept for all probes."""

    def __init__(self, of: FeatureProbes, batch: Batch) -> None:
        self.of, self.measure = of, of.measure
        self.run = TappedRun(
            of.program, of.sides, without_samples(of.sides), replace(batch, labels=None), {t.value for t in of.taps}
        )
        self.run.forward()
        mask = padding_mask(of.program, self.run.flat)
        self.rows = [of.measure.feature(t, self.run.watched[t.value], mask) for t in of.taps]
        self.masked = {}
        for z, tap in enumerate(of.taps):
            alias = next((a for s, a in self.run.aliases if s.operand.node.name == tap.at), None)
            if tap.masked and alias is not None:
                self.masked[z] = of.measure.feature(tap, alias, mask)
        self.roots = [
            _root(f.detach()) if t.rows and len(f) > f.shape[1] else None
            for f, t in zip(self.rows, of.taps, strict=True)
        ]
        last = len(of.taps) - 1
        self.entries = of.measure.entries(of.taps[last], self.rows[last])
        self.aliases = self.run.aliases

    def squares(self, generator: torch.Generator) -> Scores:
        """Group -> [size] for one draw of directions."""
        directions = [self._direction(z, generator) for z in range(len(self.rows))]
        raw = [(v * f).sum() for v, f in zip(directions, self.rows, strict=True)]
        # (scalar, groups, sign): who collects what
        total: dict[str, Tensor] = {}
        together, alone, own = [], list[tuple[int, str, int]](), list[tuple[int, str]]()
        for name, view in self.of.views.items():
            moved = view.reached[1:] if view.masked else view.reached
            wanted = tuple(z for z in view.wanted if not (view.masked and z == view.own))
            if len(wanted) < len(view.wanted):
                own.append((view.own, name))
            if wanted == moved and wanted:
                together.append(name)
            elif wanted and wanted == moved[1:]:
                together.append(name)
                alone.append((moved[0], name, -1))
            else:
                alone += [(z, name, 1) for z in wanted]
        self._add(total, torch.stack(raw).sum(), together, 1)
        for z in range(len(raw)):
            for sign in (1, -1):
                self._add(total, raw[z], [n for at, n, s in alone if (at, s) == (z, sign)], sign)
            self._add(
                total,
                (directions[z] * self.masked[z]).sum() if z in self.masked else raw[z],
                [n for at, n in own if at == z],
                1,
            )
        apart = self.of.taps[0].rows or self.measure.per_sample
        return {name: self.entries * (g.square().sum(0) if apart else g.sum(0).square()) for name, g in total.items()}

    def _direction(self, z: int, generator: torch.Generator) -> Tensor:
        f = self.rows[z].detach()
        count = len(f)
        if not self.of.taps[z].rows:
            shape = f.shape if self.measure.per_sample else f[:1].shape
            share = count**0.5 if self.measure.per_sample else count
            return signs(shape, generator, f) / (f[0].numel() ** 0.5 * share)
        root = self.roots[z]
        v = signs((count, count), generator, f) @ f if root is None else signs(f.shape, generator, f) @ root
        return v * (2**0.5 / max(count, 1))

    def _add(self, total: dict[str, Tensor], scalar: Tensor, groups: Sequence[str], sign: int) -> None:
        if not groups:
            return
        wanted = set(groups)
        aliases = [a for side, a in self.aliases if any(g.name in wanted for g in side.groups)]
        found: Gradients = self.run.gradients_of(scalar, aliases)
        for name in groups:
            if name in found:
                total[name] = total[name] + sign * found[name] if name in total else sign * found[name]


def output_probes(
    program: Program, batches: Sequence[Batch], groups: Collection[str], probes: int, seed: int, temperature: float
) -> Scores:
    """Half the mean squared gradient of random directions of each sample's output: the leading term of the KL, or of
    the squared deviation (see ``objective.objectives``), over all ``batches``. Group -> [size]"""
    sides = only(consumers(program), groups)
    sizes = {g.name: g.size for g in program.need("groups")}
    total = {name: torch.zeros(sizes[name], dtype=torch.float64) for name in groups}
    first = [sample_count(batches[:i]) for i in range(len(batches) + 1)]

    def job(i: int) -> Scores:
        batch = replace(batches[i], labels=None)
        run = TappedRun(program, sides, without_samples(sides), batch)
        losses = objectives(program, run.forward(), batch, run.samples, seed, first[i], probes, temperature)
        found: Scores = {}
        for j, loss in enumerate(losses):
            aliases = [a for _, a in run.aliases]
            for name, g in run.gradients_of(loss, aliases, retain=j < len(losses) - 1).items():
                found[name] = found.get(name, 0) + 0.5 * g.square().sum(0)
        return found

    for found in run_jobs("trajectory.output", len(batches), job) if sides else ():
        for name, squares in found.items():
            total[name] += squares / max(first[-1] * probes, 1)
    return total


def only(sides: Sequence[Consumer], groups: Collection[str] | Mapping[str, object]) -> list[Consumer]:
    """The consumers of ``groups``, without the others' share."""
    kept = [replace(s, groups=tuple(g for g in s.groups if g.name in groups)) for s in sides]
    return [s for s in kept if s.groups]


def signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs."""
    return (torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8) * 2 - 1).to(like)


def _root(f: Tensor) -> Tensor:
    """The symmetric root of ``f^T f``. [width, width]"""
    values, vectors = torch.linalg.eigh((f.T @ f).double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).to(f)
