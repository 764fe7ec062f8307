"""Measure what fewer tokens take: the whole lowered program with tokens gone by a few schedules, against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .latency_clock import Clock
from .latency_measure import lowerable
from .latency_table import LatencyTable, TokenCurve, TokenPoint, reducer_key
from .pipeline import Pipeline
from .plan import CompressionPlan, TokenPlan
from .program import FACTS, Program
from .token_wish import TokenWish
from .tokens import TokenFlow

if TYPE_CHECKING:
    from .passes.transform.reducers.reducer import Reducer

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
    wish: TokenWish,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyTable:
    """``table`` with the rows of the wish's reducer; as it is where it has them.

    program   dense, with its token flow; raises PlanError or OptionError where the reducer does not fit it
    """
    from .passes.transform.merge_tokens import MergeTokens

    flow: TokenFlow = program.need("tokens")
    key, first = reducer_key(wish.reducer, wish.unmerge), flow.usable[0]
    if key in table.tokens:
        return table
    names, points = tuple(s.name for s in flow.usable), []
    wanted = schedules(flow, wish.made)
    for done, removed in enumerate(wanted):
        on_point(done, len(wanted))
        plan = TokenPlan(wish.reducer, {n: r for n, r in zip(names, removed, strict=True) if r}, wish.unmerge)
        small = Pipeline((MergeTokens(),), start=FACTS).run(program.but(plan=CompressionPlan({}, {}, plan)))
        one = clock.read(lowerable(small))
        points.append(TokenPoint(removed, round(one.ratio, 5), round(one.error, 5)))
    on_point(len(wanted), len(wanted))
    curve = TokenCurve(first.tokens - first.protected, first.protected, names, tuple(points))
    return replace(table, tokens={**table.tokens, key: curve})
