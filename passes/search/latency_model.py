"""Latency as a search needs it: a sum of products in the counts that stay, in whole nanoseconds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import BudgetInfeasible, OptionError
from ...ir.axis import Axis
from ...ir.cost import Budget, Cost, CostModel, Expression, Kept
from ...ir.group import PruneGroup
from ...ir.plan import TokenPlan
from ...ir.program import Program
from ...ir.token_flow import TokenFlow
from ...target.latency_table import Curve, LatencyTable, Point, classes, reducer_key
from .latency_fit import fit_latency, rising
from .token_latency import TokenTimes, token_times

NS_PER_MS = 1e6  # nanoseconds in a millisecond: costs are whole numbers to every search
GRAINS = 64  # counts of a wide class that the flat start and the line are fitted to
SETTLED = 60  # rounds of proportional fitting, far more than it takes
ALIGNMENTS = (8, 16, 32, 64)
PERIOD = 64  # the coarsest of them: what a probe of alignments spans
FREE = 4  # elements that a good alignment may pay for and not get, beyond the noise


@dataclass(frozen=True)
class TimedCost(Cost):
    """A cost with the latency of one call of the whole batch, in nanoseconds."""

    latency_ns: int = 0

    def metric(self, name: str) -> int:
        return self.latency_ns if name == "latency" else super().metric(name)


@dataclass(frozen=True)
class Effect:
    """Count -> the count that would take as long if every element took the same time.

    counts, values  both ascending, from (0, 0) to (size, size); straight lines between
    share           of the dense latency that goes with all elements of one group
    """

    counts: tuple[int, ...]
    values: tuple[float, ...]
    share: float

    def __call__(self, count: int) -> float:
        i = bisect_left(self.counts, count)
        if i < len(self.counts) and self.counts[i] == count:
            return self.values[i]
        low, high = self.counts[i - 1], self.counts[i]
        return self.values[i - 1] + (self.values[i] - self.values[i - 1]) * (count - low) / (high - low)


@dataclass(frozen=True)
class TimedTerm(Expression):
    """The time that goes with one product: nanoseconds per multiply-accumulate, and axes at their effective counts."""

    product: Expression = field(default_factory=lambda: Expression(0))
    rate: float = 0.0
    effects: Mapping[Axis, Effect] = field(default_factory=dict, hash=False)

    def __call__(self, kept: Kept) -> int:
        axes = self.product.axes()
        felt = {a: self.effects[a](kept.get(a, a.size)) if a in self.effects else kept.get(a, a.size) for a in axes}
        return round(self.rate * self.product(felt))  # type: ignore[arg-type]


class LatencyModel(CostModel):
    """The cost model of a program with a fourth metric, ``latency``, from a measured table.

        ``T(kept) = fixed + sum over products p of  rate_p * macs_p(effective counts)``

    A class's curve gives its *effective counts* (how the time that goes with it falls) and the time that goes with all
    of it. Times of products follow from these by proportional fitting: whatever a class takes is shared by the products
    that it is a factor of, in proportion to their MACs. Where no product has two free axes, as in transformers, this
    says that the saving of a plan is the sum of the savings of its groups, as measured; where channels multiply, both
    factors shrink the product that they share. The table's correction multiplies what is saved.

    With ``tokens`` it is the cost of what is left of groups while tokens are reduced like that, by the table's readings
    of the reducer (:class:`TokenTimes`): products have fewer rows, and what the reducing ops take is fixed. ``dense``
    is the model without.

    Law    the dense program takes ``dense_ms``; more elements never take less time
    """

    def __init__(self, program: Program, table: LatencyTable, tokens: TokenPlan | None = None) -> None:
        super().__init__(program)
        table.check(program)
        self.table, self.dense = table, self
        self.effects = effects = effects_of(program, table)
        terms, dense_ns, factor = self.terms["flops"], table.dense_ms * NS_PER_MS, table.correction
        free = [i for i, t in enumerate(terms) if t.axes()]
        self.rates = [dense_ns / max(sum(t({}) for t in terms), 1)] * len(terms)
        for i, rate in zip(
            free, _rates([terms[i] for i in free], effects, self.rates[0] if terms else 0.0, dense_ns), strict=True
        ):
            self.rates[i] = rate
        timed: list[Expression] = [
            TimedTerm(1, tuple(terms[i].axes()), (), terms[i], self.rates[i] * factor, effects) for i in free
        ]
        self.fixed_ns = round(dense_ns) - sum(t({}) for t in timed)
        self.times: TokenTimes | None = None
        self.removed: list[int] | None = None
        if tokens is not None and not tokens.empty:
            self.dense = LatencyModel(program, table)
            self.times = times_of(program, self.dense, tokens)
            self.removed = self.times.list_removed(tokens)
            timed = self._with_tokens(program, self.times, self.removed)
        self.terms["latency"] = [Expression(self.fixed_ns), *timed]

    def _with_tokens(self, program: Program, times: TokenTimes, removed: Sequence[int]) -> list[Expression]:
        """The timed terms with so many tokens gone; what goes with no group goes into ``fixed_ns``."""
        flow: TokenFlow = program.need("tokens")
        left, factor = dict(zip(times.axes, times.count_left(removed), strict=True)), self.table.correction
        whole = CostModel(program, flow.axes, also=times.axes)
        dense, less = self.terms["flops"], 0.0
        timed: list[Expression] = []
        self.terms = {metric: [t.at(left) for t in terms] for metric, terms in whole.terms.items()}
        for old, new, rate in zip(dense, self.terms["flops"], self.rates, strict=True):
            if not old.axes():
                less += times.follow * rate * (old({}) - new({}))
                continue
            for product, share in ((new, times.follow), (old, 1.0 - times.follow)):
                if share:
                    timed.append(TimedTerm(1, tuple(product.axes()), (), product, rate * factor * share, self.effects))
        self.fixed_ns += round(factor * (times.beside(removed) - less))
        return timed

    def __call__(self, kept: Kept | None = None) -> TimedCost:
        found = {m: math.ceil(sum(t(kept or {}) for t in terms)) for m, terms in self.terms.items()}
        return TimedCost(found["flops"], found["params"], found["bytes"], found["latency"])

    def describe_tokens(self) -> dict[str, object] | None:
        """What tokens do to the latency beside the products, in milliseconds; None where none become fewer.

        ops_ms      that the reducing ops take, by site;  between_ms: that everything between products takes less
        follow      how much of the products' time goes with the rows
        """
        if self.times is None or self.removed is None:
            return None
        left = [self.times.whole, *self.times.count_left(self.removed)]
        ops = {
            name: self.times.taking(n + self.times.protected) / NS_PER_MS
            for name, n, r in zip(self.times.sites, left, self.removed, strict=False)
            if r
        }
        return {
            "ops_ms": ops,
            "between_ms": self.times.beside(self.removed) / NS_PER_MS - sum(ops.values()),
            "follow": self.times.follow,
        }

    def of_group(self, axis: Axis, kept: Kept) -> int:
        """The time of all products that the axis is a factor of, in nanoseconds."""
        return sum(t(kept) for t in self.terms["latency"] if axis in t.axes())


def effects_of(program: Program, table: LatencyTable) -> dict[Axis, Effect]:
    """The effect of every prunable group's count, by axis; groups whose class was not measured have none."""
    found = {}
    for name, groups in classes(program).items():
        if table.curves[name].points:
            one = effect(table.curves[name])
            found.update({g.axis: one for g in groups})
    return found


