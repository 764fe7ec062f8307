"""Importance: one non-negative number per element of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InternalError


@dataclass(frozen=True)
class ImportanceScores:
    """How much it hurts to remove each element of one group.

    values      [size], finite, >= 0, larger is more important
    criterion   the name that made them
    unit        what one unit of score means, e.g. ``nats`` or ``weight norm``
    comparable  True when scores of different groups share the unit and may be ranked against each other (losses);
                False when they only rank elements within their group (norms)
    seed        seed of whatever was drawn at random while scoring
    """

    group: str
    values: Tensor
    criterion: str
    unit: str
    comparable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.values.dim() != 1:
            raise InternalError(f"scores of {self.group} have shape {list(self.values.shape)}, expected [size]")
        if not torch.isfinite(self.values).all() or (self.values < 0).any():
            raise InternalError(f"criterion {self.criterion} gave a negative or non-finite score for {self.group}")
