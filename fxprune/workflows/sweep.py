"""``fxprune sweep``: one scoring, many budgets. What each is worth on samples kept for that, and which one to take."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artifact.artifact import Artifact
from ..artifact.files import check_destination, check_files, read_report
from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.memory import within
from ..data.sources import load_data
from ..driver.apply import give_plan
from ..driver.decide import decide_on, prepare, score
from ..driver.finish import finish
from ..driver.judge import Judge
from ..driver.run import Inputs, Model, Run, open_model
from ..errors import BudgetInfeasible, LoadError, OptionError
from ..ir.cost import COUNTED, Budget, CostModel
from ..ir.plan import CompressionPlan
from ..process import jobs
from ..process.events import Event, OnEvent, Transcript, warn_only
from ..process.files import write_text
from ..process.jobs import resumable
from ..process.silence import silence
from ..report.render import measure_of
from ..request.goal import Wish
from ..request.invocation import Invocation
from ..request.limits import FLOOR, Align, Floor
from ..request.options import Judging, Timing

RESULT, PAGE, VERSION = "sweep.json", "sweep.html", 1
DENSE = "dense"
FINEST = 0.01  # bisection ends where two ratios are this close


@dataclass
class Sweep:
    """One sweep: the scored model, what it is judged on, and the points so far.

    point  one ratio as plain data: ratio, cost, figures, drop and artifact (its directory), or ``infeasible``: why not
    """

    scored: Run
    goal: Wish
    held: Calibration
    judge: Judge
    out: Path
    key: str
    points: list[dict[str, Any]] = field(default_factory=list)

    def try_(self, budget: Budget) -> dict[str, Any]:
        """The point of a budget: found where an earlier run of this sweep left it, else made."""
        place = self.out / f"{budget.amount:g}"
        point = self._found(place, budget)
        if point is None:
            self.scored.tell.stage(f"{budget.metric} {budget.amount:g}")
            try:
                with resumable(place, self.scored.tell.on_event):
                    point = self._made(place, budget)
            except BudgetInfeasible as error:
                point = {"ratio": budget.amount, "infeasible": str(error)}
                self.scored.tell.warn(f"{budget} is out of reach: {error.why or error.what}")
        self.points.append(point)
        return point

    def _found(self, place: Path, budget: Budget) -> dict[str, Any] | None:
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

    def _made(self, place: Path, budget: Budget) -> dict[str, Any]:
        check_destination(place)
        request = replace(self.scored.request, options={**self.scored.request.options, budget.metric: budget.amount})
        run = replace(self.scored, request=request, tell=self.scored.tell.branch())
        goal = self.goal.at(budget)
        artifact = finish(decide_on(run, goal).recovered(goal.recovery))
        with silence():
            figures = self.judge.of(artifact.program)
        artifact.report["sweep"] = {"key": self.key, "ratio": budget.amount, "figures": figures}
        run.tell.stage(f"lower to {request.target}, verify and save")
        with silence():
            artifact.save(place)
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

    def chosen(self, most: float) -> dict[str, Any] | None:
        """The point of least cost within the drop."""
        within = [p for p in self.points if "drop" in p and p["drop"] <= most]
        return min(within, key=lambda p: (p["cost"][self.metric], p["ratio"]), default=None)

    @property
    def metric(self) -> str:
        assert self.goal.budget is not None
        return self.goal.budget.metric


def sweep(
    model: Model,
    example_inputs: Inputs = None,
    *,
    ratios: Sequence[Budget],
    judging: Judging | None = None,
    timing: Timing | None = None,
    sensitive: bool = False,
    target: str = "eager",
    data: Any,
    importance: str | None = None,
    out: str | os.PathLike[str],
    prune: Any = None,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = FLOOR,
    allow_empty: bool = False,
    samples: int = 128,
    seed: int = 0,
    recover: str | None = None,
    rounds: int = 1,
    head_scale: float | str = 1.0,
    members: str = "auto",
    rearrange: int = 0,
    tokens: str | None = None,
    unmerge: bool = False,
    search: str = "auto",
    memory: float | str | None = None,
    checkpoint: Any = None,
    trust_pickle: bool = False,
    on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """Score once; search, recover, lower, verify and judge per ratio; time all; pick one.

    ratios     of :func:`fxprune.request.budget.budgets`;  judging, timing: see :mod:`fxprune.request.options`
    sensitive  also what each layer alone does
    out        a directory: an artefact per ratio under its number, ``sweep.json`` (what is returned) and ``sweep.html``

    Other options as in :func:`fxprune.compile`; of ``rounds`` the first is scored once for all ratios. Budgets of time,
    tiles and pipelines are compiled one by one (``fxprune sweep --help`` says why).

    Interrupted, the same call goes on: finished scoring and finished points are taken up where model, data and options
    are the same. Raises OptionError without data, and as ``compile`` does; a ratio out of reach is a point saying so.
    """
    given = locals()
    judging, timing, out = judging or Judging(), timing or Timing(), Path(out)
    if data is None:
        raise OptionError(
            "a sweep needs data",
            where="--data",
            why="every ratio is judged on samples of it",
            cure="give `--data`, with labels if there are any",
        )
    first, held_out = ratios[0], judging.held_out if judging.data is None else 0.0
    # a point is what compile makes of these options
    asked = {**given, first.metric: first.amount, "out": None, "held_out": held_out}
    request, tell = Invocation.of("compile", asked).request, Transcript(on_event)
    request = replace(request, options={**request.options, first.metric: None})
    goal = request.goal
    assert goal is not None
    with _owned(out), within(memory), resumable(out, on_event):
        opened = open_model(
            request, tell, model, example_inputs, checkpoint=checkpoint, trust_pickle=trust_pickle, data=data
        )
        made = _prepared(Run.of(request, opened, tell), goal, judging, out)
        measured = None
        if sensitive:
            from .sensitivity import sensitivity

            tell.stage("measure sensitivity")
            with silence():
                measured = sensitivity(made.scored.program, made.judge.batches, goal.group_kinds)
        for budget in ratios:
            made.try_(budget)
        if judging.max_drop is not None:
            made.narrow(made.metric, judging.max_drop, judging.bisect)
        made.points.sort(key=lambda p: -p["ratio"])
        timings = _timed(made, timing) if timing.seconds > 0 else []
        result = _result(made, judging, timings, measured)
        _write(out, result)
    return result


def _prepared(run: Run, goal: Wish, judging: Judging, out: Path) -> Sweep:
    held, request = run.opened.held, run.request
    if judging.data is not None:
        held = load_data(judging.data, run.opened.source, samples=judging.samples, seed=run.seed)
    assert held is not None
    run = prepare(replace(run, opened=replace(run.opened, held=held)), goal)
    about = [str(goal.made), repr(replace(goal, budget=None)), repr(judging.data), request.target, repr(request.limits)]
    jobs.identify(lambda: fingerprint(run.program, run.data, run.seed, about))
    key = fingerprint(run.program, run.data, run.seed, [*about, _held(held)])
    scored = score(run, goal)
    with silence():
        judge = Judge(scored.program, held.batches)
    if judge.samples < 100:
        run.tell.warn(
            f"ratios are judged on {judge.samples} samples only: one of them is {1 / judge.samples:.3f} of the "
            "measure; give more `--samples`, or `--judge`"
        )
    return Sweep(scored, goal, held, judge, out, key)


def _held(data: Calibration) -> str:
    """A hash of the samples that points are judged on."""
    from torch import Tensor

    digest = hashlib.sha256()
    for batch in data.batches:
        for value in (*batch.args, *batch.kwargs.values(), batch.labels):
            if isinstance(value, Tensor):
                digest.update(repr((value.dtype, value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _timed(made: Sweep, timing: Timing) -> list[dict[str, Any]]:
    """Latency of every point's file and of the dense one, all in turns, per batch size."""
    from ..artifact.delivered import record, row_of
    from ..target.clock import reading
    from ..target.timing import sampled
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
        samples, counts = sampled(calls, seconds=timing.seconds * len(calls))
        for name in folders:
            macs = read[name].report["cost"]["ratio"]["flops"]
            told[name].append(row_of(reading(samples[DENSE], samples[name]), batch, 0, macs, "sweep"))
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


