"""FinerCut: the layer whose loss changes the outputs least goes first, then the next one with that gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....data.batch import Calibration
from ....errors import OptionError
from ....ir.group import Switch
from ....ir.program import Program
from .distance import output_change
from .objective import Target
from .whole_layers import LayerCriterion, outputs_without

HAIR = 1e-6  # relative


@dataclass(frozen=True)
class FinerCut(LayerCriterion):
    """Greedily, ``g_t = argmin over g of D(f, f without g_1 .. g_(t-1), g)``; a layer is worth the D at which it went.

    samples   that are looked at, from all over the data
    most      so many steps at most (0: until nothing is left); layers that are left are worth the D of losing them then

    The worth rises along the order, by a hair where the outputs come nearer again: a search, or ``--layers -4``, then
    takes layers as the greedy order does.

    Unit     change of the outputs: D is ``output_change``, the KL of logits, half the squared change of others
    Source   Zhang et al. 2024, arXiv:2405.18218: attentions and feed-forwards apart, by the change of the model's
             output with earlier removals in place. It offers several distances; ours is that of the other criteria
    Cost     a run of the model per step and layer that is left
    Law      the first to go is the one whose removal alone changes the outputs least
    """

    samples: int = 16
    most: int = 0

    name = "finercut"
    unit = "output change"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.most < 0:
            raise OptionError(
                "finercut looks at one sample at least, and takes no fewer than no steps",
                where=f"finercut{{samples={self.samples},most={self.most}}}",
            )

    def losses(self, program: Program, data: Calibration | None, parts: Sequence[Switch]) -> dict[str, float]:
        batches = self.select_samples(program, data)
        dense = list(outputs_without(program, batches, ()))

        def change(gone: Sequence[Switch]) -> float:
            moved = zip(outputs_without(program, batches, gone), dense, strict=True)
            return float(torch.cat([_measure_change(now, was) for now, was in moved]).mean())

        found, gone, left, worth = dict[str, float](), list[Switch](), list(parts), 0.0
        while left:
            tried = {part.name: change([*gone, part]) for part in left}
            if self.most and len(gone) == self.most:
                return found | {name: max(worth, value) for name, value in tried.items()}
            first = min(left, key=lambda part: tried[part.name])
            worth = max(worth * (1 + HAIR) + HAIR**2, tried[first.name])
            gone = [*(g for g in gone if not g.inside < first.inside), first]
            # what lies inside went with it
            found |= {p.name: worth for p in left if p is first or p.inside < first.inside}
            left = [p for p in left if p.name not in found]
        return found


def _measure_change(now: Sequence[Target], was: Sequence[Target]) -> torch.Tensor:
    return output_change(now, was, 1.0).double()
