"""``fxprune sweep``: one scoring, many budgets. What each is worth on samples kept for that, and which one to take."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.memory import memory_limit
from ..driver.api import open_run
from ..driver.decide import prepare, score_as_able
from ..driver.decide_among import Known
from ..driver.judge import AgreementEvaluator
from ..driver.run import Inputs, Model, Run, load_more
from ..errors import OptionError
from ..ir.cost import COUNTED, METRICS, Budget, CostModel
from ..ir.group import Kind
from ..process import jobs
from ..process.events import OnEvent, Transcript, warn_only
from ..process.files import write_text
from ..process.jobs import resumable
from ..process.silence import silence
from ..report.headline import measure_of
from ..request.goal import Goal
from ..request.invocation import Invocation
from ..request.limits import Align, Floor
from ..request.options import Judging, Timing
from .points import Sweep, time_points

RESULT, PAGE, VERSION = "sweep.json", "sweep.html", 1


def budgets(text: dict[str, Any]) -> list[Budget]:
    """The one metric with its ratios, largest first. Raises OptionError for none, several, or amounts."""
    given = {name: value for name, value in text.items() if value is not None}
    if len(given) != 1:
        raise OptionError(
            "give the ratios of exactly one budget",
            where=", ".join(f"--{n} {v}" for n, v in given.items()),
            why=f"found {len(given)} of {', '.join(METRICS)}",
            cure="for example `--flops 0.9,0.75,0.5`",
        )
    metric, value = next(iter(given.items()))
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    made = [Budget.parse(metric, word) for word in words if str(word).strip()]
    if not made or not all(b.relative for b in made):
        raise OptionError(
            "a sweep takes ratios", where=f"--{metric} {value}", cure=f"for example `--{metric} 0.9,0.75,0.5`"
        )
    return sorted(dict.fromkeys(made), key=lambda b: -b.amount)


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
    floor: Floor = None,
    allow_empty: bool = False,
    samples: int | str = "auto",
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
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """Score once; search, recover, lower, verify and judge per ratio; time all; pick one.

    ratios     of :func:`budgets`;  judging, timing: see there;  sensitive: also what each layer alone does
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
    invoked, tell = Invocation.of("compile", asked), Transcript(on_event)
    request = replace(invoked.request, options={**invoked.request.options, first.metric: None})
    goal = request.goal
    assert goal is not None
    with _own(out), memory_limit(memory), resumable(out, on_event):
        made = _prepare(open_run(invoked, request, tell), goal, judging, out)
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
        timings = time_points(made, timing) if timing.seconds > 0 else []
        result = _result(made, judging, timings, measured)
        _write(out, result)
    return result


def measure_sensitivity(
    model: Model,
    example_inputs: Inputs = None,
    *,
    shares: Sequence[float] = (0.75, 0.5, 0.25),
    data: Any,
    importance: str = "trajectory",
    prune: Any = None,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = None,
    allow_empty: bool = False,
    samples: int = 64,
    seed: int = 0,
    memory: float | str | None = None,
    checkpoint: Any = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """:func:`fxprune.workflows.sensitivity.sensitivity` of a model, scored by ``importance`` on the same data."""
    from .sensitivity import sensitivity

    invoked, tell = Invocation.of("sensitivity", locals()), Transcript(on_event)
    goal = invoked.request.goal
    assert goal is not None
    with memory_limit(memory), resumable(None, on_event):
        begun = open_run(invoked, invoked.request, tell)
        batches = begun.data.batches if begun.data is not None else ()
        run, parts = prepare(begun, goal), []
        others = [k for k in goal.kinds if str(k) != str(Kind.BLOCK)]
        if others:
            parts.append((score_as_able(run, goal)[0], others))
        if len(others) < len(goal.kinds):
            parts.append((_with_tiles(run, goal), [Kind.BLOCK]))
        tell.stage("measure sensitivity")
        with silence():
            found = [sensitivity(scored.program, batches, kinds, shares) for scored, kinds in parts]
    joined = {key: [one for part in found for one in part[key]] for key in ("groups", "kinds", "frozen")}
    return {"name": begun.opened.name, "importance": str(goal.scorer), **found[0], **joined}


def _with_tiles(run: Run, goal: Goal) -> Run:
    """The run with the tiles of its dense program as groups, scored by the goal's criterion where that scores tiles."""
    from ..passes.analysis.find_blocks import FindBlocks
    from ..passes.analysis.score_groups import ScoreGroups

    return run.through(FindBlocks(), ScoreGroups(goal.scorer if goal.scorer.scores_tiles else "lsp", seed=run.seed))


def _prepare(run: Run, goal: Goal, judging: Judging, out: Path) -> Sweep:
    held, request = run.opened.held, run.request
    if judging.data is not None:
        held = load_more(run.tell, run.opened, judging.data, judging.samples, run.seed)
    assert held is not None
    base = replace(run, opened=replace(run.opened, held=held))
    run, plain = prepare(base, goal), replace(goal, wider=(), rival=False)
    about = [
        str(goal.scorer),
        repr(replace(goal, budget=None)),
        repr(judging.data),
        request.target,
        repr(request.limits),
    ]
    jobs.identify(lambda: fingerprint(run.program, run.data, run.seed, about))
    key = fingerprint(run.program, run.data, run.seed, [*about, _digest_of(held)])
    scored, plain = score_as_able(run, plain)
    with silence():
        judge = AgreementEvaluator(scored.program, held.batches)
    if judge.samples < 100:
        run.tell.warn(
            f"ratios are judged on {judge.samples} samples only: one of them is {1 / judge.samples:.3f} of the "
            "measure; give more `--samples`, or `--judge`"
        )
    known: Known = {(tuple(map(str, goal.kinds)), goal.criterion): (scored, plain)}
    return Sweep(base, scored, goal, held, judge, out, key, known)


def _digest_of(data: Calibration) -> str:
    """A hash of the samples that points are judged on."""
    from torch import Tensor

    digest = hashlib.sha256()
    for batch in data.batches:
        for value in (*batch.args, *batch.kwargs.values(), batch.labels):
            if isinstance(value, Tensor):
                digest.update(repr((value.dtype, value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _result(made: Sweep, judging: Judging, timings: list[dict[str, Any]], measured: Any) -> dict[str, Any]:
    from ..process.environment import environment

    dense = CostModel(made.scored.program)()
    chosen = None if judging.max_drop is None else made.choose(judging.max_drop)
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
        "importance": str(made.goal.scorer),
        "recover": made.goal.recover,
        "seed": made.scored.seed,
        "counted": COUNTED,
        "notes": list(dict.fromkeys(made.scored.tell.notes)),
    }


@contextmanager
def _own(out: Path) -> Iterator[None]:
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
