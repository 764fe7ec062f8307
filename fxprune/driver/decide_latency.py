"""Budgets of latency: the table, a search by it, the plan measured, and the search again where it misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetInfeasible, OptionError
from ..ir.axis import Axis
from ..ir.cost import Budget, CostModel
from ..ir.plan import TokenPlan
from ..ir.program import Program
from ..process import ranks
from ..process.events import Event
from ..process.silence import silence
from ..request.latency import FILE, MISS
from ..request.limits import per_pattern
from ..target.clock import Clock, PairedLatency, device_of
from ..target.latency_table import LatencyTable, Setting, find_table_path, fingerprint, reducer_key, setting_of
from .decide_tokens import check_sites
from .measure_latency import lowerable, measure_table, measure_tokens
from .run import Run, count_kept, reduce_tokens

if TYPE_CHECKING:
    from ..passes.search.latency_model import LatencyModel
    from ..request.goal import Goal

ROUNDS = 3
SLOWER, NO_FASTER = 0.8, 0.97  # of what MACs promise; of the dense latency
NS_PER_MS = 1e6


@dataclass(frozen=True)
class KnownLatency:
    """What a run knows about latency.

    table      that the plan follows from, or that predicts what it takes; None where nothing was measured
    rounds     of search and measurement, as plain data
    alignment  what the table was measured to like, where that was asked for
    """

    table: LatencyTable | None = None
    rounds: tuple[Mapping[str, Any], ...] = ()
    alignment: Mapping[str, Any] | None = None


def attach_latency_table(run: Run, goal: Goal) -> tuple[Run, Goal, KnownLatency]:
    """(the run with its groups aligned as the table likes, where that is asked; the goal with the table it needs; what
    is then known).

    Measures, unless a table is given or kept; without need it only takes the one that is kept. Where tokens take part,
    the table has rows of their reducer as well.
    """
    asked, program = run.request.latency, run.program
    if goal.tokens is not None:
        check_sites(program, goal.tokens)  # before anything is measured
    budgeted = goal.budget is not None and goal.budget.metric == "latency"
    table = (
        LatencyTable.read(asked.table)
        if asked.table
        else _obtain_table(run, goal, must=budgeted or asked.expect or asked.align)
    )
    if table is None:
        return run, goal, KnownLatency()
    if asked.table:
        table.check(program)
        if goal.tokens is not None:
            table.check_tokens(program, TokenPlan(goal.tokens.reducer, {}, goal.tokens.unmerge))
    alignment = None
    if asked.align:
        from ..passes.search.latency_model import find_multiple

        request = run.request
        best, why = find_multiple(table)
        step = best or request.backend.granularity
        alignment = {"multiples_of": step, "why": why}
        others = per_pattern(request.limits.align, "--align")[1]
        limits = replace(request.limits, align=[step, *others])
        run = replace(run, find_groups=limits.find_groups(request.backend.granularity))
        run = run.through(*run.finders)
    return run, replace(goal, table=table if budgeted else None), KnownLatency(table, (), alignment)


def recall_latency_table(run: Run, budget: Budget | None, kept: bool = True) -> KnownLatency:
    """The table by which a pipeline that runs again predicts its latency: the one that is given, else (``kept``) the
    one that is kept here, as the first run took it. Nothing is measured; where time was the budget, what is therefore
    not known is said.

    The run's program is dense, with its groups and the plan. Raises LoadError for a table of another program.
    """
    asked, program = run.request.latency, run.program
    tokens, table = program.need("plan").tokens, None
    if asked.table:
        table = LatencyTable.read(asked.table)
        table.check(program)
        if tokens is not None and not tokens.empty:
            table.check_tokens(program, tokens)
    elif kept:
        table = _find_table(run)[2]
    if budget is None or budget.metric != "latency":
        return KnownLatency(table)
    known = "predicted and achieved latency are not known (`--latency-table` takes the latency.json of the first run)"
    if _covers(table, tokens):
        known = "predicted latency is the table's; achieved latency is that of the delivered file alone"
    run.tell.note(
        f"the pipeline states the counts that {budget} led to, and nothing was measured to choose them: {known}"
    )
    return KnownLatency(table)


def _find_table(run: Run) -> tuple[Setting, Path, LatencyTable | None]:
    """What is measured, where its table is kept on this machine, and the table, if there is one."""
    asked = run.request.latency
    setting = setting_of(run.request.target, device_of(run.program), asked.batch, asked.threads)
    path = find_table_path(setting, fingerprint(run.program))
    return setting, path, LatencyTable.read(path) if path.exists() else None


def _obtain_table(run: Run, goal: Goal, must: bool) -> LatencyTable | None:
    setting, path, old = _find_table(run)
    if not must:
        return old
    if ranks.world() > 1:
        raise OptionError(
            "latency is not measured by several processes at once",
            where="torchrun",
            why="they would be in each other's way",
            cure="compile on one process, or give `--latency-table`",
        )
    clock, tell = _clock(run), run.tell
    tell.stage(f"measure latency on {setting.device}")
    with silence():
        table = measure_table(
            run.program,
            clock,
            setting,
            sorted({str(k) for k in goal.group_kinds}),
            old,
            lambda done, total: tell(Event("progress", "measure latency", done, total)),
            lambda so_far: so_far.write(path),
        )
        if goal.tokens is not None:
            table = measure_tokens(
                run.program,
                table,
                clock,
                goal.tokens,
                lambda done, total: tell(Event("progress", "measure latency with fewer tokens", done, total)),
            )
    if table != old:
        table.write(path)
    return table


def _clock(run: Run) -> Clock:
    """The clock of this run, with the dense program as it is lowered."""
    return run.clock.of(run.request.backend, lambda: lowerable(run.program))


def refine_to_target(
    run: Run, goal: Goal, known: KnownLatency, decide: Callable[[Goal], Program]
) -> tuple[Program, KnownLatency]:
    """(the run's program with a plan whose measured latency is within 5 % of the target, if three rounds reach that;
    what is then known).

    decide   another plan of the same scores, for a goal with a corrected table

    The plan is sliced, its tokens are reduced, and it is lowered and timed beside the dense program. Where it misses,
    what plans save is multiplied by ``(dense - achieved) / (dense - predicted)`` from then on and the decision is
    repeated. The plan that comes closest stays, with its table, also where the correction shows that the target cannot
    be reached. With a given table nothing is measured.
    """
    from ..passes.search.latency_model import LatencyModel

    table, budget, at = goal.table, goal.budget, run.program
    if table is None or budget is None or run.request.latency.table:
        return at, known
    clock = _clock(run)
    tried: list[tuple[float, Program, LatencyTable]] = []
    rounds: list[dict[str, Any]] = []
    for number in range(1, ROUNDS + 1):
        run.tell.stage(f"measure the plan's latency ({number})")
        model, small = LatencyModel(at, table, at.need("plan").tokens), reduce_tokens(at, run.finders)
        reading = clock.read(lowerable(small, small.need("plan")))
        entry = _round(number, budget, model, count_kept(at), reading)
        rounds.append(entry)
        miss = entry["achieved_ms"] / entry["target_ms"] - 1.0
        tried.append((abs(miss), at, table))
        promised = table.dense_ms - entry["predicted_ms"]
        if abs(miss) <= MISS or number == ROUNDS or promised <= 0 or (at.need("plan").empty and miss < 0):
            break
        factor = min(4.0, max(0.25, (table.dense_ms - entry["achieved_ms"]) / promised))
        table = table.correct(round(factor, 6))
        try:
            again = decide(replace(goal, table=table))
        except BudgetInfeasible:  # as it turned out; what was measured closest is still the best there is
            break
        if _counts(again) == _counts(at):
            break
        at = again
    miss, at, table = min(tried, key=lambda t: t[0])
    if miss > MISS:
        _warn_of_miss(run, rounds, miss)
    return at, replace(known, table=table, rounds=tuple(rounds))


def _counts(program: Program) -> tuple[dict[str, int], TokenPlan | None]:
    """What a clock can tell of a plan: how many stay."""
    plan = program.need("plan")
    return {name: len(choice.keep) for name, choice in plan.elements.items()}, plan.tokens


def _warn_of_miss(run: Run, rounds: Sequence[Mapping[str, Any]], miss: float) -> None:
    """The warning where no round came close enough."""
    last = min(rounds, key=_miss)
    run.tell.warn(
        f"the latency is {last['achieved_ms']:.3g} ms, {last['target_ms']:.3g} ms were asked for: of "
        f"{len(rounds)} plans none came within {MISS:.0%} ({miss:.0%} is the closest)"
    )


def _miss(entry: Mapping[str, Any]) -> float:
    return abs(float(entry["achieved_ms"]) / float(entry["target_ms"]) - 1.0)


def _round(
    number: int, budget: Budget, model: LatencyModel, kept: Mapping[Axis, int], reading: PairedLatency
) -> dict[str, Any]:
    """A round as plain data. Ratios are of the dense latency in the same rounds; milliseconds, where a ratio is asked
    for, are that ratio of the table's dense latency."""
    achieved = reading.ratio * model.table.dense_ms if budget.relative else reading.ms
    return {
        "round": number,
        "target_ms": budget.limit(model.dense()) / NS_PER_MS,
        "predicted_ms": model(kept).latency_ns / NS_PER_MS,
        "achieved_ms": achieved,
        "ratio": reading.ratio,
        "error": reading.error,
        "measured_ms": reading.ms,
        "measured_dense_ms": reading.dense_ms,
        "timed": reading.rounds,
        "correction": model.table.correction,
    }


