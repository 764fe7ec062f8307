"""What recovery did, as data for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What the closed form did at one layer: weighted mean squared error of its target per row, before and after.

    rel     ridge strength that was used (it is raised where the weights would change by more than their size)
    change  size of the change against that of the kept weight, Frobenius; 0 where only the bias moved
    """

    node: str
    parameter: str
    role: str  # reads: sums over a cut axis; makes: input refit of a projection that makes one; carries: goes past
    # layers that are gone, and makes up for them
    weighted_by: str  # the norm behind the target: variance, power or nothing
    rows: int
    before: float
    after: float
    rel: float = 0.0
    change: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """What the optimiser steps did.

    start, best   agreement on the held-out samples before the first step and at the best check
    at            the step whose weights were the best ones;  kept: whether they were kept
    losses        first, last, best: means over a round of the batches (the first, the last, the smallest of any)
    """

    steps: int
    at: int
    kept: bool
    lr: float
    seed: int
    parameters: int
    batches: int
    losses: Mapping[str, float]
    start: Mapping[str, float]
    best: Mapping[str, float]
    why: str = ""


@dataclass(frozen=True)
class Recovery:
    """What was done.

    method      that was kept;  asked: that was asked for;  chosen: its name in the guard's list
    samples     that the weights were fitted to;  held_out: that candidates were judged on
    folds       1: fitted to one part of the data and judged on the other; more: every sample was judged once, by a fit
                that had not seen it; 0: not judged
    refitted    whether the chosen closed form was fitted again to all samples, the judged ones included
    steps       per layer, in graph order
    guard       candidate -> agreement with the dense outputs on held-out samples (``auto`` and ``tune``)
    rejected    candidate -> why it was not eligible
    tuning      the optimiser steps (``tune`` only)
    skipped     layer -> why it was left as it was
    """

    method: str
    asked: str
    rel: float = 0.0
    refit_rel: float = 0.0
    samples: int = 0
    held_out: int = 0
    folds: int = 0
    refitted: bool = False
    steps: tuple[Step, ...] = ()
    guard: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    tuning: Tuning | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    chosen: str = ""

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "steps": [asdict(s) for s in self.steps]}

    def __str__(self) -> str:
        gained = [1 - s.after / s.before for s in self.steps if s.before > 0]
        share = f", {100 * sum(gained) / len(gained):.0f} % of the error of {len(gained)} layers" if gained else ""
        tuned = f", {self.tuning.at} steps of tuning" if self.tuning is not None and self.tuning.kept else ""
        again = ", judged on held-out ones and fitted again to all" if self.refitted else ""
        return f"recovery '{self.method}' on {self.samples} samples{again}{share}{tuned}"


@dataclass(frozen=True)
class Fitted:
    """A candidate: the changed tensors of the pruned program by placeholder, and the record."""

    recovery: Recovery
    tensors: dict[str, Tensor]
