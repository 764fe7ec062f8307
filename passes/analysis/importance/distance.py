"""How far features and outputs move: the losses of the trajectory criterion, for one removal at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....data.metrics import relative_entropy
from .features import Tap, feature_rows, wide
from .objective import Target

IN_CACHE = 2**18  # entries


def map_change(changed: Tensor, dense: Tensor, gram: Tensor | None = None) -> Tensor:
    """``|| F' F'^T - F F^T ||_F^2`` of two [rows, width] in a difference form. Scalar, zero when they are equal.

    With E = F' - F the map moves by ``E F^T + F E^T + E E^T``. Where rows are fewer than columns this is summed as it
    stands; else, with C = F^T E and Q = E^T E (both [width, width]) and ``gram`` = F^T F,

        ``2 <gram, Q> + 2 <C, C^T> + 4 <C, Q> + <Q, Q>``

    Source   OPTIN, eq. 2; the form is that of methods 0.4.3 with S = 2F + E written out, which spares a product.
             The Gram identity ``|F'^T F'|^2 + |F^T F|^2 - 2 |F^T F'|^2`` would subtract nearly equal numbers: in fp32
             it is noise at changes of 1e-4, where one neuron lives
    """
    e = changed - dense
    if len(e) < e.shape[1]:
        a = e @ dense.T
        return (a + a.T + e @ e.T).square().sum()
    gram = dense.T @ dense if gram is None else gram
    c, q = dense.T @ e, e.T @ e
    # a change that leaves the map alone (all rows turned the same way) is zero up to rounding, of either sign
    return (2 * (gram * q).sum() + 2 * (c * c.T).sum() + 4 * (c * q).sum() + (q * q).sum()).clamp_min(0)


def mean_change(changed: Tensor, dense: Tensor, per_sample: bool) -> Tensor:
    """Squared change of feature maps [samples, ...] per entry: of their mean over samples, or the mean over samples.

    Source   OPTIN, A.10. Its reference code squares the sum of differences; the squares are summed here, and
             ``per_sample`` squares before the mean, so that samples that move apart do not cancel
    """
    e = changed - dense
    return e.square().mean() if per_sample else e.mean(0).square().mean()


def output_change(changed: Sequence[Target], dense: Sequence[Target], temperature: float) -> Tensor:
    """How far each sample's outputs moved, summed over the outputs. [samples]

    Logits: Hinton's ``tau^2 KL(softmax(t / tau) || softmax(s / tau))``, the mean over a sample's positions (in fp64, as
    the KL of nearly equal distributions is a difference). Other outputs: half the mean squared change of each sample's
    standardised output, whose leading term is what the random directions of ``objective`` measure.

    Source   OPTIN, eq. 3; its reference code leaves tau out of the softmax
    """
    total: Tensor | None = None
    for now, was in zip(changed, dense, strict=True):
        if now.logits:
            each = _divergence(now.value, was.value, temperature)
        else:
            each = (now.value - was.value).square().double() / 2
        each, count = now.count(each)
        moved = each.reshape(len(each), -1).sum(1) / count.double()
        total = moved if total is None else total + moved
    assert total is not None
    return total


def _divergence(now: Tensor, was: Tensor, temperature: float) -> Tensor:
    """[.., classes] -> [.., 1]: a few rows at a time, so that fp64 copies of large vocabularies stay in the cache."""
    rows, parts = max(1, IN_CACHE // was.shape[-1]), list[Tensor]()
    for some, dense in zip(now.flatten(0, -2).split(rows), was.flatten(0, -2).split(rows), strict=True):
        student, teacher = (functional.log_softmax(t.double() / temperature, -1) for t in (some, dense))
        each = temperature**2 * relative_entropy(teacher, student)
        parts.append(torch.where(some.eq(dense).all(-1), 0.0, each).clamp_min(0))
    return torch.cat(parts).reshape(*was.shape[:-1], 1)


@dataclass(frozen=True)
class Measure:
    """The options that say what is measured (see ``Trajectory``), and how.

    Every layer is measured by its mean squared entry, that is MD / rows^2: in a hierarchical encoder the first stage
    has thousands of times the entries of the last one and would decide alone (methods 4.2). ``reduction`` sum then
    multiplies all by the entries of the last layer, so that layers of equal size are summed entry by entry.
    """

    location: str = "ffn"
    taps: str = "later"
    normalised: bool = True
    rows: int = 0
    reduction: str = "sum"
    per_sample: bool = False
    temperature: float = 4.0
    output: bool = True

    def feature(self, tap: Tap, value: Tensor, mask: Tensor | None) -> Tensor:
        """Rows [rows, width] of a layer's features, or its maps [samples, ...]."""
        return feature_rows(value, tap, mask, self.normalised, self.rows) if tap.rows else wide(value)

    def entries(self, tap: Tap, feature: Tensor) -> float:
        """What layers' mean squared entries are multiplied by: those of the relational map, or of the mean map."""
        if self.reduction == "mean":
            return 1.0
        return float(len(feature) ** 2 if tap.rows else feature[0].numel())

    def change(self, tap: Tap, changed: Tensor, dense: Tensor, gram: Tensor | None = None) -> float:
        """Mean squared change per entry of one layer's relational map (or mean map)."""
        if not tap.rows:
            return float(mean_change(changed, dense, self.per_sample))
        return float(map_change(changed, dense, gram)) / max(len(dense), 1) ** 2
