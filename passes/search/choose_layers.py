"""``ChooseLayers``: so many layers go, those that are worth least, or those that are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...errors import NothingToPrune, OptionError
from ...ir.cost import COUNTED, CostModel
from ...ir.group import LAYERS, Kind, PruneGroup, Switch
from ...ir.pipeline import Search
from ...ir.plan import Choice, CompressionPlan
from ...ir.program import Program
from .ladder import ladder

SAID = "layers"
"""Where a plan's ``about`` names the layers that were chosen before its search: that takes them as they are."""


@dataclass(frozen=True)
class ChooseLayers(Search):
    """Plan that some layers go, whatever that costs or saves. A search behind it cuts what is left of the program.

    drop    so many of each program's layers go: those whose loss costs least by the scores, each by itself
    at      these go, numbered from 0 in the order of the graph, of each kind
    kinds   of layers: ``layer``, or ``attention`` and ``mlp``

    Needs ``groups``, and ``scores`` to choose by. Errors: NothingToPrune where there are no such layers, OptionError
    for more than there are, and for ones that are not there or must stay.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("axes", "groups")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    drop: int = 0
    at: tuple[int, ...] = ()
    kinds: tuple[Kind | str, ...] = (Kind.LAYER,)

    def __post_init__(self) -> None:
        if (self.drop > 0) == bool(self.at) or self.drop < 0 or min(self.at, default=0) < 0:
            raise OptionError(
                "either some layers go, or those that are named",
                where=str(self),
                cure="write choose-layers{drop=4} or choose-layers{at=[0 1 2 5]}",
            )

    def run(self, program: Program) -> Program:
        known = layers_of(program, self.kinds)
        if not known:
            raise NothingToPrune(
                "there are no such layers",
                where=program.name,
                why=f"nothing of kind {', '.join(map(str, self.kinds))} is added to a residual stream",
                cure="count branches instead: `--prune attention,mlp`",
            )
        chosen = self._choose_named(known) if self.at else self._cheapest(program, known)
        choices = {g.name: Choice(str(g.kind), g.size, ()) for g in chosen}
        about = self._about(program, choices)
        plan = (program.plan or CompressionPlan()).with_elements(choices, about)
        note = f"layers that go: {', '.join(choices)}"
        return program.but(plan=plan, notes=tuple(dict.fromkeys((*program.notes, note))))

    def _choose_named(self, known: Sequence[Switch]) -> list[Switch]:
        by_kind = [[g for g in known if g.kind == kind] for kind in self.kinds]
        count = max(map(len, by_kind))
        if max(self.at) >= count:
            raise OptionError(
                f"there is no layer {max(self.at)}",
                where=f"--layers {','.join(map(str, self.at))}",
                why=f"the model has {count} of kind {', '.join(map(str, self.kinds))}, numbered from 0",
            )
        chosen = [some[i] for some in by_kind for i in self.at if i < len(some)]
        stays = next((g for g in chosen if g.frozen), None)
        if stays is not None:
            raise OptionError(f"the layer '{stays.name}' must stay", where=f"--layers {self.at}", why=stays.frozen)
        return _in_order(known, chosen)

    def _cheapest(self, program: Program, known: Sequence[Switch]) -> list[Switch]:
        live = [g for g in known if g.prunable]
        if self.drop >= len(known) or self.drop > len(live):
            raise OptionError(
                f"{self.drop} layers cannot go",
                where=f"--layers -{self.drop}",
                why=f"the model has {len(known)} of kind {', '.join(map(str, self.kinds))}"
                + ("" if len(live) == len(known) else f", of which {len(known) - len(live)} must stay")
                + (", and one at least is kept" if self.drop == len(live) == len(known) else ""),
            )
        worth = {g.name: _worth(program, g) for g in live}
        return _in_order(known, sorted(live, key=lambda g: worth[g.name])[: self.drop])

    def _about(self, program: Program, choices: dict[str, Choice]) -> dict[str, object]:
        first = None if program.scores is None else next(iter(program.scores.values()), None)
        model = CostModel(program)
        kept = {g.axis: 0 for g in program.need("groups") if g.name in choices}
        return {
            "criterion": first.criterion if first and self.drop else None,
            "unit": first.unit if first and self.drop else None,
            "seed": first.seed if first else None,
            "budget": None,
            "method": "stated layers" if self.at else f"the {self.drop} layers of least worth",
            "kinds": [str(kind) for kind in self.kinds],
            "counted": COUNTED,
            "dense": vars(model()),
            "predicted": vars(model(kept)),
            SAID: list(choices),
        }


def layers_of(program: Program, kinds: Sequence[Kind | str]) -> list[Switch]:
    """The layers of these kinds, in the order of the graph, those that must stay included."""
    wanted = {str(k) for k in kinds} & {str(k) for k in LAYERS}
    return [g for g in program.need("groups") if isinstance(g, Switch) and str(g.kind) in wanted]


def find_stated(plan: CompressionPlan | None) -> dict[str, Choice]:
    """The choices of layers that a plan's search did not make: it takes them as they are."""
    said = () if plan is None else plan.about.get(SAID, ())
    return {} if plan is None else {name: plan.elements[name] for name in said if name in plan.elements}


def _worth(program: Program, layer: PruneGroup) -> float:
    """What losing it costs."""
    low, high = ladder(layer, program.need("scores")[layer.name], float(layer.macs)).values
    return high - low


def _in_order(known: Sequence[Switch], chosen: Sequence[Switch]) -> list[Switch]:
    return [g for g in known if g in chosen]