def describe_latency(run: Run, budget: Budget | None, known: KnownLatency) -> dict[str, Any] | None:
    """The latency as plain data for the report, None where nothing is known. The run's program has groups and the plan.

    target, dense_ms, predicted_ms, achieved_ms   milliseconds of one call; target and achieved are null where there was
                                                  none, and where nothing was measured of the plan itself
    rounds   of search and measurement;  layers: predicted against dense per group;  tokens: what their ops take
    table    its file in the artefact, its SHA-256 and when and with what it was measured
    """
    from ..passes.search.latency_model import LatencyModel, layers

    table, program = known.table, run.program
    tokens = program.need("plan").tokens
    if table is None or not _covers(table, tokens):
        return None
    model, kept = LatencyModel(program, table, tokens), count_kept(program)
    budget = budget if budget is not None and budget.metric == "latency" else None
    best = min(known.rounds, key=_miss, default=None)
    if budget is None:
        _warn_of_slowness(run, model, kept)
    setting = table.setting
    return {
        "budget": None if budget is None else str(budget),
        "target": None if budget is None else budget.limit(model.dense()) / NS_PER_MS,
        "backend": setting.target,
        "device": setting.device,
        "batch": setting.batch,
        "threads": setting.threads,
        "dense_ms": table.dense_ms,
        "predicted_ms": model(kept).latency_ns / NS_PER_MS,
        "achieved_ms": best and best["achieved_ms"],
        "achieved_ratio": best and best["ratio"],
        "met": best and best["achieved_ms"] <= (1 + MISS) * best["target_ms"],
        "tolerance": MISS,
        "rounds": [dict(entry) for entry in known.rounds],
        "layers": layers(model, program.need("groups"), kept),
        "tokens": model.describe_tokens(),
        "alignment": None if known.alignment is None else dict(known.alignment),
        "table": {"file": FILE, "sha256": table.hash, "date": table.date, "versions": dict(setting.versions)},
    }