def effect(curve: Curve) -> Effect:
    """A class's points as effective counts.

    Times never fall with the count: where the measured ones do, neighbours are averaged (pool adjacent violators).
    Where a flat start and a line explain them within their errors (PTF's form), these are taken: noise then does not
    set the price of an element. The least count measured says what goes with the class, on a straight line from there
    to none; where none was measured itself (a branch that may go), that is taken as it is.

    >>> one = effect(Curve("ffn", 100, 2, (Point(20, 0.2), Point(50, 0.5))))
    >>> round(one(50)), round(one(10)), round(one.share, 3)
    (50, 10, 0.5)
    """
    known = [*sorted(curve.points, key=lambda p: p.count), Point(curve.size, 1.0)]
    ratios = rising([min(p.ratio, 1.0) for p in known])
    counts = [p.count for p in known]
    ratios = [r / ratios[-1] for r in ratios]
    ratios = _smooth(counts, ratios, [p.error for p in known])
    whole = [(c, r) for c, r in zip(counts, ratios, strict=True) if c > 0]
    low, least = whole[0]
    share = (1.0 - least) * curve.size / (curve.size - low)
    if share <= 1e-6:  # nothing is saved: free to keep
        return Effect((0, curve.size), (0.0, float(curve.size)), 0.0)
    # rising values may tie, so that some counts cost the same; they never fall
    values = [curve.size * max(0.0, 1.0 - (1.0 - r) / share) for _, r in whole]
    empty = [r for c, r in zip(counts, ratios, strict=True) if c == 0]
    start = min(values[0], curve.size * (1.0 - (1.0 - empty[0]) / share)) if empty else 0.0
    return Effect((0, *(c for c, _ in whole)), (start, *values), share / curve.groups)


