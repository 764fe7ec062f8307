"""How many tokens go behind which attention, for a cost: by a fixed profile, or by rank elimination on scores."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...ir.axis import Axis
from ...ir.cost import CostModel
from ...ir.program import Program
from ...ir.token_flow import TokenFlow

Cap = Callable[[int, int], int]
"""(tokens here, protected ones) -> the most that may go at once."""
Removed = list[int]  # per usable site


@dataclass(frozen=True)
class TokenCosts:
    """One metric as a function of the tokens that are left behind every usable site, everything else fixed.

    ``total = base + sum over sites of a_i n_i^2 + b_i n_i``, n the unprotected tokens there: products over tokens are
    of degree one (linear layers) or two (attention), and no product mixes two regions. Exact, read off the cost
    polynomial at three points per site. Of a latency, in nanoseconds, see ``token_latency``.
    """

    base: float
    parts: tuple[tuple[float, float], ...]
    whole: int  # unprotected tokens of the dense model
    protected: int
    extra: Callable[[int, int, int], float] = lambda site, left, r: 0  # what the reduction itself costs there
    between: Callable[[int, int], float] = lambda site, n: 0  # what n tokens there cost outside products

    @staticmethod
    def of(
        program: Program,
        kept: Mapping[Axis, int],
        metric: str = "flops",
        extra: Callable[[int, int, int], float] = lambda site, left, r: 0,
    ) -> TokenCosts:
        """Of a program with its token flow, at ``kept`` elements of its groups.

        extra   (site, tokens there, how many go) -> what the ops that reduce them cost
        """
        flow: TokenFlow = program.need("tokens")
        assert flow.axes is not None
        axes = [s.axis for s in flow.usable if s.axis is not None]
        model = CostModel(program, flow.axes, also=axes)

        def at(counts: Mapping[Axis, int]) -> int:
            return model({**kept, **counts}).metric(metric)

        none = at(dict.fromkeys(axes, 0))
        parts = []
        for axis in axes:
            one, two = (at({**dict.fromkeys(axes, 0), axis: n}) - none for n in (1, 2))
            a = (two - 2 * one) // 2
            parts.append((a, one - a))
        return TokenCosts(none, tuple(parts), axes[0].size, flow.usable[0].protected, extra)

    def total(self, removed: Sequence[int]) -> float:
        """The metric when so many tokens go behind each site."""
        left, cost = self.whole, self.base
        for site, r in enumerate(removed):
            cost += self.extra(site, left + self.protected, r) if r else 0
            left -= r
            cost += self.region(site, left)
        return cost

    def region(self, site: int, n: int) -> float:
        """What goes with n tokens behind a site."""
        a, b = self.parts[site]
        return a * n * n + b * n + self.between(site, n)

    def fits(self, removed: Sequence[int], cap: Cap, later: bool = True) -> Removed:
        """``removed`` within what may go at once; what is too much goes one site ``later``, or stays."""
        left, spill, out = self.whole, 0, []
        for r in removed:
            now = min(r + spill, cap(left + self.protected, self.protected))
            spill = r + spill - now if later else 0
            left -= now
            out.append(now)
        return out


def profile(weights: Sequence[float], costs: TokenCosts, limit: float, cap: Cap, later: bool = True) -> Removed:
    """Counts in proportion to ``weights``, as few as meet ``limit``; all that can go where that is not enough.

    ToMe's constant schedule has equal weights, its decreasing one falls from 2 to 0 (Bolya et al. 2023, section 3). The
    amount is a real number, rounded where sums are taken, so that budgets are met closely. ``later``: what the cap
    forbids goes one site later, whatever its weight; else it stays.
    """

    def at(amount: float) -> Removed:
        done, sums, out = 0, 0.0, []
        for weight in weights:
            sums += amount * weight
            out.append(round(sums) - done)
            done = round(sums)
        return costs.fits(out, cap, later)

    low, high = 0.0, float(costs.whole)
    if costs.total(at(high)) > limit:
        return at(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if costs.total(at(middle)) <= limit else (middle, high)
    return at(high)


def round_counts(removed: Sequence[int], costs: TokenCosts, limit: float, cap: Cap, multiple: int) -> Removed:
    """``removed`` with the tokens left (protected ones included) at multiples, which kernels like: to the nearest, or
    down where that would cost more than ``limit``. Where the cap forbids it, and before anything goes, they stay odd.
    """

    def at(nearest: bool) -> Removed:
        dense = left = wanted = costs.whole + costs.protected
        out = []
        for r in removed:
            wanted -= r
            target = dense if wanted == dense else (wanted + multiple // 2 * nearest) // multiple * multiple
            target = min(left, max(target, left - cap(left, costs.protected)))
            out.append(left - target)
            left = target
        return out

    near = at(True)
    return near if costs.total(near) <= limit else at(False)


def decreasing(count: int) -> list[float]:
    """Weights from 2 to 0."""
    return [2 - 2 * i / max(count - 1, 1) for i in range(count)]


def eliminate(
    scores: Sequence[Sequence[float]], costs: TokenCosts, limit: float, cap: Cap, aware: bool = True
) -> Removed:
    """OPTIN's rank elimination: take the cheapest (site, token) again and again until the cost is within ``limit``.

    scores   [site][token]: what it does to remove that token from that site on; a token that went at a site is gone
             at later ones, and one that went later may go earlier instead
    aware    by score per cost saved, with the cost as it then is; else by score alone (the paper's order)
    Returns the number of tokens that first go at every site, within the cap, the excess one site later.

    Source  OPTIN, arXiv:2403.17921, A.9: "simple rank elimination"; per cost is ours, with exact finite differences of
            the true cost (the reference code counts one head and one neuron per layer)
    """
    sites, tokens = len(scores), len(scores[0]) if scores else 0
    first = [sites] * tokens  # the site at which a token goes; sites: it stays
    removed = [0] * sites

    def price(i: int, j: int) -> float:
        if not aware:
            return scores[i][j]
        left, gain = costs.whole, 0.0
        for k in range(sites):
            left -= removed[k]
            if i <= k < first[j]:
                gain += costs.region(k, left) - costs.region(k, left - 1)
        return scores[i][j] / gain if gain > 0 else float("inf")

    heap = [(price(i, j), i, j) for i in range(sites) for j in range(tokens)]
    heapq.heapify(heap)
    while heap and costs.total(costs.fits(removed, cap)) > limit:
        value, i, j = heapq.heappop(heap)
        if first[j] <= i:
            continue
        now = price(i, j)
        if heap and now > heap[0][0] and now > value:  # it saves less than when it was asked: back into the queue
            heapq.heappush(heap, (now, i, j))
            continue
        if first[j] < sites:
            removed[first[j]] -= 1
        first[j] = i
        removed[i] += 1
    return costs.fits(removed, cap)
