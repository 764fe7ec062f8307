"""``SearchPlan``: from scores and a budget to the plan that keeps the most importance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...axis import leaves
from ...cost import COUNTED, Budget, Cost, CostModel, Expression, Ledger
from ...errors import BudgetInfeasible, NothingToPrune, OptionError, nearest
from ...group import DEFAULT_KINDS, Kind, PruneGroup
from ...importance import ImportanceScores
from ...pipeline import Search
from ...plan import Choice, CompressionPlan
from ...program import Axes, Program
from . import two_class as scan
from .exhaustive import exhaustive
from .ladder import Ladder, Levels, ladder
from .lagrangian import lagrangian
from .two_class import two_class

SEARCHES: dict[str, Callable[[Sequence[Ladder], Sequence[Expression], float], Levels]] = {
    "two-class": two_class,
    "lagrangian": lagrangian,
    "exhaustive": exhaustive,
}
NAMED = 4  # how many frozen groups an error names
ENDS = ("vocabulary", "graph output")  # why a language head stays: an axis without a kind, yet worth naming


@dataclass(frozen=True)
class SearchPlan(Search):
    """Choose what stays of every prunable group of the wanted kinds, so that the result costs at most ``budget``.

    budget   the bound; a bound that the dense program already meets gives the empty plan
    kinds    kinds of groups that may be cut; others keep their size
    method   ``auto``: the exact scan where it applies (separable cost, at most two chunk costs), else ``lagrangian``

    Errors   NothingToPrune, BudgetInfeasible, OptionError (unknown or unfit method)
    Law      cost never exceeds the budget, and no aligned chunk would still fit; a tighter budget never costs more;
             the same scores give the same plan
    """

    needs: ClassVar[tuple[str, ...]] = ("axes", "groups", "scores")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    budget: Budget
    kinds: tuple[Kind | str, ...] = DEFAULT_KINDS
    method: str = "auto"

    def run(self, program: Program) -> Program:
        if self.method != "auto" and self.method not in SEARCHES:
            raise OptionError(f"unknown search '{self.method}'", cure=nearest(self.method, ["auto", *SEARCHES]))
        model, metric = CostModel(program), self.budget.metric
        terms, dense = model.terms[metric], model()
        limit = self.budget.limit(dense)
        groups, scores = _live(program, kinds_named(self.kinds)), program.need("scores")
        if dense.metric(metric) <= limit:
            return program.but(plan=self._plan([], [], scores, dense, dense, "none needed"))
        ladders = ladders_of(groups, scores, terms)
        floor = model({one.axis: one.counts[0] for one in ladders})
        if floor.metric(metric) > limit:
            raise _infeasible(program, groups, model, self.budget, floor)
        separable = model.separable(metric, [one.axis for one in ladders])
        scannable = separable and scan.applies(ladders, terms)
        method = self.method if self.method != "auto" else "two-class" if scannable else "lagrangian"
        if method == "two-class" and not scannable:
            raise OptionError("the two-class search does not fit this model", where="--search two-class",
                              why="its groups have more than two costs per chunk, or costs that multiply",
                              cure="use --search auto")
        levels = SEARCHES[method](ladders, terms, limit)
        after = model({one.axis: one.counts[level] for one, level in zip(ladders, levels, strict=True)})
        return program.but(plan=self._plan(ladders, levels, scores, dense, after, method))

    def _plan(self, ladders: Sequence[Ladder], levels: Sequence[int], scores: Mapping[str, ImportanceScores],
              dense: Cost, after: Cost, method: str) -> CompressionPlan:
        """The plan names only what it cuts; ``about`` says how it was made."""
        choices = {one.group: Choice(str(one.kind), len(one.order), one.keep(level))
                   for one, level in zip(ladders, levels, strict=True) if level < one.top}
        first = next(iter(scores.values()), None)
        about = {
            "criterion": first.criterion if first else None, "unit": first.unit if first else None,
            "seed": first.seed if first else None, "budget": str(self.budget), "method": method,
            "kinds": [str(kind) for kind in kinds_named(self.kinds)], "counted": COUNTED,
            "dense": vars(dense), "predicted": vars(after),
        }
        return CompressionPlan(choices, about)


def kinds_named(names: Sequence[Kind | str]) -> tuple[Kind, ...]:
    """``("head", Kind.FFN)`` -> kinds. Raises OptionError with the nearest name."""
    known = {str(kind): kind for kind in Kind}
    for name in map(str, names):
        if name not in known:
            raise OptionError(f"unknown kind of group '{name}'", where="--prune", cure=nearest(name, known))
    return tuple(known[str(name)] for name in names)


def ladders_of(groups: Sequence[PruneGroup], scores: Mapping[str, ImportanceScores],
               terms: Sequence[Expression]) -> list[Ladder]:
    """One ladder per group; what a group is worth is the part of the dense cost that goes with it."""
    book = Ledger(terms, {})
    return [ladder(group, scores[group.name], float(-book.change(group.axis, 0))) for group in groups]


def _live(program: Program, kinds: Sequence[Kind]) -> list[PruneGroup]:
    groups: tuple[PruneGroup, ...] = program.need("groups")
    prunable = [g for g in groups if g.prunable]
    live = [g for g in prunable if g.kind in kinds]
    if live:
        return live
    if prunable:
        found = ", ".join(sorted({str(g.kind) for g in prunable}))
        raise NothingToPrune("no group of the wanted kinds can be pruned", where=program.name,
                             why=f"wanted {', '.join(map(str, kinds))}; the model has prunable groups of kind {found}",
                             cure=f"--prune {found.replace(', ', ',')}")
    reasons = Counter(g.frozen for g in groups if g.frozen)
    said = "; ".join(f"{reason} ({n} group{'s' * (n > 1)})" for reason, n in reasons.most_common(NAMED))
    raise NothingToPrune("nothing in this model can be pruned", where=program.name,
                         why=said or "no tensor dimension reaches a parameter and is contracted again",
                         cure="`fxprune inspect MODEL` shows every axis and why it is frozen")


def _infeasible(program: Program, groups: Sequence[PruneGroup], model: CostModel, budget: Budget,
                floor: Cost) -> BudgetInfeasible:
    """What is reachable, what keeps the rest, and what would help."""
    metric = budget.metric
    dense = model().metric(metric)
    fixed = model({g.axis: 0 for g in groups}).metric(metric)
    least = floor.metric(metric)
    others = [g for g in program.need("groups") if g.prunable and g not in groups]
    told = [g for g in program.need("groups") if g.frozen and (g.kind is not Kind.OTHER or g.frozen.startswith(ENDS))]
    frozen = sorted(((_share(program, model, g, groups, metric) / dense, g) for g in told),
                    key=lambda pair: (-pair[0], pair[1].name))
    why = [f"reachable {least / dense:.2f}..1.00 of the dense {metric} ({_amount(least)}..{_amount(dense)}), "
           f"asked {budget.limit(model()) / dense:.2f}",
           f"floors and alignment keep {(least - fixed) / dense:.2f}, "
           f"what no chosen group reaches keeps {fixed / dense:.2f}"]
    why += [f"of that, {share:.2f} through the frozen {g.name}: {g.frozen}" for share, g in frozen[:NAMED]
            if share >= 0.005]
    cures = []
    if any(g.floor for g in groups):
        cures.append("--allow-empty (no floors)")
    if any(g.granularity > 1 for g in groups):
        cures.append("--align 1 (counts need not be multiples)")
    if others:
        every = {g.axis: g.levels()[0] for g in (*groups, *others)}
        kinds = ",".join(dict.fromkeys(str(g.kind) for g in (*groups, *others)))
        cures.append(f"--prune {kinds} (reaches {model(every).metric(metric) / dense:.2f})")
    cures.append(f"a budget of at least {_round_up(least / dense)}")
    return BudgetInfeasible(f"the budget {budget} is out of reach", where=program.name,
                            why="\n        ".join(why), cure=", or ".join(cures))


def _share(program: Program, model: CostModel, group: PruneGroup, chosen: Sequence[PruneGroup], metric: str) -> int:
    """The part of the fixed cost that a group takes part in; parts of different groups overlap."""
    axes: Axes = program.need("axes")
    free = {g.axis for g in chosen}
    if metric == "flops":
        reached = ((term, set(leaves(m.factors))) for m, term in zip(axes.matmuls, model.terms["flops"], strict=True))
        return sum(term({}) for term, axis in reached if group.axis in axis and not axis & free)
    tensors, taken = program.tensors, {slot.parameter for g in chosen for slot in g.slots}
    fixed = [tensors[name] for name in {slot.parameter for slot in group.slots} - taken if name in tensors]
    return sum(t.numel() * (t.element_size() if metric == "bytes" else 1) for t in fixed)


def _amount(value: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f}{unit}"
    return str(value)


def _round_up(ratio: float) -> str:
    return f"{min(1.0, int(ratio * 100 + 1) / 100):.2f}"
