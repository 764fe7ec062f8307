"""What fewer tokens do to a measured latency: fewer rows in products, less between them, and ops that reduce tokens."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...ir.axis import Axis
from ...ir.cost import CostModel, Expression
from ...ir.dataflow import returns_view
from ...ir.plan import TokenPlan
from ...ir.program import Program
from ...ir.token_flow import TokenFlow
from ...target.latency_table import TokenCurve
from .latency_fit import rising
from .token_schedule import TokenCosts

KNOTS = (0.25, 0.5, 0.75)  # of the tokens: where the time between products may bend
STIFF = 1.0  # per cent of the dense latency: a knot that leaves the line so far weighs as one standard error
SURE = 0.002  # of the dense latency: no reading is better than that


@dataclass(frozen=True)
class TokenTimes:
    """The latency of the program at its full widths, in nanoseconds, as a function of a schedule of tokens.

        ``T(n) = dense - follow * (products(dense) - products(n)) + sum over regions i of weight_i * between(n_i)
                 + sum over sites that take tokens away of op(tokens there)``

    A *region* is what lies behind a site; ``n_i`` of its tokens are left (protected ones aside).

    products  the time that the table of widths gives to each product, rows in proportion to tokens (exact polynomial)
    follow    how much of that time follows the rows: 1, unless fewer tokens save less than that
    between   what else goes with tokens (norms, additions, copies) if all regions had n of them, less than dense: a
              line, bent at a few counts where the readings say so
    op        what one reducing op takes: a start, and work that grows with the square of the tokens there (it compares
              them with each other)

    Fitted to the readings of a table by least squares, in units of their errors.
    """

    axes: tuple[Axis, ...]
    whole: int
    protected: int
    sites: tuple[str, ...]
    dense_ns: float
    parts: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]
    follow: float = 1.0
    counts: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    op: tuple[float, float] = (0.0, 0.0)

    def count_left(self, removed: Sequence[int]) -> list[int]:
        """Tokens left behind every site, protected ones aside."""
        return [self.whole - gone for gone in itertools.accumulate(removed)]

    def list_removed(self, plan: TokenPlan) -> list[int]:
        """The plan's counts, site by site."""
        return [plan.removed.get(name, 0) for name in self.sites]

    def between(self, n: int) -> float:
        """Piecewise linear, 0 at all tokens."""
        i = min(max(1, bisect_left(self.counts, n)), len(self.counts) - 1)
        low, high = self.counts[i - 1], self.counts[i]
        return self.values[i - 1] + (self.values[i] - self.values[i - 1]) * (n - low) / (high - low)

    def taking(self, tokens: int) -> float:
        """What an op takes that takes some of so many tokens away."""
        return self.op[0] + self.op[1] * (tokens / (self.whole + self.protected)) ** 2

    def beside(self, removed: Sequence[int]) -> float:
        """Everything but products, against the dense program."""
        left = self.count_left(removed)
        here = [self.whole, *left[:-1]]
        ops = sum(self.taking(n + self.protected) for n, r in zip(here, removed, strict=True) if r)
        return ops + sum(w * self.between(n) for w, n in zip(self.weights, left, strict=True))

    def products(self, removed: Sequence[int]) -> float:
        """Of all products behind a site, at the rates of the table of widths."""
        return sum(a * n * n + b * n for (a, b), n in zip(self.parts, self.count_left(removed), strict=True))

    def __call__(self, removed: Sequence[int]) -> float:
        """The latency, in nanoseconds."""
        less = self.products([0] * len(removed)) - self.products(removed)
        return self.dense_ns - self.follow * less + self.beside(removed)

    def costs(self, factor: float = 1.0) -> TokenCosts:
        """As a search over schedules needs it, with what is saved multiplied by ``factor``."""
        follow = factor * self.follow
        return TokenCosts(
            self.dense_ns - follow * self.products([0] * len(self.sites)),
            tuple((follow * a, follow * b) for a, b in self.parts),
            self.whole,
            self.protected,
            lambda site, tokens, r: factor * self.taking(tokens),
            lambda site, n: factor * self.weights[site] * self.between(n),
        )


def token_times(program: Program, curve: TokenCurve, rates: Sequence[float], dense_ns: float) -> TokenTimes:
    """Fitted to what was measured of one reducer.

    program  with its token flow;  rates: nanoseconds per multiply-accumulate of every product, in order
    """
    flow: TokenFlow = program.need("tokens")
    axes = tuple(s.axis for s in flow.usable if s.axis is not None)
    products = list_products(program, axes)
    none = dict.fromkeys(axes, 0)

    def at(counts: dict[Axis, int]) -> float:
        return sum(rate * p(counts) for p, rate in zip(products, rates, strict=True) if p.axes())

    empty, parts = at(none), []
    for axis in axes:
        one, two = (at({**none, axis: n}) - empty for n in (1, 2))
        a = (two - 2 * one) / 2
        parts.append((a, one - a))
    bare = TokenTimes(
        axes,
        curve.tokens,
        curve.protected,
        curve.sites,
        dense_ns,
        tuple(parts),
        region_shares(program),
        counts=(0, curve.tokens),
        values=(0.0, 0.0),
    )
    return fit_tokens(bare, curve)


def list_products(program: Program, axes: Sequence[Axis]) -> list[Expression]:
    """The program's products, in the order of its walk, as functions of the tokens in every region alone."""
    flow: TokenFlow = program.need("tokens")
    bare = program.but(groups=())
    return CostModel(bare, flow.axes, also=axes).terms["flops"]


