"""From a wish to how many tokens go where, and what then is left to take from heads, neurons and channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from ..data.batch import Batch, Calibration
from ..errors import BudgetInfeasible, NothingToPrune, OptionError
from ..ir.cost import Budget, Cost, CostModel
from ..ir.plan import CompressionPlan, TokenPlan
from ..ir.program import Program
from ..ir.token_flow import TokenFlow
from ..process.ranks import agree
from ..request.tokens import TokenGoal
from .parts import carry_out
from .run import Run, fit_by_ridge, reduce_tokens
from .token_scores import TokenScores

if TYPE_CHECKING:
    from ..passes.search.search_plan import SearchPlan
    from ..passes.search.token_schedule import TokenCosts
    from ..request.goal import Goal

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the cost to be saved, taken by tokens
FIT = 128  # samples that what is left is fitted to before plans with different shares are compared
REMOVALS = 16  # tokens per site that the schedule ``removal`` takes out
SURE = 2.0  # standard errors by which a schedule must beat the constant one
STRIDES = (1, 2, 3, 6)  # of sites: where tokens go on a ledger of time
NS_PER_MS = 1e6  # nanoseconds in a millisecond
STEP = 0.25  # share of a site's tokens that a trial moves to another site, at first


def check_sites(program: Program, wish: TokenGoal) -> TokenFlow:
    """The token flow. Raises NothingToPrune where tokens cannot be reduced anywhere."""
    flow: TokenFlow = program.need("tokens")
    if not flow.usable:
        reasons = list(dict.fromkeys(s.frozen for s in flow.sites))
        raise NothingToPrune(
            "tokens cannot be reduced in this model",
            where=f"--tokens {wish.text}",
            why="; ".join(reasons[:3]) or "it has no self-attention over a fixed number of tokens",
            cure="`fxprune inspect MODEL` lists the attentions; prune heads, ffn or channels",
        )
    return flow


def decide_tokens(
    run: Run, goal: Goal, search: SearchPlan | None, scores: dict[str, list[list[float]]] | None = None
) -> CompressionPlan:
    """The plan for tokens, and for groups where ``search`` is given, within the budget (if there is one).

    run     its program is dense, with groups, token flow, and scores where groups take part
    scores  of tokens, kept between decisions on the same program and data

    Tokens take a share of what the budget takes away, and the search over groups takes the rest on the reduced graph,
    so that its ledger has the true cost of every head and neuron with the tokens that are left. Which share: the one
    whose plan, with what is left fitted by ridge where recovery is wanted, keeps the outputs closest to the dense ones.
    """
    tokens = goal.tokens
    assert tokens is not None
    check_sites(run.program, tokens)
    one = Decision(run, goal, tokens, run.program, [] if run.data is None else list(run.data.batches))
    one._scores = one._scores if scores is None else scores
    if tokens.explicit:
        removed = tokens.resolve_counts(
            lambda r: one.costs.fits(r, tokens.method.cap, later=False), len(one.flow.usable)
        )
        if search is None and goal.budget is not None and one.costs.total(removed) > one.limit:
            raise BudgetInfeasible(
                "the token counts do not meet the budget",
                where=f"--tokens {tokens.text}",
                why=f"{one.costs.total(removed) / one.dense:.3f} of the dense {one.metric} stay; "
                f"asked {one.limit / one.dense:.3f}",
                cure="leave the counts or the budget away, or prune heads and neurons as well: "
                "`--prune heads,ffn,tokens`",
            )
        return one.plan_groups(one.plan_of(removed), search)
    if search is None:
        return one.plan_groups(one.within(one.limit), None)
    shares = SHARES if tokens.deciding.share is None else (tokens.deciding.share,)
    return one.best(shares, search)


@dataclass
class Decision:
    """One model and one wish on the way to token counts; what was scored and tried is remembered, and what the dense
    model makes of the samples that schedules and shares are compared on."""

    run: Run
    goal: Goal
    tokens: TokenGoal
    program: Program
    batches: list[Batch]
    _tried: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _scores: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from ..passes.analysis.importance.damage import Reference
        from ..passes.search.token_schedule import TokenCosts

        self.flow: TokenFlow = self.program.need("tokens")
        self.metric = self.goal.budget.metric if self.goal.budget is not None else "flops"
        self.costs: TokenCosts
        if self.timed and self.goal.table is not None:
            from ..passes.search.latency_model import LatencyModel, times_of

            model = LatencyModel(self.program, self.goal.table)
            none = TokenPlan(self.tokens.reducer, {}, self.tokens.unmerge)
            self.costs = times_of(self.program, model, none).costs(self.goal.table.correction)
            cost: Cost = model()
        elif self.metric == "flops":
            self.costs = TokenCosts.of(self.program, {}, self.metric, lru_cache(None)(self._overhead))
            cost = CostModel(self.program)()
        else:
            raise OptionError(
                "fewer tokens save multiply-accumulates and time, and nothing else",
                where=f"--{self.metric}",
                why="weights stay as they are",
                cure="give `--flops` or `--latency`, or leave tokens alone",
            )
        self.dense = cost.metric(self.metric)
        self.reference = Reference(self.program)
        self.limit = float(self.dense) if self.goal.budget is None else self.goal.budget.limit(cost)

    @property
    def timed(self) -> bool:
        """Whether the ledger is one of measured time, in nanoseconds."""
        return self.metric == "latency"

    def _overhead(self, index: int, left: int, r: int) -> int:
        """Multiply-accumulates of the ops that take r of ``left`` tokens away at a site."""
        from ..passes.transform.reducers.reducer import Counting

        site = self.flow.usable[index]
        nodes = {n.name: n for n in self.program.graph.nodes}
        named = {"x": site.value, "query": site.query, "key": site.key, "values": site.values}
        taps = Counting(site, left, {role: nodes[name].meta["val"].shape for role, name in named.items() if name})
        self.tokens.method.reduce(taps, r)
        return taps.macs

    def plan_of(self, removed: Sequence[int]) -> TokenPlan:
        counts = {s.name: r for s, r in zip(self.flow.usable, removed, strict=True) if r}
        return TokenPlan(self.tokens.reducer, counts, self.tokens.unmerge)

    def plan_groups(self, plan: TokenPlan, search: SearchPlan | None, budget: Budget | None = None) -> CompressionPlan:
        """The whole plan: the groups are searched with the tokens that are left, to the absolute budget."""
        if search is None:
            table = {"latency_table": self.goal.table.hash} if self.timed and self.goal.table is not None else {}
            return CompressionPlan({}, {"method": f"tokens by {self.tokens.text}", **table}).with_tokens(plan)
        if self.timed:  # the table is of the dense graph: what tokens do to it is in the model
            in_ms = Budget("latency", self.limit / NS_PER_MS, relative=False)
            asked = self.program.but(plan=CompressionPlan(plan.choices()))
            found = replace(search, budget=in_ms).run(asked).need("plan")
            return CompressionPlan(found.choices, found.about).with_tokens(plan)
        whole = budget or Budget(self.metric, self.limit, relative=False)
        reduced = reduce_tokens(self.program.but(plan=CompressionPlan(plan.choices())), self.run.finders)
        found = replace(search, budget=whole).run(reduced).need("plan")
        return CompressionPlan(found.choices, found.about).with_tokens(plan)

    # ------------------------------------------------------------ schedules
    def within(self, limit: float, improve: bool = True) -> TokenPlan:
        """The schedule that costs at most ``limit``, what the token ops themselves cost included."""
        from ..passes.search.token_schedule import round_counts

        removed, multiple = self._schedule(limit, improve), self.tokens.deciding.multiple
        if multiple > 1:
            removed = round_counts(removed, self.costs, limit, self.tokens.method.cap, multiple)
        if self.costs.total(removed) <= limit:
            return self.plan_of(removed)
        least = min(self.costs.total(r) for r in self._most())
        raise BudgetInfeasible(
            "tokens alone do not meet the budget",
            where=f"--tokens {self.tokens.text}",
            why=f"with as many gone as can go, {least / self.dense:.2f} of the dense {self.metric} stay; "
            f"asked {limit / self.dense:.2f}",
            cure="prune heads and neurons as well: `--prune heads,ffn,tokens`",
        )

    def _most(self) -> list[list[int]]:
        """As many tokens gone as can go, at the first site, at the first two, ..: an op may take more than it saves."""
        most = self.costs.fits([self.costs.whole] * len(self.costs.parts), self.tokens.method.cap)
        return [most[:sites] + [0] * (len(most) - sites) for sites in range(1, len(most) + 1)]

    def _even(self, limit: float) -> list[list[int]]:
        """The constant schedule; on a ledger of time also at every second, third, .. site alone, those within the limit
        first: every op takes time of its own, however few tokens it takes away."""
        from ..passes.search.token_schedule import profile

        count = len(self.flow.usable)
        strides = [n for n in STRIDES if n == 1 or (self.timed and n < 2 * count)]
        found = [
            profile([float(i % n == 0) for i in range(count)], self.costs, limit, self.tokens.method.cap, n == 1)
            for n in strides
        ]
        return sorted(found, key=lambda r: self.costs.total(r) > limit)

    def _schedule(self, limit: float, improve: bool) -> list[int]:
        from ..passes.search.token_schedule import decreasing, eliminate, profile

        cap, count, how = self.tokens.method.cap, len(self.flow.usable), self.tokens.deciding.schedule
        even = self._even(limit)
        if how == "auto" and not self.batches:
            how = "constant"
            self.run.tell.warn("no data was given: the same number of tokens goes at every attention")
        constant = even[0]
        if how == "constant":
            return constant
        falling = profile(decreasing(count), self.costs, limit, cap)
        if how == "decreasing":
            return falling
        found = eliminate(
            self.scores("removal" if how == "removal" else "optin"), self.costs, limit, cap, self.tokens.deciding.aware
        )
        if how == "auto":
            several = [found, falling, *even]
            several = [r for r in several if self.costs.total(r) <= limit] or several
            found = min(several, key=self.damage)
            found = self._improve(found, limit) if improve else found
        if not self.tokens.deciding.guard or self.costs.total(constant) > limit >= self.costs.total(found):
            return found
        return found if self.surely(found, constant) else constant

    def scores(self, how: str) -> list[list[float]]:
        """[site][token], measured once."""
        from ..passes.transform.merge_tokens import trial

        if how not in self._scores:
            self.run.tell.stage("score tokens")
            made = TokenScores(self.program, self._draw_batches(32), trial, self.tokens.deciding.mean_first)
            self._scores[how] = made.removals(REMOVALS) if how == "removal" else made.curves(self.tokens.method)
        return self._scores[how]

    def _draw_batches(self, samples: int) -> list[Batch]:
        from ..passes.analysis.importance.obs import first

        return first(self.batches, samples)

    def damage(self, removed: Sequence[int]) -> float:
        """How far the outputs are from the dense ones when so many tokens go and nothing else does."""
        return float(self.damages(removed).mean())

    def surely(self, one: Sequence[int], other: Sequence[int], errors: float = SURE) -> bool:
        """Whether ``one`` does less damage than ``other`` by more than so many standard errors: same samples, paired.

        Few samples see much that is chance, and what was chosen on them wins on them; a difference that is not clear
        there may be none anywhere else. Compared are square roots: a divergence is a squared distance, and a few
        samples hold most of the sum of squares.
        """
        apart = self.damages(other).sqrt() - self.damages(one).sqrt()
        if len(apart) < 2:
            return float(apart.mean()) > 0
        return float(apart.mean()) > errors * float(apart.std()) / len(apart) ** 0.5

    def damages(self, removed: Sequence[int]) -> Tensor:
        """Of every sample. [samples]"""
        from ..passes.analysis.importance.damage import divergences
        from ..passes.transform.merge_tokens import trial

        key = tuple(removed)
        if key not in self._tried:
            module = trial(self.program, self.plan_of(removed))
            found = divergences(self.reference, module, self._draw_batches(self.tokens.deciding.seen))
            self._tried[key] = agree({"damages": found})["damages"]  # ranks of other hardware go on alike
        return self._tried[key]

    def _improve(self, removed: list[int], limit: float) -> list[int]:
        """Move tokens from one site to another, the cost held, as long as it helps: a bounded number of trials.

        A move takes some tokens' removal away from one site and gives another as many as the budget then wants.
        """
        cap, count = self.tokens.method.cap, len(removed)
        best, left, step = removed, self.tokens.deciding.improve, STEP
        while left > 0 and step > 0.02:
            better = False
            for a in range(count):
                for b in (a - 1, a + 1, (a + count // 2) % count):
                    if left <= 0 or not 0 <= b < count or a == b or best[a] == 0:
                        continue
                    trial = self._move(best, a, b, max(1, round(best[a] * step)), limit, cap)
                    if trial is None or tuple(trial) in self._tried:
                        continue
                    left -= 1
                    if self.surely(trial, best, 0.0):
                        best, better = trial, True
            if not better:
                step /= 2
        return best

    def _move(self, removed: Sequence[int], a: int, b: int, amount: int, limit: float, cap: object) -> list[int] | None:
        """``amount`` fewer at site a, and as many more at b as meets the limit again; None where that cannot be."""
        trial = list(removed)
        trial[a] -= amount
        for more in range(self.costs.whole):
            trial[b] = removed[b] + more
            fitted = self.costs.fits(trial, cap)  # type: ignore[arg-type]
            if self.costs.total(fitted) <= limit:
                return fitted
            if sum(fitted) < sum(trial):
                return None
        return None

    # ------------------------------------------------------------ shares
    def best(self, shares: Sequence[float], search: SearchPlan) -> CompressionPlan:
        """Of plans whose tokens take different shares, the one whose outputs are closest to the dense ones."""
        found: list[tuple[float, float, CompressionPlan]] = []
        failed: BudgetInfeasible | None = None
        for share in shares:
            try:
                plan = self.plan_groups(self._taking(share, improve=len(shares) == 1), search)
            except BudgetInfeasible as why:
                failed = failed or why
                continue
            value = self._measure_plan(plan) if len(shares) > 1 else 0.0
            found.append((value, share, plan))
        if not found:
            assert failed is not None
            raise failed
        value, share, plan = min(found, key=lambda f: f[:2])
        if len(found) > 1:
            told = ", ".join(f"{s:g}: {v:.3g}" for v, s, _ in found)
            self.run.tell.note(
                f"tokens take {share:g} of what the budget takes away (divergence of the outputs by share: {told})"
            )
            if self.tokens.deciding.schedule == "auto" and self.tokens.deciding.improve and share:
                better = self.plan_groups(self._taking(share, improve=True), search)
                return better if self._measure_plan(better) < value else plan
        return plan

    def _taking(self, share: float, improve: bool) -> TokenPlan:
        """Tokens reduced until they have taken their share of what the budget takes away."""
        if not share:
            return self.plan_of([0] * len(self.flow.usable))
        return self.within(self.dense - share * (self.dense - self.limit), improve)

    def _measure_plan(self, plan: CompressionPlan) -> float:
        """Divergence of the outputs under a plan, with what is left fitted where recovery is wanted, on samples that
        it was not fitted to where there are enough."""
        from ..passes.analysis.importance.damage import divergences

        seen, program = self.batches, self.program.but(plan=plan, scores=None)
        fit, judge = self._draw_batches(FIT), seen
        if self.goal.recovery.method not in ("none",) and plan.elements and len(seen) > 1:
            cut = min(len(fit), max(1, len(seen) * 3 // 4))
            fit, judge = seen[:cut], seen[cut:] or seen[-1:]
            program = fit_by_ridge(program, self.run.finders, Calibration(tuple(fit), "share"), self.run.seed)
        judge = judge[: max(1, -(-self.tokens.deciding.seen // max(judge[0].size, 1)))]
        small = carry_out(reduce_tokens(program, self.run.finders))
        return float(agree({"kept": divergences(self.reference, small, judge).mean()})["kept"])