def _result(made: Sweep, judging: Judging, timings: list[dict[str, Any]], measured: Any) -> dict[str, Any]:
    from ..process.environment import environment

    dense = CostModel(made.scored.program)()
    chosen = None if judging.max_drop is None else made.chosen(judging.max_drop)
    figures: dict[str, float] = next((p["figures"] for p in made.points if "figures" in p), {})
    return {
        "fxprune_sweep": VERSION,
        "name": made.scored.opened.name,
        "target": made.scored.request.target,
        "metric": made.metric,
        "measure": measure_of(figures),
        "dense": {"cost": vars(dense), "value": made.dense_value},
        "judged": {
            "origin": made.held.origin,
            "samples": made.judge.samples,
            "resolution": 1 / max(made.judge.samples, 1),
        },
        "max_drop": judging.max_drop,
        "chosen": None if chosen is None else chosen["artifact"],
        "points": made.points,
        "latency": timings,
        "environment": environment(),
        "sensitivity": measured,
        "importance": str(made.goal.made),
        "recover": made.goal.recover,
        "seed": made.scored.seed,
        "counted": COUNTED,
        "notes": list(dict.fromkeys(made.scored.tell.notes)),
    }


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Make the directory, or find that it is one of ours; a failure before the first point leaves none behind.

    Raises OptionError for somebody else's.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(
            "the output is a directory, but a file lies there", where=str(out), cure="choose another `--out`"
        )
    there = out.exists()
    if there and any(out.iterdir()):
        try:
            told = json.loads((out / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            told = None
        if not isinstance(told, dict) or told.get("fxprune_sweep") != VERSION:
            raise OptionError(
                "the directory is not empty and no sweep wrote it, so it is left alone",
                where=str(out),
                cure="choose another `--out`",
            )
        yield
        return
    write_text(out / RESULT, json.dumps({"fxprune_sweep": VERSION, "points": []}) + "\n")
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if [p.name for p in out.iterdir()] == [RESULT]:
                (out / RESULT).unlink()
                if not there:
                    out.rmdir()
        raise


def _write(out: Path, result: dict[str, Any]) -> None:
    from ..report.sweep import render

    write_text(out / PAGE, render(result))
    write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
