"""Exact trajectory importance: the loss of every removal, by running again what follows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....data.batch import Batch, sample_count
from ....errors import FxpruneError
from ....ir.group import PruneGroup
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.jobs import run_jobs
from .consumers import Consumer, consumers
from .distance import Measure, output_change
from .features import Tap, View, find_taps, operand_source, views
from .mask_gradients import not_finite
from .objective import Target, targets
from .suffix import DenseRun, Suffix, Unstackable, copies_that_fit

CHUNK = 64
"""Removals per job."""


@dataclass
class Removals:
    """The loss of removing elements, one at a time or several at once, over ``batches``.

        ``features[i] = mean over batches of sum over taps z of MD(F'_z, F_z)``       ``Measure.change``
        ``output[i]   = mean over samples of the distance of the outputs``           ``output_change``

    Costs one dense run per batch, and per removal what follows its consumers up to the last value looked at. A removal
    that changes nothing at its consumers is 0 without a run.

    Source   OPTIN, arXiv:2403.17921, eq. 3. Its reference code runs the whole model for every element, and leaves the
             last head of every earlier layer masked meanwhile; here nothing of one removal reaches another

    memory   bytes that one run may take: as many removals as fit run side by side along the batch. They run one by one
             where the graph has a fixed batch, where samples are not the outermost part of one dimension, or where a
             trial shows that copies disturb each other; ``notes`` then says why
    """

    program: Program
    batches: Sequence[Batch]
    measure: Measure
    memory: int
    copies: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sides = consumers(self.program)
        self.taps: list[Tap] = find_taps(self.program, self.measure.location)
        self.views: dict[str, View] = views(sides, self.taps, self.measure.taps)
        self.sides: dict[str, list[Consumer]] = {}
        for side in sides:
            for group in side.groups:
                self.sides.setdefault(group.name, []).append(side)
        self.nodes = {n.name: n for n in self.program.graph.nodes}
        self.output = next(n for n in self.program.graph.nodes if n.op == "output")
        self._suffixes: dict[str, Suffix] = {}
        self._run: tuple[int, _Batch] | None = None
        self._stack: bool | None = None
        self._alone, self._checked, self._tried = set[str](), set[str](), False

    def __call__(self, name: str, wanted: Mapping[PruneGroup, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(features, output) of the elements ``wanted`` of each group, in their order. [len(wanted)] float64 each"""
        return self.together(name, {group: list(chosen.split(1)) for group, chosen in wanted.items()})

    def together(
        self, name: str, wanted: Mapping[PruneGroup, Sequence[Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(features, output) of removing each of the sets of elements ``wanted`` of a group, all of a set at once.
        [number of sets] float64 each. A set of one element is that element's removal."""
        self.reading, self._run = list(wanted), None
        jobs = [
            (b, group, list(sets[at : at + CHUNK]))
            for b in range(len(self.batches))
            for group, sets in wanted.items()
            for at in range(0, len(sets), CHUNK)
        ]
        found = run_jobs(name, len(jobs), lambda i: self._job(*jobs[i]))
        features, output = (
            {g.name: torch.zeros(len(sets), dtype=torch.float64) for g, sets in wanted.items()} for _ in range(2)
        )
        place: dict[tuple[int, str], int] = {}
        samples = sample_count(self.batches)
        for (b, group, part), result in zip(jobs, found, strict=True):
            at = place.get((b, group.name), 0)
            place[b, group.name] = at + len(part)
            features[group.name][at : at + len(part)] += result["features"] / len(self.batches)
            output[group.name][at : at + len(part)] += result["output"] * (self.batches[b].size / samples)
        return features, output

    def _job(self, number: int, group: PruneGroup, sets: Sequence[Tensor]) -> dict[str, Tensor]:
        result = {key: torch.zeros(len(sets), dtype=torch.float64) for key in ("features", "output")}
        if group.name not in self.sides:
            return result  # nothing sums over it
        batch = self._batch(number)
        suffix = self._suffix(group)
        dead = batch.dense.dead(suffix, group, group.size)
        alive = [i for i, chosen in enumerate(sets) if not bool(dead[chosen].all())]
        step = self._side_by_side(batch, group) if alive else 1
        for part in (alive[at : at + step] for at in range(0, len(alive), step)):
            for i, losses in zip(part, self._losses(batch, group, [sets[i] for i in part]), strict=True):
                result["features"][i], result["output"][i] = losses
        return result

    # ------------------------------------------------------------ runs

    def _suffix(self, group: PruneGroup) -> Suffix:
        if group.name not in self._suffixes:
            view = self.views[group.name]
            looked_at = [self.nodes[n] for n in self._keep(view)] + (
                list(self.output.all_input_nodes) if self.measure.output else []
            )
            self._suffixes[group.name] = Suffix(self.sides[group.name], looked_at)
        return self._suffixes[group.name]

    def _keep(self, view: View) -> dict[str, bool]:
        """Values to look at, by name: True for what the node reads."""
        return {
            self.taps[z].at if self._by_mask(view, z) else self.taps[z].value: self._by_mask(view, z)
            for z in view.wanted
        }

    @staticmethod
    def _by_mask(view: View, z: int) -> bool:
        return view.masked and z == view.own

    def _batch(self, number: int) -> _Batch:
        if self._run is None or self._run[0] != number:
            keep = {tap.value for tap in self.taps} | {n.name for n in self.output.all_input_nodes}
            for group in self.reading:
                if group.name in self.sides:
                    keep |= self._suffix(group).frontier | {operand_source(s).name for s in self.sides[group.name]}
            self._run = (number, _Batch(self, DenseRun(self.program, self.batches[number], keep)))
        return self._run[1]

    def _side_by_side(self, batch: _Batch, group: PruneGroup) -> int:
        if self._stack is None:
            self._stack = batch.dense.symbolic()
            if not self._stack:
                self.notes.append("trajectory: removals run one by one: the graph was captured with a fixed batch")
        if self._stack and group.name not in self._checked:
            self._checked.add(group.name)
            try:
                batch.dense.stackable(self._suffix(group))
                if not self._tried:  # once per program: the longest suffix is the first to come
                    self._stack, self._tried = self._same(batch, group), True
                    if not self._stack:
                        self.notes.append("trajectory: removals run one by one: copies of the batch disturb each other")
            except (Unstackable, FxpruneError) as why:
                self._alone.add(group.name)
                line = str(why) if isinstance(why, Unstackable) else "copies of the batch do not run"
                self.notes.append(f"trajectory: removals from {group.name} run one by one: {line}")
        if not self._stack or group.name in self._alone:
            return 1
        return min(self.copies or CHUNK, copies_that_fit(batch.dense, self.memory), CHUNK)

    def _same(self, batch: _Batch, group: PruneGroup) -> bool:
        """Whether two copies side by side, one without the whole group and one dense, come out as they do alone."""
        everything, nothing = torch.arange(group.size), torch.arange(0)
        both = self._values(batch, group, [everything, nothing])
        alone = self._values(batch, group, [everything])[0]
        for got, want in zip(both, (alone, {}), strict=True):
            for key, value in got.items():
                if key not in want and not batch.holds(key):
                    continue  # the value of a node of which only what it reads is looked at
                single = want[key] if key in want else batch.value(key)
                close = {"rtol": 1e-3, "atol": 1e-4 * float(single.abs().max())} if value.is_floating_point() else {}
                if value.shape != single.shape or not torch.allclose(value, single, equal_nan=True, **close):
                    return False
        return True

    def _values(self, batch: _Batch, group: PruneGroup, variants: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Per variant, what it moved of the taps and outputs, by name (``<node> reads`` for masked operands)."""
        keep = self._keep(self.views[group.name])
        wanted = dict.fromkeys((n.name for n in self.output.all_input_nodes), False) if self.measure.output else {}
        moved = batch.dense.remove(self._suffix(group), group, variants, {**wanted, **keep})
        if len(variants) == 1:
            return [moved]
        split: list[dict[str, Tensor]] = [{} for _ in variants]
        for key, value in moved.items():
            name = key.removesuffix(" reads")
            if key != name:
                name = next(operand_source(s).name for s in self.sides[group.name] if s.operand.node.name == name)
            dim = batch.dense.batch_dim(name)
            if dim is None:
                raise Unstackable(f"{name} holds no samples")
            for part, each in zip(split, value.chunk(len(variants), dim), strict=True):
                part[key] = each
        return split

    def _losses(self, batch: _Batch, group: PruneGroup, sets: Sequence[Tensor]) -> Iterator[tuple[float, float]]:
        view = self.views[group.name]
        for values in self._values(batch, group, sets):
            features = 0.0
            for z in view.wanted:
                tap = self.taps[z]
                now = values.get(f"{tap.at} reads" if self._by_mask(view, z) else tap.value)
                if now is not None:  # else nothing moved it
                    dense, gram = batch.features[z]
                    features += self.measure.change(tap, self.measure.feature(tap, now, batch.mask), dense, gram)
            output = batch.output_moved(values) if self.measure.output else 0.0
            if features != features or output != output:
                raise not_finite(self.program, batch.dense.batch, f"what follows group {group.name}")
            yield features * batch.entries, output


class _Batch:
    """A dense run with its features and outputs."""

    def __init__(self, of: Removals, dense: DenseRun) -> None:
        self.of, self.dense = of, dense
        self.mask = padding_mask(of.program, dense.flat)
        rows = [of.measure.feature(t, dense.values[t.value], self.mask) for t in of.taps]
        self.features = [
            (f, f.T @ f if t.rows and len(f) >= f.shape[1] else None) for f, t in zip(rows, of.taps, strict=True)
        ]
        self.entries = of.measure.entries(of.taps[-1], rows[-1]) if of.taps else 1.0
        self.targets: list[Target] = self._targets({})

    def holds(self, name: str) -> bool:
        """Whether the dense value was kept."""
        return name.endswith(" reads") or name in self.dense.values

    def value(self, name: str) -> Any:
        """The dense value."""
        if name.endswith(" reads"):
            at = name.removesuffix(" reads")
            return self.dense.values[next(t.value for t in self.of.taps if t.at == at)]
        return self.dense.values[name]

    def output_moved(self, values: Mapping[str, Tensor]) -> float:
        """Mean over samples of how far the outputs moved."""
        if not any(n.name in values for n in self.of.output.all_input_nodes):
            return 0.0
        return float(output_change(self._targets(values), self.targets, self.of.measure.temperature).mean())

    def _targets(self, values: Mapping[str, Tensor]) -> list[Target]:
        def value(a: Any) -> Any:
            return values.get(a.name, self.dense.values[a.name]) if isinstance(a, Node) else a

        outputs = [value(a) for a in self.of.output.args[0]]
        return targets(self.of.program, outputs, self.dense.batch, self.dense.samples)