def _smooth(counts: Sequence[int], ratios: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The ratios by a flat start and a line, where these are within two standard errors everywhere; else as given."""
    if counts[0] == 0 or len(counts) < 4:
        return list(ratios)
    grain = max(1, counts[-1] // GRAINS)
    grid = range(counts[0], counts[-1] + 1, grain)
    table = [_between(counts, ratios, n) for n in grid]
    fit = fit_latency(table)
    at = [fit.constant + fit.slope * max(0.0, (n - counts[0]) / grain + 1 - fit.threshold) for n in counts]
    if any(abs(a - r) > 2 * max(e, 1e-12) for a, r, e in zip(at[:-1], ratios[:-1], errors[:-1], strict=True)):
        return list(ratios)
    shift = 1.0 - at[-1]  # the dense program is what all is held against
    return [min(1.0, a + shift) for a in at]


def _between(counts: Sequence[int], values: Sequence[float], n: int) -> float:
    i = bisect_left(counts, n)
    if counts[i] == n:
        return values[i]
    low, high = counts[i - 1], counts[i]
    return values[i - 1] + (values[i] - values[i - 1]) * (n - low) / (high - low)


def times_of(program: Program, model: LatencyModel, plan: TokenPlan) -> TokenTimes:
    """What the table of ``model`` knows about the plan's reducer. Raises LoadError where it knows nothing."""
    model.table.check_tokens(program, plan)
    curve = model.table.tokens[reducer_key(plan.reducer, plan.unmerge)]
    return token_times(program, curve, model.rates, model.table.dense_ms * NS_PER_MS)


def _rates(terms: Sequence[Expression], effects: Mapping[Axis, Effect], rate: float, dense_ns: float) -> list[float]:
    """Nanoseconds per multiply-accumulate of every product, so that each measured group takes what was measured.

    A group that takes nothing says nothing about products that another measured group is a factor of, too.
    """
    rates = [rate] * len(terms)
    users = {axis: [i for i, t in enumerate(terms) if axis in t.axes()] for axis in effects}
    for axis in [a for a, one in effects.items() if not one.share]:
        users[axis] = [i for i in users[axis] if not any(effects[a].share for a in terms[i].axes() if a in effects)]
    parts = {axis: [terms[i]({}) - terms[i]({axis: 0}) for i in at] for axis, at in users.items()}
    for _ in range(SETTLED):
        worst = 0.0
        for axis, at in users.items():
            now = math.fsum(rates[i] * part for i, part in zip(at, parts[axis], strict=True))
            wanted = effects[axis].share * dense_ns
            factor = wanted / now if now > 0 else 1.0
            worst = max(worst, abs(factor - 1.0))
            for i in at:
                rates[i] *= factor
        if worst < 1e-9:
            break
    return rates


def layers(model: LatencyModel, groups: Sequence[PruneGroup], kept: Kept) -> list[dict[str, object]]:
    """Predicted against dense time per group that was measured, in milliseconds: of all products that the group is a
    factor of, so that products of two groups stand in both. With tokens, at those that are left."""
    c = model.table.correction
    out: list[dict[str, object]] = []
    for g in groups:
        if g.axis in model.effects:
            dense = model.dense.of_group(g.axis, {})
            saved = dense - model.of_group(g.axis, kept)
            out.append(
                {
                    "group": g.name,
                    "kind": str(g.kind),
                    "kept": kept.get(g.axis, g.size),
                    "size": g.size,
                    "dense_ms": dense / c / NS_PER_MS,
                    "predicted_ms": (dense / c - saved) / NS_PER_MS,
                }
            )
    return out


def find_multiple(table: LatencyTable) -> tuple[int, str]:
    """(the finest alignment that the target gives what it is paid for, why). 0 where nothing was probed.

    Widths between two multiples of 64 should take the time between theirs. Where one takes as long as the next multiple
    of 64 or longer, its elements are paid for and not had.
    """
    for name, curve in table.curves.items():
        probes = [p for p in curve.points if p.probe]
        if not probes:
            continue
        base = probes[-1]  # a multiple of 64
        one = [p for p in curve.points if not p.probe]
        per = _slope(one, curve.size)
        if per <= 0:
            continue
        wasted = {}
        for p in probes[:-1]:
            noise = 2 * math.hypot(p.error, base.error) / per
            lost = (p.ratio - base.ratio) / per + (base.count - p.count)
            wasted[_alignment(p.count)] = lost if lost > FREE + noise else 0.0
        best = next((a for a in ALIGNMENTS if not wasted.get(a)), PERIOD)
        told = ", ".join(
            f"multiples of {a}: {lost:.0f} of {PERIOD} elements are paid for and not had"
            for a, lost in sorted(wasted.items())
            if lost and a < best
        )
        return best, f"{name.split()[0]}: {told}" if told else f"{name.split()[0]}: no width is dearer than its size"
    return 0, "alignments were not measured"


def _slope(points: Sequence[Point], size: int) -> float:
    """Ratio per element, over the whole range measured."""
    if not points:
        return 0.0
    low = min(points, key=lambda p: p.count)
    return (1.0 - low.ratio) / (size - low.count)


def _alignment(count: int) -> int:
    return next(a for a in reversed(ALIGNMENTS) if count % a == 0)


def out_of_reach(
    program: Program, budget: Budget, model: LatencyModel, floor: TimedCost, groups: Sequence[PruneGroup]
) -> BudgetInfeasible:
    """``budget`` lies below the latency of the chosen ``groups`` at their floors: what is reachable, and what helps."""
    dense, least = model.dense().latency_ns, floor.latency_ns
    limit = budget.limit(model.dense())
    fixed = model({g.axis: 0 for g in groups}).latency_ns
    cures = []
    if any(g.floor for g in groups):
        cures.append("`--allow-empty` (no floors)")
    if any(g.granularity > 1 for g in groups):
        cures.append("`--align 1` (counts need not be multiples)")
    others = sorted({str(g.kind) for g in program.need("groups") if g.prunable and g not in groups})
    if others:
        kinds = ",".join(dict.fromkeys([*(str(g.kind) for g in groups), *others]))
        cures.append(f"`--prune {kinds}`")
    cures.append(f"a budget of at least {math.ceil(100 * least / dense) / 100:.2f} ({least / NS_PER_MS:.3g} ms)")
    return BudgetInfeasible(
        f"the budget {budget} is out of reach",
        where=f"{program.name}, {model.table}",
        why=f"reachable {least / dense:.3f}..1.00 of the dense latency "
        f"({least / NS_PER_MS:.3g}..{dense / NS_PER_MS:.3g} ms), asked "
        f"{limit / dense:.3f} ({limit / NS_PER_MS:.3g} ms)\n        what no chosen group reaches takes "
        f"{max(fixed, 0) / dense:.2f}, floors and alignment {(least - max(fixed, 0)) / dense:.2f}",
        cure=", or ".join(cures),
    )


def model_for(
    program: Program, budget: Budget, table: LatencyTable | None, tokens: TokenPlan | None = None
) -> CostModel:
    """The cost model that knows the budget's metric. Raises OptionError for latency without a table."""
    if budget.metric != "latency":
        return CostModel(program)
    if table is None:
        raise OptionError(
            "a budget of latency needs a table of the target",
            where=f"--{budget}",
            cure="fxprune compile measures one, or give `--latency-table`",
        )
    return LatencyModel(program, table, tokens)