def region_shares(program: Program) -> tuple[float, ...]:
    """Of all elements that are made behind a site by anything but products, those of every region."""
    flow: TokenFlow = program.need("tokens")
    index = {id(s): i for i, s in enumerate(flow.usable)}
    made, products = [0] * len(index), {m.node for m in program.need("axes").matmuls}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node.name not in flow.region or not isinstance(value, Tensor):
            continue
        if node.name not in products and not returns_view(node):
            sizes = [d for d in value.shape if isinstance(d, int)]  # an open batch is the same everywhere
            made[index[id(flow.sites[flow.region[node.name]])]] += math.prod(sizes)
    return tuple(n / sum(made) if sum(made) else 1 / len(made) for n in made)


def fit_tokens(bare: TokenTimes, curve: TokenCurve) -> TokenTimes:
    """``bare`` with what explains the readings: first how products and the rest follow and what ops take, all of them
    never negative; then the bends that are left.

    That products follow the rows is presumed as long as that explains the readings: their time is known from the table
    of widths, and the rest is the line's. Only where less is saved than they take do they follow less.
    """
    if not curve.points:
        return bare
    e = torch.tensor([max(p.error, SURE) for p in curve.points], dtype=torch.float64)
    x = torch.tensor([_features(bare, p.removed) for p in curve.points], dtype=torch.float64) / e[:, None]
    y = torch.tensor([p.ratio - 1.0 for p in curve.points], dtype=torch.float64) / e
    follow, (line, start, work) = 1.0, never_negative(x[:, 1:], y - x[:, 0])
    if not line:
        less, *ops = never_negative(x[:, [0, 2, 3]], y)
        if less < 1.0:
            follow, (start, work) = less, ops
    off = y - x @ torch.tensor([follow, line, start, work], dtype=torch.float64)
    counts = sorted({0, *(round(k * bare.whole) for k in KNOTS), bare.whole})
    bends = _bends(bare, curve, counts, off, e)
    values = [bare.dense_ns * (line * (n / bare.whole - 1.0) + bend) for n, bend in zip(counts, bends, strict=True)]
    return replace(
        bare,
        follow=follow,
        op=(bare.dense_ns * start, bare.dense_ns * work),
        counts=tuple(counts),
        values=tuple(_rising_with(bare, follow, counts, values)),
    )


def _features(bare: TokenTimes, removed: Sequence[int]) -> list[float]:
    """What a schedule's latency, less the dense one and as a share of it, is a sum of: products that go, tokens that go
    between them, ops, and the square of the tokens that each op sees."""
    left = bare.count_left(removed)
    seen = [
        (n + bare.protected) / (bare.whole + bare.protected)
        for n, r in zip([bare.whole, *left[:-1]], removed, strict=True)
        if r
    ]
    less = bare.products([0] * len(removed)) - bare.products(removed)
    gone = 1.0 - sum(w * n / bare.whole for w, n in zip(bare.weights, left, strict=True))
    return [-less / bare.dense_ns, -gone, float(len(seen)), sum(t * t for t in seen)]


def _bends(bare: TokenTimes, curve: TokenCurve, counts: Sequence[int], off: Tensor, e: Tensor) -> list[float]:
    """How far the line is left at every count, by what it does not explain (``off``, in errors); stiff, so that noise
    bends little. Below the lowest count that is known, as there."""
    inner = [n for n in counts if 0 < n < bare.whole]
    if not inner:
        return [0.0] * len(counts)
    hats = (
        torch.tensor(
            [
                [
                    sum(w * _hat(counts, k, n) for w, n in zip(bare.weights, bare.count_left(p.removed), strict=True))
                    for k in inner
                ]
                for p in curve.points
            ],
            dtype=torch.float64,
        )
        / e[:, None]
    )
    stiff = torch.eye(len(inner), dtype=torch.float64) / (STIFF / 100) ** 2
    found = torch.linalg.solve(hats.T @ hats + stiff, hats.T @ off).tolist()
    return [found[0], *found, 0.0]


def _rising_with(bare: TokenTimes, follow: float, counts: Sequence[int], values: Sequence[float]) -> list[float]:
    """The values, so that together with products more tokens never take less time."""
    whole = [follow * sum(a * n * n + b * n for a, b in bare.parts) for n in counts]
    risen = rising([w + v for w, v in zip(whole, values, strict=True)])
    return [r - w - (risen[-1] - whole[-1]) for r, w in zip(risen, whole, strict=True)]


def _hat(counts: Sequence[int], knot: int, n: int) -> float:
    """1 at the knot, falling to 0 at the knots beside it; the lowest inner knot holds down to none."""
    i = counts.index(knot)
    low, high = counts[i - 1], counts[i + 1]
    if n <= knot:
        return 1.0 if i == 1 else max(0.0, (n - low) / (knot - low))
    return max(0.0, (high - n) / (high - knot))


def never_negative(x: Tensor, y: Tensor) -> list[float]:
    """The non-negative coefficients of least squared error: few columns, so that every subset is tried."""
    columns = range(x.shape[1])
    best, least = [0.0] * x.shape[1], float(y @ y)
    for size in range(1, x.shape[1] + 1):
        for chosen in itertools.combinations(columns, size):
            part = x[:, list(chosen)]
            found = torch.linalg.lstsq(part, y[:, None], driver="gelsd").solution[:, 0]
            error = float(((part @ found - y) ** 2).sum())
            if bool((found >= 0).all()) and error < least - 1e-12:
                best, least = [0.0] * x.shape[1], error
                for i, value in zip(chosen, found.tolist(), strict=True):
                    best[i] = value
    return best
