"""Distortion curves: how much the loss changes when the first tiles of an order are zeroed, for every count at once."""

from __future__ import annotations

import torch
from torch import Tensor

CURVES = ("fisher", "taylor2")


def distortion(products: Tensor, energy: Tensor, kind: str = "fisher", kappa: float = 0.0) -> Tensor:
    """delta(k) for k = 0 .. nb removed tiles. [nb + 1] float64

        c_n(k) = - sum of the first k P[n, b]  (= g_n^T dW),   w2(k) = sum of the first k |W_b|^2
        fisher:   mean_n c_n(k)^2 + kappa w2(k)
        taylor2:  mean_n c_n(k) + 1/2 [kappa w2(k) + mean_n c_n(k)^2]

    products  P [samples, nb] in the order of removal: P[n, b] = sum over tile b of W * dL_n/dW
    energy    |W_b|^2 [nb] in the same order
    Memory    samples x nb; never a Hessian: with H = kappa I + mean g g^T the quadratic form is a square of sums
    Source    LSP, Eq. 6, 9, 10 and 12. ``fisher`` leads the paper's squared objective, whose square its Eq. 10
              drops; ``taylor2`` is what Eq. 11 differentiates. The reference code uses one gradient averaged over all
              batches (rank one) and counts the cross terms of Eq. 13 twice; we follow the paper's Eq. 12 and 13
    Law       zero at k = 0; equal to the dense quadratic form

    >>> distortion(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.zeros(2)).tolist()
    [0.0, 5.0, 6.5]
    >>> distortion(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.zeros(2), "taylor2").tolist()
    [0.0, 0.5, 0.75]
    """
    start = torch.zeros(1, dtype=torch.float64)
    sums = -products.double().cumsum(1)
    square = torch.cat([start, sums.square().mean(0) + 0.0])
    weights = kappa * torch.cat([start, energy.double().cumsum(0)])
    if kind == "taylor2":
        return torch.cat([start, sums.mean(0)]) + 0.5 * (weights + square)
    return square + weights


def isotonic(curve: Tensor) -> Tensor:
    """The smallest non-decreasing curve above it: its running maximum.

    >>> isotonic(torch.tensor([0.0, 2.0, 1.0, 3.0])).tolist()
    [0.0, 2.0, 2.0, 3.0]
    """
    return torch.cummax(curve, 0).values
