"""The points of a sweep: made, judged, found again, and timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artifact.artifact import Artifact
from ..artifact.files import check_destination, check_files, read_report
from ..data.batch import Calibration
from ..driver.apply import give_plan
from ..driver.decide import Decided
from ..driver.decide_among import Known, carry_through, decide_among
from ..driver.finish import finish
from ..driver.judge import AgreementEvaluator
from ..driver.run import Run
from ..errors import BudgetInfeasible, LoadError
from ..ir.cost import Budget
from ..ir.plan import CompressionPlan
from ..process.events import Event, Transcript
from ..process.jobs import resumable
from ..process.silence import silence
from ..report.headline import measure_of
from ..request.goal import Goal
from ..request.options import Timing

DENSE = "dense"
FINEST = 0.01  # bisection ends where two ratios are this close


@dataclass
class Sweep:
    """One sweep: the scored model, what it is judged on, and the points so far.

    base   the opened model, which every point begins with;  known: what was scored of it, by kinds and criterion
    point  one ratio as plain data: ratio, cost, figures, drop and artifact (its directory), or ``infeasible``: why not
    """

    base: Run
    scored: Run
    goal: Goal
    held: Calibration
    judge: AgreementEvaluator
    out: Path
    key: str
    known: Known = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)

    def try_(self, budget: Budget) -> dict[str, Any]:
        """The point of a budget: found where an earlier run of this sweep left it, else made."""
        place = self.out / f"{budget.amount:g}"
        point = self._find_point(place, budget)
        if point is None:
            self.scored.tell.stage(f"{budget.metric} {budget.amount:g}")
            try:
                with resumable(place, self.scored.tell.on_event):
                    point = self._make_point(place, budget)
            except BudgetInfeasible as error:
                point = {"ratio": budget.amount, "infeasible": str(error)}
                self.scored.tell.warn(f"{budget} is out of reach: {error.why or error.what}")
        self.points.append(point)
        return point

    def _find_point(self, place: Path, budget: Budget) -> dict[str, Any] | None:
        try:
            report = read_report(place)
            told = report.get("sweep")
            if not isinstance(told, dict) or told.get("key") != self.key or told.get("ratio") != budget.amount:
                return None
            check_files(place, report)
            point = self._point(place, budget, report)
        except (LoadError, KeyError, TypeError, AttributeError):  # none there, or damaged: it is made again
            return None
        self.scored.tell.on_event(Event("note", f"{budget} was finished before: {place}"))
        return point

    def _make_point(self, place: Path, budget: Budget) -> dict[str, Any]:
        check_destination(place)
        request = replace(self.scored.request, options={**self.scored.request.options, budget.metric: budget.amount})
        run = replace(self.base, request=request, tell=self.scored.tell.branch())
        goal = self.goal.at(budget)

        def write(found: Decided) -> Artifact:
            artifact = finish(found.recover(goal.recovery))
            with silence():
                figures = self.judge.of(artifact.program)
            artifact.report["sweep"] = {"key": self.key, "ratio": budget.amount, "figures": figures}
            run.tell.stage(f"lower to {request.target}, verify and save")
            with silence():
                artifact.save(place)
            return artifact

        artifact = carry_through(decide_among(run, goal, self.known), write)
        return self._point(place, budget, artifact.report)

    def _point(self, place: Path, budget: Budget, report: dict[str, Any]) -> dict[str, Any]:
        figures = report["sweep"]["figures"]
        return {
            "ratio": budget.amount,
            "artifact": place.name,
            "cost": report["cost"]["compressed"],
            "share": report["cost"]["ratio"],
            "figures": figures,
            "drop": self.drop(figures),
            "recovery": (report.get("recovery") or {}).get("method", "none"),
        }

    @property
    def dense_value(self) -> float:
        """The dense model's own measure: 1 where the measure is an agreement with it."""
        return 1.0 if self.judge.accuracy is None else self.judge.accuracy

    def drop(self, figures: dict[str, float]) -> float:
        """How much of the measure is lost; negative where the smaller model does better."""
        return self.dense_value - figures[measure_of(figures)]

    def narrow(self, metric: str, most: float, steps: int) -> None:
        """Halve the gap between the smallest ratio within the drop and the largest below it that is not."""
        for _ in range(steps):
            good = min((p["ratio"] for p in self.points if "drop" in p and p["drop"] <= most), default=1.0)
            bad = max((p["ratio"] for p in self.points if p["ratio"] < good), default=0.0)
            middle = round((good + bad) / 2, 4)
            if not bad or good - bad <= FINEST or middle in (good, bad):
                return
            self.try_(Budget(metric, middle))

    def choose(self, most: float) -> dict[str, Any] | None:
        """The point of least cost within the drop."""
        within = [p for p in self.points if "drop" in p and p["drop"] <= most]
        return min(within, key=lambda p: (p["cost"][self.metric], p["ratio"]), default=None)

    @property
    def metric(self) -> str:
        assert self.goal.budget is not None
        return self.goal.budget.metric


def time_points(made: Sweep, timing: Timing) -> list[dict[str, Any]]:
    """Latency of every point's file and of the dense one, all in turns, per batch size."""
    from ..artifact.delivered import record, row_of
    from ..target.clock import pair_latencies
    from ..target.timing import sample_times
    from ..target.timing import timing as timing_of
    from .bench import call_at, runner_of

    folders = [p["artifact"] for p in made.points if "artifact" in p]
    if not folders:
        return []
    made.scored.tell.stage("measure latency of all")
    dense = made.out / DENSE
    if not _same(dense, made.key):
        scored = made.scored
        request = replace(scored.request, options={})
        opened = replace(scored.opened, data=None, held=None)
        run = replace(scored, request=request, opened=opened, data=None, tell=Transcript(scored.tell.on_event))
        with silence():
            artifact = finish(give_plan(run.but(tokens=None), CompressionPlan()))
            artifact.report["sweep"] = {"key": made.key}
            artifact.save(dense)
    read = {name: Artifact.read(made.out / name) for name in [DENSE, *folders]}
    runners = {name: (a.program, runner_of(a)) for name, a in read.items()}
    rows, told = [], {name: list[dict[str, Any]]() for name in folders}
    for batch in timing.batches:
        calls: dict[str, Callable[[], Any]] = {n: call_at(program, run, batch) for n, (program, run) in runners.items()}
        samples, counts = sample_times(calls, seconds=timing.seconds * len(calls))
        for name in folders:
            macs = read[name].report["cost"]["ratio"]["flops"]
            told[name].append(row_of(pair_latencies(samples[DENSE], samples[name]), batch, 0, macs, "sweep"))
        rows.append(
            {
                "batch": batch,
                "timings": {
                    name: {
                        **timing_of(values, counts[name], batch).to_dict(),
                        **({} if name == DENSE else {k: told[name][-1][k] for k in ("ratio", "error", "realised")}),
                    }
                    for name, values in samples.items()
                },
            }
        )
    for name in folders:
        record(made.out / name, told[name], read[name].backend, read[name].program)
    return rows


def _same(place: Path, key: str) -> bool:
    try:
        told = read_report(place).get("sweep")
    except LoadError:
        return False
    return isinstance(told, dict) and told.get("key") == key