def _covers(table: LatencyTable | None, tokens: TokenPlan | None) -> bool:
    """Whether a table says what a plan with such tokens takes."""
    return table is not None and (tokens is None or reducer_key(tokens.reducer, tokens.unmerge) in table.tokens)


def _warn_of_slowness(run: Run, model: LatencyModel, kept: Mapping[Axis, int]) -> None:
    """Say so where the target will not get faster by what the MACs promise, why, and what would help."""
    from ..passes.search.latency_model import find_multiple

    counts: CostModel = model
    dense, small = model.dense(), counts(kept)
    ratio, macs = small.metric("latency") / dense.metric("latency"), small.flops / max(dense.flops, 1)
    if macs >= 1 or (ratio <= NO_FASTER and (1 / ratio) * macs >= SLOWER):
        return
    fixed, one = max(0, model.dense.fixed_ns) / dense.metric("latency"), model.table.setting
    why, cures = [f"{fixed:.0%} of the time goes with nothing that was cut"], ["ask for time: `--latency`"]
    best, reason = find_multiple(model.table)
    steps = {g.granularity for g in run.program.need("groups") if g.prunable and g.size >= 2 * 64}
    if best > max(steps, default=best):
        why.append(reason)
        cures.append(f"widths that the target likes: `--align {best}`")
    if one.batch == 1:
        why.append("one sample per call")
        cures.append("a larger `--batch`, if it runs with one")
    faster = "no faster" if ratio > NO_FASTER else f"only {1 / ratio:.2f} times faster"
    run.tell.warn(f"{macs:.2f} of the MACs will be {faster} on {model.table}: {'; '.join(why)} ({', or '.join(cures)})")
