"""Calibration data: a few batches of model inputs, with labels or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch: positional and keyword inputs as the model takes them, and labels [batch] or [batch, ...] or None."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """A few batches and where they came from. ``generated`` is True when nobody gave data: results say so loudly."""

    batches: tuple[Batch, ...]
    origin: str
    generated: bool = False

    @property
    def samples(self) -> int:
        """Number of samples over all batches (the first dimension of each batch's first tensor)."""
        return sum(next(t for t in (*b.args, *b.kwargs.values()) if isinstance(t, Tensor)).shape[0] for b in self.batches)

    @property
    def labelled(self) -> bool:
        return all(b.labels is not None for b in self.batches)
