"""Structured OBS: which elements of a group to remove in which order, when the others make up for each removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 64
"""One in so many of the remaining elements goes per step: one by one near the end, several where there are many."""
COMPACT = 0.7  # share of columns that are left when the others are dropped


@dataclass(frozen=True)
class Layer:
    """What one layer that reads the group knows, fp64.

    g      [k, k] weighted, centred second moments of its inputs;  weight [o, k];  unit [k]: the element that each input
           column belongs to, -1 for columns of no element of this group
    """

    g: Tensor
    weight: Tensor
    unit: Tensor


def removal(layers: Sequence[Layer], size: int, rel: float) -> tuple[list[int], list[float]]:
    """(elements in the order of their removal, squared error that each one adds): greedy structured OBS.

    Per step the element with the smallest ``sum over layers of tr(W_S (Hi_SS)^-1 W_S^T)`` goes and the layers move by

        ``W <- W - W_S (Hi_SS)^-1 Hi_S,:``      ``Hi <- Hi - Hi_:,S (Hi_SS)^-1 Hi_S,:``

    with ``Hi = (G + rel mean(diag G) I)^-1``.

    Source  Frantar and Alistarh 2022 (OBC), arXiv:2208.11580, eq. 4 and 7; its structured form: Kurtic et al. 2023
            (ZipLM), arXiv:2302.04089, eq. 2 and 3. Unlike the reference, several elements go at once where many are
            left (one in ``AT_ONCE``), updated jointly
    Law     increments are >= 0; an element whose columns are zero in every layer goes at no cost; removing elements
            one after the other adds up to the joint least-squares error
    """
    state = [_State.of(layer, rel) for layer in layers]
    home = layers[0].g.device if layers else torch.device("cpu")
    alive = torch.ones(size, dtype=torch.bool, device=home)
    order: list[int] = []
    added: list[float] = []
    while bool(alive.any()):
        cost = torch.zeros(size, dtype=torch.float64, device=home)
        for one in state:
            cost += one.saliency(size)
        cost[~alive] = torch.inf
        count = max(1, int(alive.sum()) // AT_ONCE)
        chosen = torch.topk(cost, count, largest=False, sorted=True).indices
        joint = sum(one.remove(chosen) for one in state)
        alone = cost[chosen].clamp_min(0)
        share = alone / alone.sum() if float(alone.sum()) > 0 else torch.full_like(alone, 1 / count)
        order += chosen.tolist()
        added += (max(joint, 0.0) * share).tolist()
        alive[chosen] = False
    return order, added


class _State:
    """A layer on its way: the columns that are left, their weights and the inverse of their damped moments."""

    def __init__(self, weight: Tensor, inverse: Tensor, unit: Tensor) -> None:
        self.weight, self.inverse, self.unit = weight, inverse, unit
        self.left = torch.ones(len(unit), dtype=torch.bool, device=unit.device)

    @classmethod
    def of(cls, layer: Layer, rel: float) -> _State:
        g, k = layer.g.double(), len(layer.g)
        level = float(g.diagonal().mean()) if k else 0.0
        damped = g + (rel * level or 1.0) * torch.eye(k, dtype=g.dtype, device=g.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        inverse = torch.cholesky_inverse(factor) if int(failed) == 0 else torch.linalg.pinv(damped, hermitian=True)
        return cls(layer.weight.double().clone(), inverse, layer.unit.clone())

    def saliency(self, size: int) -> Tensor:
        """``tr(W_S (Hi_SS)^-1 W_S^T)`` of every element. [size]"""
        out = torch.zeros(size, dtype=torch.float64, device=self.weight.device)
        mine = torch.nonzero(self.unit >= 0)[:, 0]
        if not len(mine):
            return out
        label, position = self.unit[mine].sort(stable=True)
        columns = mine[position]
        _, counts = torch.unique_consecutive(label, return_counts=True)
        if bool((counts == 1).all()):
            out[label] = self.weight[:, columns].square().sum(0) / self.inverse.diagonal()[columns].clamp_min(1e-300)
            return out
        starts = counts.cumsum(0) - counts
        for width in counts.unique().tolist():
            first = starts[counts == width]
            block = columns[first[:, None] + torch.arange(width, device=first.device)]  # [elements, width]
            inner = self.inverse[block[:, :, None], block[:, None, :]]
            w = self.weight[:, block].permute(1, 2, 0)  # [elements, width, o]
            out[label[first]] = (w * torch.linalg.solve(inner, w)).sum((1, 2))
        return out

    def remove(self, elements: Tensor) -> float:
        """Take the columns of ``elements`` out, move the others; the squared error that this adds."""
        gone = torch.nonzero(torch.isin(self.unit, elements))[:, 0]
        if not len(gone):
            return 0.0
        w, rows = self.weight[:, gone], self.inverse[gone]
        both = torch.linalg.solve(rows[:, gone], torch.cat([rows, w.T], 1))
        across, w_part = both[:, : rows.shape[1]], both[:, rows.shape[1] :]
        # in place: the columns that go become zero by this, and are dropped once there are many of them
        self.weight.addmm_(w, across, alpha=-1)
        self.inverse.addmm_(rows.T, across, alpha=-1)
        self.unit[gone], self.left[gone] = -1, False
        if int(self.left.sum()) < COMPACT * len(self.left):
            stay = torch.nonzero(self.left)[:, 0]
            self.weight, self.unit = self.weight[:, stay], self.unit[stay]
            self.inverse, self.left = self.inverse[stay][:, stay], self.left[stay]
        return float((w.T * w_part).sum())
