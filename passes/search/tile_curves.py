"""What a distortion curve is turned into before its slope is trusted: smoothed, differentiated, made convex."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def smooth_curve(curve: Tensor, weight: float) -> Tensor:
    """The exponential moving average, without the bias of its start.

    ``l <- w l + (1 - w) y,  y_k = l / (1 - w^k)``      w = 0 leaves the curve as it is

    Source   LSP's code (as in TensorBoard); the paper does not state w, the code uses 0.1 and 0.9

    >>> smooth_curve(torch.tensor([2.0, 2.0, 2.0]), 0.9).tolist()
    [2.0, 2.0, 2.0]
    """
    if weight == 0:
        return curve
    running, result = 0.0, []
    for k, value in enumerate(curve.tolist(), 1):
        running = weight * running + (1 - weight) * value
        result.append(running / (1 - weight**k))
    return torch.tensor(result, dtype=curve.dtype)


def derivative(curve: Tensor, step: float) -> Tensor:
    """Slope at every point by centred differences of five points; three and then two where the ends come near.

    ``(-y[i+2] + 8 y[i+1] - 8 y[i-1] + y[i-2]) / (12 step)``

    Exact on cubics, ends excepted. Source: LSP; its code stretches the stencil to a window of ten points, with weights
    that fit even windows only.
    """
    count = len(curve)
    if count < 2:
        return torch.zeros_like(curve)
    slope = torch.empty_like(curve)
    slope[0], slope[-1] = curve[1] - curve[0], curve[-1] - curve[-2]
    slope[1:-1] = (curve[2:] - curve[:-2]) / 2
    if count >= 5:
        slope[2:-2] = (-curve[4:] + 8 * curve[3:-1] - 8 * curve[1:-3] + curve[:-4]) / 12
    return slope / step


def convex_hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of the points (x ascending), both ends included.

    >>> convex_hull([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 1.0, 4.0])
    [0, 2, 3]
    """
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
