"""Budgets of latency: the table, a search by it, the plan measured, and the search again where it misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetInfeasible, OptionError
from ..ir.axis import Axis
from ..ir.cost import Budget, CostModel
from ..ir.plan import TokenPlan
from ..ir.program import Program
from ..process import ranks
from ..process.events import Event
from ..request.latency import FILE, MISS
from ..request.limits import per_pattern
from ..target.clock import SURELY, Clock, Reading, device_of
from ..target.latency_table import LatencyTable, Setting, cached_path, fingerprint, reducer_key, setting_of
from .decide_tokens import check_sites
from .measure_latency import lowerable, measure_table, measure_tokens

if TYPE_CHECKING:
    from ..passes.search.latency_model import LatencyModel
    from ..request.goal import Wish
    from .run import Work

ROUNDS = 3
SLOWER, NO_FASTER = 0.8, 0.97  # of what MACs promise; of the dense latency
NS = 1e6


def prepared(work: Work, wish: Wish, program: Program) -> tuple[Wish, Program]:
    """The wish with the table it needs, and the program with its groups aligned as that likes, where that is asked.

    Measures, unless a table is given or kept; without need it only takes the one that is kept. Where tokens take part,
    the table has rows of their reducer as well.
    """
    keeping = work.timing
    if wish.tokens is not None:
        check_sites(program, wish.tokens)  # before anything is measured
    budgeted = wish.budget is not None and wish.budget.metric == "latency"
    asked = keeping.wish
    keeping.table = (
        LatencyTable.read(asked.table)
        if asked.table
        else _table(work, wish, program, must=budgeted or asked.expect or asked.align)
    )
    if keeping.table is None:
        return wish, program
    if asked.table:
        keeping.table.check(program)
        if wish.tokens is not None:
            keeping.table.check_tokens(program, TokenPlan(wish.tokens.reducer, {}, wish.tokens.unmerge))
    if asked.align:
        from ..passes.search.latency_model import liked

        best, why = liked(keeping.table)
        keeping.alignment = {"multiples_of": best or work.backend.granularity, "why": why}
        others = per_pattern(work.limits.align, "--align")[1]
        work.limits = replace(work.limits, align=[best or work.backend.granularity, *others])
        work.find_groups = work.limits.find_groups(work.backend.granularity)
        program = work.run(program, work.find_groups)
    return replace(wish, table=keeping.table if budgeted else None), program


def recalled(work: Work, program: Program, kept: bool = True) -> None:
    """The table by which a pipeline that runs again foretells its latency: the one that is given, else (``kept``) the
    one that is kept here, as the first run took it. Nothing is measured; where time was the budget, what is therefore
    not known is said.

    program   dense, with its groups and the plan. Raises LoadError for a table of another program.
    """
    keeping, tokens = work.timing, program.need("plan").tokens
    if keeping.wish.table:
        keeping.table = LatencyTable.read(keeping.wish.table)
        keeping.table.check(program)
        if tokens is not None and not tokens.empty:
            keeping.table.check_tokens(program, tokens)
    elif kept:
        keeping.table = _kept(work, program)[2]
    if work.budget is None or work.budget.metric != "latency":
        return
    known = "predicted and achieved latency are not known (--latency-table takes the latency.json of the first run)"
    if _tells(keeping.table, tokens):
        known = "predicted latency is the table's; achieved latency is that of the delivered file alone"
    text = f"the pipeline states the counts that {work.budget} led to, and nothing was measured to choose them: {known}"
    work.notes.append(text)
    work.on_event(Event("note", text))


def _kept(work: Work, program: Program) -> tuple[Setting, Path, LatencyTable | None]:
    """What is measured, where its table is kept on this machine, and the table, if there is one."""
    asked = work.timing.wish
    setting = setting_of(work.target, device_of(program), asked.batch, asked.threads)
    path = cached_path(setting, fingerprint(program))
    return setting, path, LatencyTable.read(path) if path.exists() else None


def _table(work: Work, wish: Wish, program: Program, must: bool) -> LatencyTable | None:
    setting, path, old = _kept(work, program)
    kinds = {str(k) for k in wish.group_kinds}
    if not must:
        return old
    if ranks.world() > 1:
        raise OptionError(
            "latency is not measured by several processes at once",
            where="torchrun",
            why="they would be in each other's way",
            cure="compile on one process, or give --latency-table",
        )
    _open(work, program)
    assert work.timing.clock is not None
    work.stage(f"measure latency on {setting.device}")
    from ..process.silence import silence

    with silence():
        table = measure_table(
            program,
            work.timing.clock,
            setting,
            sorted(kinds),
            old,
            lambda done, total: work.on_event(Event("progress", "measure latency", done, total)),
            lambda so_far: so_far.write(path),
        )
        if wish.tokens is not None:
            table = measure_tokens(
                program,
                table,
                work.timing.clock,
                wish.tokens,
                lambda done, total: work.on_event(Event("progress", "measure latency with fewer tokens", done, total)),
            )
    if table != old:
        table.write(path)
    return table


def _open(work: Work, program: Program) -> None:
    """The clock of this run, with the dense program as it is lowered."""
    if work.timing.clock is None:
        asked = work.timing.wish
        work.timing.clock = Clock(work.backend, lowerable(program), asked.batch, asked.threads, together=SURELY)


def settled(work: Work, wish: Wish, program: Program, decide: Callable[[Wish], Program] | None = None) -> Program:
    """The program with a plan whose measured latency is within 5 % of the target, if three rounds reach that.

    decide   another plan of the same scores, for a wish with a corrected table; the search over groups by default

    The plan is sliced, its tokens are reduced, and it is lowered and timed beside the dense program. Where it misses,
    what plans save is multiplied by ``(dense - achieved) / (dense - predicted)`` from then on and the decision is
    repeated. The plan that comes closest stays, with its table, also where the correction shows that the target cannot
    be reached. With a given table nothing is measured.
    """
    from ..passes.search.latency_model import LatencyModel

    if wish.table is None or wish.budget is None or work.timing.wish.table:
        return program
    _open(work, program)
    clock = work.timing.clock
    assert clock is not None
    tried: list[tuple[float, Program, LatencyTable]] = []
    table, at = wish.table, program
    for number in range(1, ROUNDS + 1):
        work.stage(f"measure the plan's latency ({number})")
        model, small = LatencyModel(at, table, at.need("plan").tokens), work.reduced(at)
        reading = clock.read(lowerable(small, small.need("plan")))
        entry = _round(number, wish.budget, model, kept_of(at), reading)
        work.timing.rounds.append(entry)
        miss = entry["achieved_ms"] / entry["target_ms"] - 1.0
        tried.append((abs(miss), at, table))
        promised = table.dense_ms - entry["predicted_ms"]
        if abs(miss) <= MISS or number == ROUNDS or promised <= 0 or (at.need("plan").empty and miss < 0):
            break
        factor = min(4.0, max(0.25, (table.dense_ms - entry["achieved_ms"]) / promised))
        table = table.corrected(round(factor, 6))
        corrected = replace(wish, table=table)
        try:
            again = replace(_search(at, wish), table=table).run(at) if decide is None else decide(corrected)
        except BudgetInfeasible:  # as it turned out; what was measured closest is still the best there is
            break
        before, after = at.need("plan"), again.need("plan")
        if (after.choices, after.tokens) == (before.choices, before.tokens):
            break
        at = again
    miss, at, table = min(tried, key=lambda t: t[0])
    work.timing.table = table
    if miss > MISS:
        _say_missed(work, miss)
    return at


def _say_missed(work: Work, miss: float) -> None:
    """The warning where no round came close enough."""
    rounds = work.timing.rounds
    last = min(rounds, key=_miss)
    work.warn(
        f"the latency is {last['achieved_ms']:.3g} ms, {last['target_ms']:.3g} ms were asked for: of "
        f"{len(rounds)} plans none came within {MISS:.0%} ({miss:.0%} is the closest)"
    )


def _miss(entry: Mapping[str, Any]) -> float:
    return abs(float(entry["achieved_ms"]) / float(entry["target_ms"]) - 1.0)


def _round(
    number: int, budget: Budget, model: LatencyModel, kept: Mapping[Axis, int], reading: Reading
) -> dict[str, Any]:
    """A round as plain data. Ratios are of the dense latency in the same rounds; milliseconds, where a ratio is asked
    for, are that ratio of the table's dense latency."""
    achieved = reading.ratio * model.table.dense_ms if budget.relative else reading.ms
    return {
        "round": number,
        "target_ms": budget.limit(model.dense()) / NS,
        "predicted_ms": model(kept).latency_ns / NS,
        "achieved_ms": achieved,
        "ratio": reading.ratio,
        "error": reading.error,
        "measured_ms": reading.ms,
        "measured_dense_ms": reading.dense_ms,
        "timed": reading.rounds,
        "correction": model.table.correction,
    }


