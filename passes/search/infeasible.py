"""The words for budgets out of reach: what is reachable, what keeps the rest, and what would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from ...errors import BudgetInfeasible, NothingToPrune
from ...ir.axes import Axes
from ...ir.axis import Axis, leaves
from ...ir.cost import Budget, Cost, CostModel
from ...ir.group import Kind, PruneGroup, Tie
from ...ir.program import Program

NAMED = 4  # how many causes an error names
VISIBLE = 0.005  # a share below this would be printed as 0.00
ENDS = ("vocabulary", "graph output")  # why a language head stays: an axis without a kind, yet worth naming


def nothing_to_prune(program: Program, kinds: Sequence[Kind | str]) -> NothingToPrune:
    """No group of the wanted ``kinds``: the kinds that there are, or why everything is frozen."""
    groups: tuple[PruneGroup, ...] = program.need("groups")
    prunable = [g for g in groups if g.prunable]
    if prunable:
        found = ", ".join(sorted({str(g.kind) for g in prunable}))
        return NothingToPrune(
            "no group of the wanted kinds can be pruned",
            where=program.name,
            why=f"wanted {', '.join(map(str, kinds))}; the model has prunable groups of kind {found}",
            cure=f"`--prune {found.replace(', ', ',')}`",
        )
    reasons = Counter(g.frozen for g in groups if g.frozen)
    said = "; ".join(f"{reason} ({n} group{'s' * (n > 1)})" for reason, n in reasons.most_common(NAMED))
    return NothingToPrune(
        "nothing in this model can be pruned",
        where=program.name,
        why=said or "no tensor dimension reaches a parameter and is contracted again",
        cure="`fxprune inspect MODEL` shows every axis and why it is frozen",
    )


def infeasible(
    program: Program, groups: Sequence[PruneGroup], model: CostModel, budget: Budget, floor: Cost
) -> BudgetInfeasible:
    """``budget`` lies below ``floor``, the cost of the chosen ``groups`` at their floors.

    What no chosen group reaches is put down first to the kinds that could have been chosen, and to frozen groups only
    where none of these groups reaches either: a frozen residual stream passes every layer, and explains nothing where
    the layer's neurons were left out of the request. A stream that may be pruned passes every layer as well, and so
    takes nothing away from the frozen ones.
    """
    metric = budget.metric
    dense, least = model().metric(metric), floor.metric(metric)
    steps = any(g.granularity > 1 for g in groups)
    reached = {axis: count for g in groups for axis, count in g.sizes(g.levels()[0]).items()}
    groups = [one for g in groups for one in (g.tied if isinstance(g, Tie) else (g,))]
    chosen = {g.name for g in groups}
    fixed = model({g.axis: 0 for g in groups}).metric(metric)
    others = [g for g in program.need("groups") if g.prunable and g.name not in chosen and not isinstance(g, Tie)]
    reach, asked = apart(least / dense, budget.limit(model()) / dense)
    why = [
        f"reachable {reach}..1.00 of the dense {metric} ({_amount(least)}..{_amount(dense)}), asked {asked}",
        f"floors and alignment keep {(least - fixed) / dense:.2f}, "
        f"what no chosen group reaches keeps {fixed / dense:.2f}",
    ]
    causes = sorted((-share / dense, text) for share, text in _causes(program, model, groups, others, metric))
    why += [f"of that, {-share:.2f} through {text}" for share, text in causes[:NAMED] if -share >= VISIBLE]
    cures = []
    if any(g.floor for g in groups):
        cures.append("`--allow-empty` (no floors)")
    if steps:
        cures.append("`--align 1` (counts need not be multiples)")
    if others:
        every = {**reached, **{g.axis: g.levels()[0] for g in others}}
        kinds = ",".join(dict.fromkeys(str(g.kind) for g in (*groups, *others)))
        cures.append(f"`--prune {kinds}` (reaches {model(every).metric(metric) / dense:.2f})")
    cures.append(f"a budget of at least {_round_up(least / dense)}")
    return BudgetInfeasible(
        f"the budget {budget} is out of reach", where=program.name, why="\n        ".join(why), cure=", or ".join(cures)
    )


def apart(a: float, b: float) -> tuple[str, str]:
    """Two different numbers with two decimals, or with as many as it takes to tell them apart.

    >>> apart(0.65, 0.41), apart(0.5042, 0.5039)
    (('0.65', '0.41'), ('0.5042', '0.5039'))
    """
    for digits in range(2, 17):
        texts = f"{a:.{digits}f}", f"{b:.{digits}f}"
        if texts[0] != texts[1]:
            return texts
    return repr(a), repr(b)


def _causes(
    program: Program, model: CostModel, groups: Sequence[PruneGroup], others: Sequence[PruneGroup], metric: str
) -> Iterator[tuple[int, str]]:
    """(part of the fixed cost, what it goes through); parts of different causes overlap."""
    narrow = [*groups, *(g for g in others if g.kind is not Kind.WIDTH)]
    made = {axis for dim, _ in program.need("axes").tags.get("produce", ()) for axis in leaves(dim)}
    for kind in dict.fromkeys(g.kind for g in others):
        share = _share(program, model, [g for g in others if g.kind is kind], groups, metric)
        yield share, f"groups of kind {kind}, which was not chosen"
    for g in program.need("groups"):
        # an axis without a kind counts where it is a layer's output; tokens are in every product and explain none
        end = g.frozen.startswith(ENDS) and (metric != "flops" or g.axis in made)
        if g.frozen and (g.kind is not Kind.OTHER or end):
            yield _share(program, model, [g], narrow, metric), f"the frozen {g.name}: {g.frozen}"


def _share(
    program: Program, model: CostModel, groups: Collection[PruneGroup], without: Collection[PruneGroup], metric: str
) -> int:
    """The part of the dense cost that ``groups`` take part in and none of ``without``."""
    axes: Axes = program.need("axes")
    wanted, free = _axes(groups), _axes(without)
    if metric == "flops":
        reached = ((term, set(leaves(m.factors))) for m, term in zip(axes.matmuls, model.terms["flops"], strict=True))
        return sum(term({}) for term, axis in reached if wanted & axis and not axis & free)
    tensors, taken = program.tensors, {slot.parameter for g in without for slot in g.slots}
    names = {slot.parameter for g in groups for slot in g.slots} - taken
    return sum(
        tensors[name].numel() * (tensors[name].element_size() if metric == "bytes" else 1)
        for name in names
        if name in tensors
    )


def _axes(groups: Collection[PruneGroup]) -> set[Axis]:
    return {g.axis for g in groups}


def _amount(value: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f}{unit}"
    return str(value)


def _round_up(ratio: float) -> str:
    return f"{min(1.0, int(ratio * 100 + 1) / 100):.2f}"
