"""The two terms of trajectory importance, features and output, and how they are added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....ir.program import Program
from .criterion import prunable

Scores = dict[str, Tensor]


def balance(program: Program, features: Scores, output: Scores, weight: float) -> float:
    """``weight * median(features per MAC) / median(output per MAC)`` over the elements that matter; 1 where one of the
    terms is zero everywhere, so that the other decides."""
    cost = {g.name: max(g.macs, 1) for g in prunable(program)}

    def median(scores: Scores) -> float:
        each = torch.cat([s / cost[name] for name, s in scores.items()]) if scores else torch.zeros(0)
        each = each[each > 0]
        return float(each.median()) if len(each) else 0.0

    one, two = median(features), median(output)
    return weight * one / two if one and two else 1.0


def combine(features: Mapping[str, Tensor], output: Mapping[str, Tensor], factor: float) -> Scores:
    """``features + factor * output``"""
    return {name: f + factor * output[name] for name, f in features.items()}


@dataclass
class PowersOfTen:
    """The reference code's lambda: ``MD + KD 10^trunc(log10(MD / KD) - log10(ratio))``, a power for every element.

    Where MD is no larger than KD, or KD is zero, the mean of the earlier powers stands in (1 before the first). MD is
    then ``ratio`` to ten times ``ratio`` times KD, whatever KD was: as KD grows its share falls back to a tenth at
    every power of ten, and ranks depend on the order of the elements. For comparison with published figures.

    Source  appendix A.2 of OPTIN, and its reference code (methods 1.3)

    >>> changed = torch.tensor([0.002, 0.0099, 0.0101], dtype=torch.float64)
    >>> added = PowersOfTen(10.0)({"g": torch.full((3,), 10.0)}, {"g": changed})["g"]
    >>> [round(float(v), 3) for v in added]
    [10.2, 10.99, 10.101]
    """

    ratio: float
    powers: int = 0
    total: float = 0.0

    def __call__(self, features: Mapping[str, Tensor], output: Mapping[str, Tensor]) -> Scores:
        return {
            name: torch.tensor(
                [a + b * self._power(a, b) for a, b in zip(f.tolist(), output[name].tolist(), strict=True)],
                dtype=torch.float64,
            )
            for name, f in features.items()
        }

    def _power(self, features: float, output: float) -> float:
        if not features > output > 0:
            return self.total / self.powers if self.powers else 1.0
        power = 10.0 ** math.trunc(math.log10(features / output) - math.log10(self.ratio))
        self.powers, self.total = self.powers + 1, self.total + power
        return power