def _search(program: Program, wish: Wish) -> Any:
    from ..passes.search.search_plan import SearchPlan

    assert wish.budget is not None
    scale = float(program.need("plan").about.get("head_scale", 1.0))
    return SearchPlan(wish.budget, kinds=wish.group_kinds, head_scale=scale)


def kept_of(program: Program) -> dict[Axis, int]:
    """Counts that the plan leaves of the axes it cuts."""
    choices = program.need("plan").choices
    return {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}


def told(work: Work, program: Program) -> dict[str, Any] | None:
    """The latency as plain data for the report, None where nothing is known. ``program`` has groups and the plan.

    target, dense_ms, predicted_ms, achieved_ms   milliseconds of one call; target and achieved are null where there was
                                                  none, and where nothing was measured of the plan itself
    rounds   of search and measurement;  layers: predicted against dense per group;  tokens: what their ops take
    table    its file in the artefact, its SHA-256 and when and with what it was measured
    """
    from ..passes.search.latency_model import LatencyModel, layers

    table, tokens = work.timing.table, program.need("plan").tokens
    if table is None or not _tells(table, tokens):
        return None
    model, kept = LatencyModel(program, table, tokens), kept_of(program)
    budget = work.budget if work.budget is not None and work.budget.metric == "latency" else None
    best = min(work.timing.rounds, key=_miss, default=None)
    if budget is None:
        _warn(work, program, model, kept)
    setting = table.setting
    return {
        "budget": None if budget is None else str(budget),
        "target": None if budget is None else budget.limit(model.dense()) / NS,
        "backend": setting.target,
        "device": setting.device,
        "batch": setting.batch,
        "threads": setting.threads,
        "dense_ms": table.dense_ms,
        "predicted_ms": model(kept).latency_ns / NS,
        "achieved_ms": best and best["achieved_ms"],
        "achieved_ratio": best and best["ratio"],
        "met": best and best["achieved_ms"] <= (1 + MISS) * best["target_ms"],
        "tolerance": MISS,
        "rounds": work.timing.rounds,
        "layers": layers(model, program.need("groups"), kept),
        "tokens": model.told_tokens(),
        "alignment": work.timing.alignment or None,
        "table": {"file": FILE, "sha256": table.hash, "date": table.date, "versions": dict(setting.versions)},
    }


