"""``MeasureRungs``: what keeping so many elements is worth, measured with the whole tail gone at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ...data.batch import Calibration
from ...errors import OptionError
from ...ir.group import LAYERS, Kind, PruneGroup, Switch, with_derived
from ...ir.importance import ImportanceScores
from ...ir.pipeline import Analysis
from ...ir.program import Program
from .importance.criterion import Criterion, prunable
from .importance.curves import fill, slopes, some
from .score_groups import check_data, criterion

KINDS = (Kind.QK, Kind.V, Kind.QKV, Kind.WIDTH)
"""Kinds whose elements mean little one by one: directions that every head, or every layer, reads as a whole. What goes
of them is the tail of an order."""
WHOLE = (Kind.HEAD, Kind.KV, Kind.FFN)
"""Kinds that a search cuts one by one, and that are a layer together: where all may go, that is measured."""
MOST = 8


@dataclass(frozen=True)
class MeasureRungs(Analysis):
    """Give groups of some kinds a curve in place of a sum: ``curve[k] = damage(lowest rung) - damage(k)``, where
    ``damage(k)`` is what losing all but the k first elements costs when they go together.

    A sum of single removals presumes that each of them leaves the others' worth alone. Of directions that a softmax or
    a norm reads that is wrong by far: on MiniLM losing half the width of queries and keys costs 47 in the first layer
    where the sum says 11, and 2.3 in the last where it says 2.2. By sums a search cuts where it must not.

    Heads and neurons whose branch may go entirely keep their sums, and get what losing all of them costs (``whole``);
    layers, which are there or not, what losing them costs, and experts what each of them does.
    (Curves for heads were tried: on MiniLM 85.82 against 85.77 at 0.3 of the MACs, 84.71 against 84.83 at 0.2; and
    curves of qk and v times the share of heads that a first plan keeps: 85.34 against 85.36 at 0.2. Neither gained.)

    The order is that of the scores, or that of a basis (``PruneGroup.ordered``). Between the counts that are measured
    the curve is linear; it never falls: more can always do as well. Scores become what the concave hull of the curve
    says an element is worth, so that sums of them are what a Lagrangian search sees.

    criterion   the one that made the scores: a name, or the object itself, which remembers how it balanced its terms
    kinds       of groups that are measured;  most  counts per group, of those that a search may choose
    data, seed  those it scored with

    Errors   OptionError for an unknown name or missing data
    Cost     a removal per group and count, of what follows the group
    Law      a tail of one element costs what removing that element alone costs; relabelling elements relabels the
             order and leaves the curve alone; criteria that only sum, and groups that nothing reads, keep their scores
    """

    takes = ("criterion", "data")
    needs = ("axes", "groups", "scores")
    gives = ("scores",)

    criterion: str | Criterion = "trajectory"
    kinds: tuple[Kind | str, ...] = KINDS
    most: int = MOST
    data: Calibration | None = field(default=None, repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise OptionError("at least one count is measured", where=f"measure-rungs{{most={self.most}}}")

    def runs(self) -> tuple[object, ...]:
        return (criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion,)

    def run(self, program: Program) -> Program:
        chosen = criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion
        check_data(chosen, self.data, "measure-rungs", "give it what it scored with")
        scores = dict(program.need("scores"))
        groups = [g for g in find_tailed(program, self.kinds) if g.name in scores]
        order = {g: torch.tensor(scores[g.name].ranking(), dtype=torch.long) for g in groups}
        counts = {g: some([n for n in g.lowest().levels() if n < g.size], self.most) for g in groups}
        wanted = {g: [order[g][n:] for n in counts[g]] for g in groups}
        branches = [g for g in find_emptied(program, self.kinds) if g.name in scores]
        layers = find_switched(program, self.kinds)
        wanted |= {g: [torch.arange(g.size)] for g in (*branches, *layers)}
        mixtures = find_experts(program, self.kinds)
        wanted |= {g: list(torch.arange(g.size).split(1)) for g in mixtures}
        found = chosen.together(program, self.data if chosen.needs_data else None, self.seed, wanted)
        for group in groups:
            if group.name in found:
                points = list(zip(counts[group], found[group.name].tolist(), strict=True))
                scores[group.name] = by_rungs(scores[group.name], order[group], points)
        for group in branches:
            if group.name in found:
                scores[group.name] = replace(scores[group.name], whole=float(found[group.name]))
        for part in (*layers, *mixtures):
            if part.name in found:
                values, whole = found[part.name], float(found[part.name]) if isinstance(part, Switch) else None
                scores[part.name] = ImportanceScores(
                    part.name, values, chosen.name, chosen.unit, chosen.comparable, self.seed, whole=whole
                )
        told = [n for n in (self._note(groups, counts), *chosen.notes(program)) if n] if found else []
        notes = tuple(dict.fromkeys((*program.notes, *told)))
        return program.but(scores=with_derived(program.need("groups"), scores), notes=notes)

    def _note(self, groups: list[PruneGroup], counts: dict[PruneGroup, list[int]]) -> str:
        if not groups:
            return ""
        kinds, many = ", ".join(dict.fromkeys(str(g.kind) for g in groups)), sum(map(len, counts.values()))
        return f"counts of {kinds} are worth what losing the rest at once costs: {many} were measured"


def find_tailed(program: Program, kinds: tuple[Kind | str, ...] = KINDS) -> list[PruneGroup]:
    """The groups of these kinds that go from the end of an order, are scored, and may lose something."""
    wanted = {str(k) for k in kinds} & {str(k) for k in KINDS}
    return [g for g in prunable(program) if str(g.kind) in wanted and len(g.levels()) > 1]


def find_emptied(program: Program, kinds: tuple[Kind | str, ...]) -> list[PruneGroup]:
    """The groups of these kinds that are a layer together, and may go entirely."""
    wanted = {str(k) for k in kinds} & {str(k) for k in WHOLE}
    return [g for g in prunable(program) if str(g.kind) in wanted and g.levels()[0] == 0]


def find_switched(program: Program, kinds: tuple[Kind | str, ...]) -> list[Switch]:
    """The layers of these kinds that may go."""
    wanted = {str(k) for k in kinds} & {str(k) for k in LAYERS}
    parts = (g for g in program.need("groups") if isinstance(g, Switch) and g.prunable and g.past)
    return [g for g in parts if str(g.kind) in wanted]


def find_experts(program: Program, kinds: tuple[Kind | str, ...]) -> list[PruneGroup]:
    """The mixtures of experts, where these are among the kinds."""
    return [g for g in prunable(program) if g.kind == Kind.EXPERT] if str(Kind.EXPERT) in map(str, kinds) else []


def check_scores(program: Program, kinds: tuple[Kind | str, ...], chosen: Criterion) -> None:
    """Raise OptionError where the criterion says nothing of one of these kinds."""
    scores, wanted = program.need("scores"), {str(k) for k in kinds}
    blind = [g for g in program.need("groups") if g.prunable and str(g.kind) in wanted and g.name not in scores]
    if blind:
        raise OptionError(
            f"'{chosen.name}' says nothing of groups of kind '{blind[0].kind}'",
            where=f"--importance {chosen}",
            why="masks do not tell what they do" if blind[0].kind == Kind.EXPERT else f"{blind[0].name} has no score",
            cure="use trajectory, reap or l2" if blind[0].kind == Kind.EXPERT else "use trajectory",
        )


def by_rungs(scores: ImportanceScores, order: torch.Tensor, damage: list[tuple[int, float]]) -> ImportanceScores:
    """The scores with a curve through some points.

    order    [size] elements, the first to stay first;  damage  (count kept, what that costs), ascending in the count
    """
    size = len(order)
    curve = [*damage, (size, 0.0)]
    values = slopes(order.flip(0).tolist(), curve)
    return replace(scores, values=values, order=order, curve=fill(curve, size))
