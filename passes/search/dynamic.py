"""Dynamic programme over a grid of costs: for values of any form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ir.cost import Expression
from .fill import fill
from .ladder import Ladder, Levels, ledger_at, step_costs

BUCKETS = 40_000  # of the whole range between floors and dense, so that a quarter of it still has 10 000


def dynamic(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> Levels:
    """One rung per ladder of the greatest total value within the limit, whatever form the values have.

        ``best[i][b] = max over rungs r of ladder i:  best[i-1][b - w(r)] + V_i(r)``      w: cost above the floor, in
        buckets, rounded up, so that the true cost never exceeds the limit

    A multiple-choice knapsack; costs must be separable (see ``CostModel.separable``). A bucket is a multiple of the
    greatest common divisor of all costs. When the whole range is at most 40 000 such divisors, as in transformers,
    nothing is rounded and the result is the optimum. Else it is at least the optimum of a limit that is smaller by one
    bucket per ladder; a fill then spends what rounding left over. The grid does not depend on the limit.

    Shapes   best [buckets + 1] float64; a choice per ladder and bucket, int32
    Cost     rungs of all ladders x buckets, vectorised over buckets
    Source   the programme over levels of SPDY (Frantar and Alistarh 2022, arXiv:2201.13096) and ZipLM
             (Kurtic et al. 2023, arXiv:2302.04089), which minimise errors over 10 000 buckets of time
    Law      equal to the exhaustive search where nothing is rounded, and then a tighter limit never costs nor gives
             more (equal values are won by the greater cost); never above the limit; nothing more fits at the end

    The floors' own cost must fit within ``limit``.

    >>> from fxprune.ir.axis import Axis
    >>> from fxprune.ir.group import Kind
    >>> bent = Ladder("f", Kind.FFN, Axis(2), (0, 1), (0, 1, 2), (0.0, 1.0, 9.0))
    >>> flat = Ladder("g", Kind.FFN, Axis(2), (0, 1), (0, 1, 2), (0.0, 4.0, 8.0))
    >>> dynamic([bent, flat], [Expression(1, (bent.axis,)), Expression(1, (flat.axis,))], 2)
    [2, 0]
    """
    steps = step_costs(terms, ladders)
    costs = [[0, *torch.tensor(one, dtype=torch.int64).cumsum(0).tolist()] for one in steps]
    floors = ledger_at(terms, ladders, [0] * len(ladders)).total
    unit = _unit(costs)
    whole = sum(-(-one[-1] // unit) for one in costs)  # everything stays
    buckets = whole if limit == math.inf else min((int(limit // 1) - floors) // unit, whole)
    best, spent = torch.zeros(buckets + 1, dtype=torch.float64), torch.zeros(buckets + 1, dtype=torch.int64)
    picks = []
    for one, price in zip(ladders, costs, strict=True):
        best, spent, pick = _add(one, price, unit, best, spent)
        picks.append(pick)
    levels = [0] * len(ladders)
    left = buckets
    for i in reversed(range(len(ladders))):
        levels[i] = int(picks[i][left])
        left -= -(-costs[i][levels[i]] // unit)
    fill(ladders, levels, ledger_at(terms, ladders, levels), limit)
    return levels


def _unit(costs: Sequence[Sequence[int]]) -> int:
    """Cost of one bucket: the greatest common divisor of all costs, or the least multiple that is coarse enough."""
    divisor = math.gcd(*(cost for one in costs for cost in one)) or 1
    return divisor * max(1, -(-sum(one[-1] for one in costs) // (divisor * BUCKETS)))


def _add(one: Ladder, costs: Sequence[int], unit: int, best: Tensor, spent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(best, spent, rung) per bucket with one ladder more. ``spent``, the true cost, decides between equal values."""
    value, cost = torch.full_like(best, -math.inf), torch.zeros_like(spent)
    pick = torch.zeros(len(best), dtype=torch.int32)
    widths = [-(-c // unit) for c in costs]
    for rung, width in enumerate(widths):
        if width >= len(best):
            break
        if rung < one.top and widths[rung + 1] == width:
            continue  # the next rung has no less value and rounds to the same cost
        end = len(best) - width
        v, c = best[:end] + one.values[rung], spent[:end] + costs[rung]
        old_v, old_c, old_pick = value[width:], cost[width:], pick[width:]
        better = (v > old_v) | ((v == old_v) & (c >= old_c))
        torch.where(better, v, old_v, out=old_v)
        torch.where(better, c, old_c, out=old_c)
        old_pick.masked_fill_(better, rung)
    return value, cost, pick