def _tells(table: LatencyTable | None, tokens: TokenPlan | None) -> bool:
    """Whether a table says what a plan with such tokens takes."""
    return table is not None and (tokens is None or reducer_key(tokens.reducer, tokens.unmerge) in table.tokens)


def _warn(work: Work, program: Program, model: LatencyModel, kept: Mapping[Axis, int]) -> None:
    """Say so where the target will not get faster by what the MACs promise, why, and what would help."""
    from ..passes.search.latency_model import liked

    counts: CostModel = model
    dense, small = model.dense(), counts(kept)
    ratio, macs = small.metric("latency") / dense.metric("latency"), small.flops / max(dense.flops, 1)
    if macs >= 1 or (ratio <= NO_FASTER and (1 / ratio) * macs >= SLOWER):
        return
    fixed, one = max(0, model.dense.fixed_ns) / dense.metric("latency"), model.table.setting
    why, cures = [f"{fixed:.0%} of the time goes with nothing that was cut"], ["ask for time: --latency"]
    best, reason = liked(model.table)
    steps = {g.granularity for g in program.need("groups") if g.prunable and g.size >= 2 * 64}
    if best > max(steps, default=best):
        why.append(reason)
        cures.append(f"widths that the target likes: --align {best}")
    if one.batch == 1:
        why.append("one sample per call")
        cures.append("a larger --batch, if it runs with one")
    faster = "no faster" if ratio > NO_FASTER else f"only {1 / ratio:.2f} times faster"
    work.warn(f"{macs:.2f} of the MACs will be {faster} on {model.table}: {'; '.join(why)} ({', or '.join(cures)})")
