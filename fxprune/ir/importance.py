"""Importance: one non-negative number per element of a group, and what else a criterion knows of its elements."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InternalError


@dataclass(frozen=True)
class ImportanceScores:
    """How much it hurts to remove each element of one group.

    values      [size], finite, >= 0, larger is more important
    criterion   the name that made them
    unit        what one unit of score means, e.g. ``nats`` or ``weight norm``
    comparable  True when scores of different groups share the unit and may be ranked against each other (losses);
                False when they only rank elements within their group (norms)
    seed        seed of whatever was drawn at random while scoring
    gradients   [rows, size] float32 or None: derivatives of the loss by each element's mask, a row per sample or per
                sum of some samples. Their products say which elements make up for each other (``Rearrange``)
    order       [size] int64 or None: all elements, the last to be removed first; by default the values' order
    curve       [size + 1] or None: what the ``k`` first elements of the order are worth together, for every k. For
                damages that do not add up, e.g. measured after a repair; non-decreasing, in the scores' unit.
                By default the sum of their values. Where scores only rank: in shares of what the dense network spends
                on the group
    whole       what losing all elements at once costs, measured, in the scores' unit; None: their sum

    Raises InternalError for shapes, orders or curves that are none.
    """

    group: str
    values: Tensor
    criterion: str
    unit: str
    comparable: bool = False
    seed: int = 0
    gradients: Tensor | None = field(default=None, repr=False, compare=False)
    order: Tensor | None = field(default=None, repr=False, compare=False)
    curve: Tensor | None = field(default=None, repr=False, compare=False)
    whole: float | None = None

    def ranking(self) -> list[int]:
        """Elements, the last to be removed first; ties by index. [size]"""
        if self.order is not None:
            return [int(i) for i in self.order.tolist()]
        values = self.values.detach().to("cpu", torch.float64)
        return [int(i) for i in torch.argsort(values, descending=True, stable=True).tolist()]

    def __post_init__(self) -> None:
        if self.values.dim() != 1:
            raise InternalError(f"scores of {self.group} have shape {list(self.values.shape)}, expected [size]")
        if not torch.isfinite(self.values).all() or (self.values < 0).any():
            raise InternalError(f"criterion {self.criterion} gave a negative or non-finite score for {self.group}")
        size, gradients, order, curve = len(self.values), self.gradients, self.order, self.curve
        if gradients is not None and (gradients.dim() != 2 or gradients.shape[1] != size):
            raise InternalError(f"gradients of {self.group}: shape {list(gradients.shape)}, expected [rows, {size}]")
        if gradients is not None and not torch.isfinite(gradients).all():
            raise InternalError(f"criterion {self.criterion} gave a non-finite gradient for {self.group}")
        if order is not None and sorted(order.tolist()) != list(range(size)):
            raise InternalError(f"the order of {self.group} is no order of its {size} elements")
        if curve is not None and curve.shape != (size + 1,):
            raise InternalError(f"the curve of {self.group} has shape {list(curve.shape)}, expected [{size + 1}]")
        if curve is not None and (not torch.isfinite(curve).all() or (curve[1:] < curve[:-1]).any()):
            raise InternalError(f"criterion {self.criterion} gave a falling or non-finite curve for {self.group}")
        if self.whole is not None and not 0 <= self.whole < math.inf:
            raise InternalError(f"losing all of {self.group} cannot cost {self.whole}")
