"""Measure a table of latencies: the whole lowered program, against dense, with all groups of a class at a few counts,
or with tokens gone by a few schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..ir.cost import CostModel
from ..ir.group import Kind, PruneGroup
from ..ir.pipeline import Pipeline
from ..ir.plan import Choice, CompressionPlan, TokenPlan
from ..ir.program import FACTS, Program
from ..ir.token_flow import TokenFlow
from ..request.tokens import TokenGoal
from ..target.clock import Clock
from ..target.latency_table import (
    Curve,
    LatencyTable,
    Point,
    Setting,
    TokenCurve,
    TokenPoint,
    classes,
    fingerprint,
    reducer_key,
    today,
)
from .parts import drop_parts

if TYPE_CHECKING:
    from ..passes.transform.reducers.reducer import Reducer

SHARES = (0.1, 0.25, 0.5, 0.75)  # of a class's elements
SMALL = 0.02  # share of the MACs below which a class is not worth a measurement
PROBED = 128  # elements from which on alignments are probed, in the class with the most MACs
PERIOD = 64  # the coarsest alignment that is probed
ONE_BY_ONE = (Kind.HEAD, Kind.KV, Kind.QUERY)  # as wide as a kernel likes by themselves


def lowerable(program: Program, plan: CompressionPlan | None = None) -> Program:
    """The program as a plan leaves it and as it is lowered; tokens as they are."""
    from ..passes.transform.fold_indices import FoldIndices
    from ..passes.transform.fuse_norms import FuseNorms
    from ..passes.transform.slice_axes import SliceAxes
    from ..passes.transform.spell_out_tokens import SpellOutTokens

    if plan is not None and plan.elements:
        program = Pipeline((SliceAxes(),), start=FACTS).run(drop_parts(program.but(plan=plan)))
    return Pipeline((FoldIndices(), SpellOutTokens(), FuseNorms())).run(program.without_facts())


def at_counts(groups: Sequence[PruneGroup], count: int) -> CompressionPlan:
    """The first ``count`` elements of each of these groups: which they are does not matter to a clock."""
    return CompressionPlan({g.name: Choice(str(g.kind), g.size, tuple(range(count))) for g in groups})


def counts_of(group: PruneGroup) -> list[int]:
    """Counts to measure a class at, ascending, the full size left out; zero where the whole branch may go."""
    step = 16 if group.size >= PROBED else 8 if group.size >= PERIOD else 1
    found = {min(group.size - 1, max(step, round(share * group.size / step) * step)) for share in SHARES}
    if group.levels()[0] == 0:
        found.add(0)
    return sorted(n for n in found if n < group.size)


def probes_of(group: PruneGroup) -> list[int]:
    """Counts that differ in what they are multiples of, between two multiples of 64 near the middle: 8, 16, 32 above
    the lower one, and the upper one."""
    base = group.size // 2 // PERIOD * PERIOD
    return [base - PERIOD + a for a in (8, 16, 32)] + [base]


def measure_table(
    program: Program,
    clock: Clock,
    setting: Setting,
    kinds: Sequence[str],
    old: LatencyTable | None = None,
    on_point: Callable[[int, int], None] = lambda done, total: None,
    on_curve: Callable[[LatencyTable], None] = lambda table: None,
) -> LatencyTable:
    """The table of a program with groups.

    kinds     of groups that may be cut: others are listed and not measured
    old       a table of the same program and setting: what it has measured is not measured again
    on_point  is told how many of how many programs were timed;  on_curve: the table so far, after every class
    """
    found = classes(program)
    curves = {name: _skip_curve(program, groups, kinds) for name, groups in found.items()}
    if old is not None:
        curves.update(
            {
                name: c
                for name, c in old.curves.items()
                if name in curves and (c.points or (curves[name].skipped and curves[name].skipped == c.skipped))
            }
        )
    wanted = [name for name, curve in curves.items() if not curve.points and not curve.skipped]
    probed = _widest(program, found) if wanted else ""
    jobs = {
        name: {n: n in probes for n in sorted({*counts_of(found[name][0]), *probes})}
        for name in wanted
        for probes in [probes_of(found[name][0]) if name == probed else []]
    }
    total, done = sum(map(len, jobs.values())), 0
    dense = [old.dense_ms] if old is not None and old.dense_ms else []
    if not jobs and not dense:  # nothing is worth a measurement of its own, but for the whole
        dense = [clock.read(lowerable(program)).dense_ms]
    table = LatencyTable(
        setting,
        fingerprint(program),
        dense[0] if dense else 1.0,
        curves,
        date=today(),
        tokens=old.tokens if old is not None else {},
    )
    for name, counts in jobs.items():
        points = []
        for count, probe in counts.items():
            on_point(done, total)
            one = clock.read(lowerable(program, at_counts(found[name], count)))
            points.append(Point(count, round(one.ratio, 5), round(one.error, 5), probe))
            dense.append(one.dense_ms)
            done += 1
        curves = {**table.curves, name: replace(curves[name], points=tuple(points))}
        table = replace(table, curves=curves, dense_ms=round(sorted(dense)[len(dense) // 2], 5))
        on_curve(table)
    on_point(done, total)
    return replace(table, dense_ms=round(sorted(dense)[len(dense) // 2], 5)) if dense else table


def _skip_curve(program: Program, groups: Sequence[PruneGroup], kinds: Sequence[str]) -> Curve:
    first = groups[0]
    why = "kind" if str(first.kind) not in kinds else "small" if _share(program, groups) < SMALL else ""
    return Curve(str(first.kind), first.size, len(groups), (), why)


def _share(program: Program, groups: Sequence[PruneGroup]) -> float:
    """Of all MACs, those that go with the groups."""
    model = CostModel(program)
    whole = model().flops
    return 1.0 - model({g.axis: 0 for g in groups}).flops / whole if whole else 0.0


def _widest(program: Program, found: Mapping[str, Sequence[PruneGroup]]) -> str:
    """The class to probe alignments on."""
    wide = {
        name: _share(program, groups)
        for name, groups in found.items()
        if groups[0].size >= PROBED and groups[0].kind not in ONE_BY_ONE
    }
    return max(wide, key=lambda name: wide[name], default="")


EARLY = (0.75, 0.5, 0.25)  # of the tokens that may go, left, the others gone as soon as they can: few ops
SPREAD = (0.6, 0.2)  # left at the end, with equally many gone behind every site: an op at each


def schedules(flow: TokenFlow, reducer: Reducer) -> list[tuple[int, ...]]:
    """Counts per usable site that tell apart what tokens take and what it takes to reduce them."""
    sites, first = len(flow.usable), flow.usable[0]
    whole = first.tokens - first.protected

    def fitting(wanted: Sequence[int]) -> tuple[int, ...]:
        left, spill, out = whole, 0, []
        for r in wanted:
            now = min(r + spill, reducer.cap(left + first.protected, first.protected))
            left, spill = left - now, r + spill - now
            out.append(now)
        return tuple(out)

    found = [fitting([round(whole * (1 - left)), *[0] * (sites - 1)]) for left in EARLY]
    for left in SPREAD:
        gone = [round(whole * (1 - left) * (i + 1) / sites) for i in range(sites)]
        found.append(fitting([b - a for a, b in zip([0, *gone], gone, strict=False)]))
    return [s for s in dict.fromkeys(found) if any(s)]


def measure_tokens(
    program: Program,
    table: LatencyTable,
    clock: Clock,
    wish: TokenGoal,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """``table`` with the rows of the wish's reducer; as it is where it has them.

    program   dense, with its token flow; raises PlanError or OptionError where the reducer does not fit it
    """
    from ..passes.transform.merge_tokens import MergeTokens

    flow: TokenFlow = program.need("tokens")
    key, first = reducer_key(wish.reducer, wish.unmerge), flow.usable[0]
    if key in table.tokens:
        return table
    names, points = tuple(s.name for s in flow.usable), []
    wanted = schedules(flow, wish.method)
    for done, removed in enumerate(wanted):
        on_point(done, len(wanted))
        plan = TokenPlan(wish.reducer, {n: r for n, r in zip(names, removed, strict=True) if r}, wish.unmerge)
        small = Pipeline((MergeTokens(),), start=FACTS).run(program.but(plan=CompressionPlan(plan.choices())))
        one = clock.read(lowerable(small))
        points.append(TokenPoint(removed, round(one.ratio, 5), round(one.error, 5)))
    on_point(len(wanted), len(wanted))
    curve = TokenCurve(first.tokens - first.protected, first.protected, names, tuple(points))
    return replace(table, tokens={**table.tokens, key: curve})
