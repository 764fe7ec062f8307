"""How many tiles of each layer go, so that the result costs at most so much: pure functions on curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .tile_curves import convex_hull, derivative, smooth_curve

HALVINGS = 100


@dataclass(frozen=True)
class LayerCurve:
    """One layer: its tiles in the order in which they go.

    saved   MACs that are saved when the first k are gone, [tiles + 1], from 0
    delta   what that does to the loss, [tiles + 1], non-decreasing from 0
    most    how many may go
    size    M N K / (BN BK): tile products of the dense layer times its rows
    """

    name: str
    saved: tuple[int, ...]
    delta: tuple[float, ...]
    most: int
    size: float


Counts = list[int]
"""Tiles gone per layer."""


def uniform(layers: Sequence[LayerCurve], target: int) -> Counts:
    """The same share of every layer, then tile by tile through the layers until ``target`` MACs are saved."""
    whole = sum(one.saved[one.most] for one in layers)
    share = min(1.0, target / whole) if whole else 0.0
    gone = [min(one.most, int(share * one.most)) for one in layers]
    return _until(layers, gone, [one.most for one in layers], target, [0.0 for _ in layers])


def kkt(layers: Sequence[LayerCurve], target: int) -> Counts:
    """Least total distortion: segments of every layer's convex hull, by distortion per MAC, until ``target`` is saved.

    The condition of ``min sum delta_i  s.t. sum saved_i >= target`` is ``d delta_i / d saved_i = mu`` in every layer.
    There is no parameter. Exact on convex curves of equal tile cost; else off by at most one tile at the end.
    """
    segments = []
    for i, one in enumerate(layers):
        x, y = [float(v) for v in one.saved[: one.most + 1]], one.delta[: one.most + 1]
        for a, b in itertools.pairwise(convex_hull(x, y)):
            segments.append(((y[b] - y[a]) / max(x[b] - x[a], 1.0), i, a, b))
    gone = [0 for _ in layers]
    saved = 0
    for _, i, a, b in sorted(segments):
        for k in range(a + 1, b + 1):
            if saved >= target:
                return gone
            saved += layers[i].saved[k] - layers[i].saved[k - 1]
            gone[i] = k
    return gone


def lsp(layers: Sequence[LayerCurve], target: int, power: bool = True, smooth: float = 0.6) -> Counts:
    """LSP's rule: every layer goes to the largest ratio whose slope is at most ``lambda + beta size_i``.

        d delta_i / d alpha_i = lambda + beta M_i N_i K_i / (BN BK)                                       (Eq. 11)
        beta = sum_l max_alpha |d delta_l / d alpha| / sum_l M_l N_l K_l / (BN BK)                         (Eq. 14)

    lambda is found by bisection; where beta alone saves more than asked, lambda is 0 and beta is what is bisected.
    Slopes are those of the curve's convex hull, smoothed first, so that the largest ratio is the only one. The last
    lambda's jump is given back tile by tile.

    power    False: without the term in beta
    Differs from the reference code on purpose: its cost counts the *pruned* share, which flips the sign of beta and
    protects large layers; here, as in Eq. 11, larger layers may be pruned to a steeper slope.
    """
    slopes = [_slopes(one, smooth) for one in layers]
    steepest = [max((abs(s) for s in each), default=0.0) for each in slopes]
    scale = sum(one.size for one in layers)
    beta = sum(steepest) / scale if power and scale else 0.0

    def at(level: float, factor: float) -> Counts:
        return [_largest(each, level + factor * beta * one.size) for one, each in zip(layers, slopes, strict=True)]

    def bisect(counts: Callable[[float], Counts], high: float) -> tuple[Counts, Counts]:
        low = 0.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if _count_saved(layers, counts(middle)) >= target else (middle, high)
        return counts(low), counts(high)

    if beta and _count_saved(layers, at(0.0, 1.0)) >= target:
        few, many = bisect(lambda factor: at(0.0, factor), 1.0)
        levels = [0.0 for _ in layers]
    else:
        few, many = bisect(lambda level: at(level, 1.0), 2.0 * max([*steepest, 1e-30]))
        levels = [beta * one.size for one in layers]
    if _count_saved(layers, many) < target:
        return [one.most for one in layers]
    return _until(layers, [min(a, b) for a, b in zip(few, many, strict=True)], many, target, levels, slopes)


def _slopes(one: LayerCurve, smooth: float) -> list[float]:
    """d delta / d alpha of removing tile k (k = 1 .. most), non-decreasing: of the hull of the smoothed curve."""
    delta = smooth_curve(torch.tensor(one.delta, dtype=torch.float64), smooth)
    count = len(delta) - 1
    hull = convex_hull([float(i) for i in range(count + 1)], delta.tolist())
    smooth_hull = torch.empty_like(delta)
    for a, b in itertools.pairwise(hull):
        smooth_hull[a : b + 1] = torch.linspace(float(delta[a]), float(delta[b]), b - a + 1, dtype=delta.dtype)
    slope = derivative(smooth_hull, 1.0 / max(count, 1))
    each: list[float] = torch.cummax(slope[1:], 0).values[: one.most].tolist()
    return each


def _largest(slopes: Sequence[float], level: float) -> int:
    """How many tiles go at this slope: ``slopes`` never fall."""
    low, high = 0, len(slopes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if slopes[middle] <= level else (low, middle)
    return low


def _count_saved(layers: Sequence[LayerCurve], gone: Counts) -> int:
    return sum(one.saved[k] for one, k in zip(layers, gone, strict=True))


def _until(
    layers: Sequence[LayerCurve],
    gone: Counts,
    most: Sequence[int],
    target: int,
    levels: Sequence[float],
    slopes: Sequence[Sequence[float]] | None = None,
) -> Counts:
    """From ``gone`` on, one tile at a time, least slope above its level first, until ``target`` is saved."""
    gone, saved = list(gone), _count_saved(layers, gone)
    while saved < target:
        open_ = [i for i, k in enumerate(gone) if k < most[i]]
        if not open_:
            break
        i = min(open_, key=lambda i: (slopes[i][gone[i]] - levels[i] if slopes else 0.0, gone[i] / layers[i].most, i))
        saved += layers[i].saved[gone[i] + 1] - layers[i].saved[gone[i]]
        gone[i] += 1
    return gone
