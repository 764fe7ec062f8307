"""Measuring for tools/bench/accuracy.py: scores once per criterion and seed, a plan per ratio, recovery per plan.

A measurement is known by its key: everything that decides its figure but the code. What a results file already holds
under a key is not measured again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fxprune
from bench.accuracy.rows import Row, criterion_of, rearrange_pass
from bench.accuracy.tasks import Task, of_module, of_program
from bench.record import commit, describe_error
from fxprune.data import Calibration
from fxprune.data.memory import split_to_fit
from fxprune.driver.decide import searching
from fxprune.driver.members import in_doubt, is_obs_nearer
from fxprune.errors import FxpruneError
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.criterion import Criterion
from fxprune.passes.analysis.rank_within import RankWithin
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.choose import Verdict
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.process.silence import quiet

FACTS = ("axes", "groups", "scores", "plan")
Record = dict[str, Any]
KEY = (
    "task",
    "row",
    "criterion",
    "rearrange",
    "recover",
    "labels",
    "variant",
    "ratio",
    "seed",
    "samples",
    "score_samples",
    "align",
    "weights",
)


def key(record: Record) -> tuple[Any, ...]:
    """What a measurement is known by."""
    return tuple(record.get(name) for name in KEY)


@dataclass(frozen=True)
class _Scored:
    """A program scored once: by what, on which data; all data, which recovery sees; who chooses members."""

    program: Program
    criterion: Criterion
    data: Calibration
    all: Calibration
    members: RankWithin
    seconds: float


@dataclass(frozen=True)
class _Planned:
    """A plan at a ratio, and the seconds it took."""

    program: Program
    scored: _Scored
    seconds: float

    @property
    def data(self) -> Calibration:
        return self.scored.all


@dataclass
class Bench:
    """One task on its way through the rows.

    samples, score_samples   calibration samples of recovery and of scoring
    save       called with all records after every measurement
    records    of this task, those of earlier runs included
    """

    task: Task
    samples: int
    score_samples: int
    align: int
    save: Callable[[Sequence[Record]], None]
    say: Callable[[str], None] = print
    records: list[Record] = field(default_factory=list)
    _scored: dict[Any, _Scored] = field(default_factory=dict)
    _verdicts: dict[int, tuple[Program, Verdict]] = field(default_factory=dict)  # by the identity of the program
    _planned: dict[Any, _Planned] = field(default_factory=dict)
    _peers: dict[int, Any] = field(default_factory=dict)

    def run(self, rows: Sequence[Row], ratios: Sequence[float], seeds: Sequence[int]) -> None:
        """Measure what is not measured yet, seed by seed. A method that fails leaves a record that says why."""
        for seed in seeds:
            self._scored.clear()
            self._planned.clear()
            for row in rows:
                if (row.seeded or seed == seeds[0]) and not (row.only_labelled and not self.task.labelled):
                    for ratio in ratios:
                        for variant in self._variants(row, ratio, seed, seeds[0]):
                            self._one(row, ratio, seed, variant)

    def _variants(self, row: Row, ratio: float, seed: int, first: int) -> Iterator[str]:
        """All settings of a peer at the first seed, the one that did best there at the others."""
        if not row.variants or seed == first:
            yield from row.variants or ("",)
            return
        wanted = {key(self._blank(row, ratio, first, v)): v for v in row.variants}
        known = {wanted[key(r)]: r["accuracy"] for r in self.records if key(r) in wanted and "accuracy" in r}
        if known:
            yield max(known, key=lambda v: known[v])

    def _blank(self, row: Row, ratio: float, seed: int, variant: str) -> Record:
        labels = row.labels and (row.peer or self.task.labelled)
        return {
            "task": self.task.name,
            "row": row.name,
            "criterion": row.criterion,
            "rearrange": row.rearrange,
            "recover": row.recover,
            "labels": labels,
            "variant": variant,
            "ratio": ratio,
            "seed": seed,
            "samples": self.samples if row.recover != "none" or row.rearrange else None,
            "score_samples": self.score_samples if row.seeded else None,
            "align": self.align,
            "weights": self.task.about.get("weights"),
        }

    def _one(self, row: Row, ratio: float, seed: int, variant: str) -> None:
        record = self._blank(row, ratio, seed, variant)
        held = next((r for r in self.records if key(r) == key(record)), None)
        if held is not None and "accuracy" in held:
            return
        started = time.perf_counter()
        try:
            if row.product:
                record |= self._product(row, ratio, seed)
            else:
                record |= self._peer(row, ratio, seed, variant) if row.peer else self._ours(row, ratio, seed)
        except FxpruneError as error:  # such as a budget below what the floors leave: that is a result
            record["error"] = describe_error(error)
        except Exception as error:
            if not row.peer:
                raise
            record["error"] = describe_error(error)  # the peer does not take this model, or not with this setting
        record |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit()}
        self.records = [r for r in self.records if key(r) != key(record)] + [record]
        figure = f"{record['accuracy']:6.2f}" if "accuracy" in record else record["error"][:60]
        done = f" -> {record['method']}" if record.get("method") not in (None, row.recover) else ""
        self.say(
            f"{self.task.name} {row.name}{' ' + variant if variant else ''} at {ratio:g}, seed {seed}: "
            f"{figure} ({record['seconds']} s){done}"
        )
        self.save(self.records)

    def _ours(self, row: Row, ratio: float, seed: int) -> Record:
        planned = self.plan(row, ratio, seed)
        program = planned.program
        if row.rearrange:
            program = Pipeline((rearrange_pass(planned.scored.data, seed),), start=FACTS).run(program)
        result: Record = {"score_seconds": round(planned.scored.seconds, 1), "plan_seconds": round(planned.seconds, 1)}
        started = time.perf_counter()
        recover = Recover(method=row.recover, seed=seed, data=planned.data)
        with quiet():
            if row.recover in ("auto", "tune"):  # which have that in common
                if id(program) not in self._verdicts:
                    self._verdicts[id(program)] = program, recover.judge(program)
                recover = replace(recover, verdict=self._verdicts[id(program)][1])
            changed, (found,) = Pipeline((recover,), start=FACTS[:2] + FACTS[3:]).apply(program)
        if found.record is not None:
            done = found.record.record()
            result |= {
                "recover_seconds": round(time.perf_counter() - started, 1),
                **{k: done[k] for k in ("method", "rel", "refit_rel") if k in done},
            }
        counts = {
            g.axis: len(program.need("plan").choices[g.name].keep)
            for g in program.need("groups")
            if g.name in program.need("plan").choices
        }
        small = SliceAxes().run(changed)
        return {
            **result,
            "macs": CostModel(program)(counts).flops,
            "accuracy": round(self.task.accuracy(of_program(small)), 3),
        }

    def _product(self, row: Row, ratio: float, seed: int) -> Record:
        """As users run it. Nothing is held back of the calibration samples: what judges here is the task."""
        one = self.task.example()
        two = one.pick(torch.tensor([0, 0]))
        started = time.perf_counter()
        with quiet():
            small = fxprune.compile(
                self.task.eager(),
                two.args or dict(two.kwargs),
                flops=ratio,
                data=self.task.calibration(self.samples, seed),
                align=self.align,
                recover=row.recover,
                seed=seed,
                seconds=0,
                held_out=0,
                on_event=lambda _: None,
            )
        took, report = time.perf_counter() - started, small.report
        kinds = Counter(g["kind"] for g in report["groups"] if g.get("kept", g["size"]) < g["size"])
        return {
            "compile_seconds": round(took, 1),
            "method": (report.get("recovery") or {}).get("method", "none"),
            "cut": dict(kinds),
            "macs": report["cost"]["compressed"]["flops"],
            "accuracy": round(self.task.accuracy(of_program(small.program)), 3),
        }

    def plan(self, row: Row, ratio: float, seed: int) -> _Planned:
        """As the product does it: before a recovery that fits weights, OBS chooses the members.

        Rows that differ in their recovery alone share plan and data, and what ``auto`` and ``tune`` have in common.
        """
        labels = row.labels and self.task.labelled
        by_obs = row.recover not in ("none", "scale") and row.criterion != "obs"
        key = (row.criterion, labels, by_obs, ratio)
        if key in self._planned:
            return self._planned[key]
        if (row.criterion, labels) not in self._scored:
            started, criterion = time.perf_counter(), criterion_of(row.criterion)
            data = split_to_fit(self.task.program, self.task.calibration(self.score_samples, seed, labels))
            program = ScoreGroups(criterion, data, seed).run(self.task.program)
            self._scored[row.criterion, labels] = _Scored(
                program,
                criterion,
                data,
                split_to_fit(self.task.program, self.task.calibration(self.samples, seed)),
                RankWithin(data=data),
                time.perf_counter() - started,
            )
        scored = self._scored[row.criterion, labels]
        started = time.perf_counter()
        program = self._search(scored, ratio, seed, None)
        if by_obs:
            ranked = self._search(scored, ratio, seed, scored.members)
            finders = (FindGroups(align=self.align),)
            doubt = in_doubt(program)
            taken = not doubt or is_obs_nearer(program, ranked, finders, scored.data, seed)[0]
            program = ranked if taken else program
        self._planned[key] = _Planned(program, scored, time.perf_counter() - started)
        return self._planned[key]

    def _search(self, scored: _Scored, ratio: float, seed: int, members: RankWithin | None) -> Program:
        passes = searching(SearchPlan(Budget("flops", ratio)), scored.criterion, seed, members)
        passes = [replace(p, data=scored.data) if "data" in p.takes else p for p in passes]
        return Pipeline(tuple(passes), start=FACTS[:3]).run(scored.program)

    def _peer(self, row: Row, ratio: float, seed: int, variant: str) -> Record:
        from peers.torch_pruning import TorchPruning, macs

        task = self.task
        if seed not in self._peers:
            ours, theirs = CostModel(task.program)().flops, macs(task.eager(), task.example())
            if ours != theirs:
                raise ValueError(f"fxprune counts {ours} MACs of the dense model, torch {theirs}")
            self._peers[seed] = TorchPruning(
                task.eager, task.example(), lambda model: task.losses(model, self.score_samples, seed)
            )
        pruned = self._peers[seed].prune(row.criterion, variant, ratio)
        return {
            "macs": pruned.macs,
            "setting": pruned.setting,
            "accuracy": round(task.accuracy(of_module(pruned.model)), 3),
        }


def summary(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Record]]]:
    """task -> row -> ratio -> mean, min, max, std over seeds and the seeds; of a peer's settings, the best at the
    first seed."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    cells: dict[tuple[str, str, float], list[Record]] = {}
    for record in records:
        if "accuracy" in record:
            cells.setdefault((record["task"], record["row"], record["ratio"]), []).append(record)
    for (task, row, ratio), here in sorted(cells.items(), key=lambda item: -item[0][2]):
        first = min(r["seed"] for r in here)
        best = max((r for r in here if r["seed"] == first), key=lambda r: r["accuracy"])
        values = [r["accuracy"] for r in here if r["variant"] == best["variant"]]
        mean = sum(values) / len(values)
        cell = {
            "mean": round(mean, 3),
            "min": min(values),
            "max": max(values),
            "std": round((sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5, 3),
            "seeds": sorted(r["seed"] for r in here if r["variant"] == best["variant"]),
        }
        if best["variant"]:
            cell["variant"] = best["variant"]
        found.setdefault(task, {}).setdefault(row, {})[f"{ratio:g}"] = cell
    return found
