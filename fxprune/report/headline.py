"""The figure that anybody sees first: how much of the dense model is left, on which samples, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MEASURES = {
    "accuracy": "accuracy",
    "top1": "agreement with dense (top 1)",
    "relational": "relational agreement",
    "cosine": "cosine with dense",
    "kl": "KL to dense, nats",
}
HELD_OUT, CROSS_FITTED, SEEN = "held-out", "cross-fitted", "seen"


@dataclass(frozen=True)
class Headline:
    """One figure of a report.

    measure  a key of ``MEASURES``;  dense: of the dense model;  value: of the result
    samples  that it was measured on;  on: ``held-out``, where nothing was decided or fitted on them; ``cross-fitted``,
             where fits were judged on samples that they had not seen; ``seen``, an upper bound
    """

    measure: str
    dense: float | None
    value: float
    samples: int
    on: str

    @property
    def error(self) -> float | None:
        """Standard error over samples: of shares as Agresti and Coull 1998 have it, who count two more of either kind
        (none of 50 is not sure to be none), of rank correlations (1 - r^2) / sqrt(n); None for a mean cosine.

        >>> round(Headline("top1", 1.0, 0.9, 50, "held-out").error, 3)
        0.046
        """
        if self.measure in ("accuracy", "top1"):
            share = (self.value * self.samples + 2) / (self.samples + 4)
            return float((share * (1 - share) / (self.samples + 4)) ** 0.5)
        return None if self.measure == "cosine" else float((1 - self.value**2) / max(self.samples, 1) ** 0.5)

    def __str__(self) -> str:
        sure = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.value:.4f}{sure}"

    @property
    def about(self) -> str:
        """The measure in words, and on which samples."""
        return f"{MEASURES[self.measure]}, {self.samples} {self.on} samples"


def headline(report: Mapping[str, Any]) -> Headline | None:
    """Accuracy where labels are, else agreement; on samples that nothing was fitted on where there are any. None where
    nothing was compared."""
    told = report.get("agreement")
    if not told or not told["steps"]:
        return None
    crossed = None if told["held_out"] else told.get("cross_fitted")
    figures = crossed or told["steps"][-1]
    name = measure_of(figures)
    if not name:
        return None
    dense = told.get("dense_accuracy") if name == "accuracy" else 1.0
    on = CROSS_FITTED if crossed else HELD_OUT if told["held_out"] else SEEN
    return Headline(name, dense, float(figures[name]), int((crossed or told)["samples"]), on)


def measure_of(figures: Mapping[str, Any]) -> str:
    """The figure that says most: accuracy, else agreement of the largest logit, else relational, else cosine."""
    return next((name for name in ("accuracy", "top1", "relational", "cosine") if name in figures), "")
