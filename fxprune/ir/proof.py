"""The chain of proof from a user's module to a file: links between two forms of the model that must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Link:
    """Two neighbouring forms of a model, and how near their outputs were.

    compared   both, in words: "the module and its captured graph"
    max_rel    largest difference of an output, relative to its largest magnitude
    tolerance  the largest that is accepted
    tried      the sizes of each run, by their names: ``({"batch": 2}, {"batch": 3})``
    rounded    a larger difference that is rounding: the model itself is as far from what fp64 gives
    """

    compared: str
    max_rel: float
    tolerance: float
    tried: tuple[Mapping[str, int], ...] = ()
    rounded: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "compared": self.compared,
            "max_rel": self.max_rel,
            "tolerance": self.tolerance,
            "tried": [dict(sizes) for sizes in self.tried],
            **({"rounded": self.rounded} if self.rounded else {}),
        }
