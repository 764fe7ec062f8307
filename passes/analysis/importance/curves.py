"""Damage measured at a few counts of a group: the whole curve, what each element is worth by it, where to measure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def fill(curve: Sequence[tuple[int, float]], size: int) -> Tensor:
    """[size + 1] what keeping k elements is worth: minus the damage, linear between the points, never falling.

    >>> fill([(1, 2.0), (3, 0.0)], 3)
    tensor([0., 1., 2., 3.], dtype=torch.float64)
    """
    least, points = float("inf"), []
    for count, level in curve:
        least = min(least, level)
        points.append((count, least))
    damage = torch.zeros(size + 1, dtype=torch.float64)
    for (low, before), (high, after) in pairwise(points):
        damage[low : high + 1] = torch.linspace(before, after, high - low + 1, dtype=torch.float64)
    first_count, first_damage = points[0]
    slope = damage[first_count] - damage[min(first_count + 1, size)]
    damage[:first_count] = first_damage + slope * torch.arange(first_count, 0, -1, dtype=torch.float64)
    return damage[0] - damage


def some(counts: Sequence[int], many: int) -> list[int]:
    """At most ``many`` of the counts, ascending, evenly spread in the ratio of neighbours, with both ends."""
    counts = sorted(counts)
    if len(counts) <= many:
        return counts
    low, high = max(counts[0], 1), counts[-1]
    wanted = [low * (high / low) ** (i / (many - 1)) for i in range(many)]
    return sorted({min(counts, key=lambda c: (abs(c - w), c)) for w in wanted} | {counts[0]})


def slopes(order: Sequence[int], curve: Sequence[tuple[int, float]]) -> Tensor:
    """Scores whose k best add up to what the convex hull of the damage curve says that k elements are worth. [size]

    order   elements as they go;  curve: (count kept, damage), ascending in the count

    >>> slopes([2, 0, 1], [(0, 6.0), (1, 2.0), (3, 0.0)])
    tensor([1., 4., 1.], dtype=torch.float64)
    """
    hull: list[tuple[int, float]] = []
    least = float("inf")
    for count, damage in curve:  # a curve that rises with what is kept is noise: more kept can always do as well
        least = min(least, damage)
        point = (count, least)
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0]) >= (point[1] - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    worth = torch.zeros(len(order), dtype=torch.float64)
    for (low, before), (high, after) in pairwise(hull):
        worth[low:high] = max(before - after, 0.0) / (high - low)
    worth[: hull[0][0]] = worth[hull[0][0]] if hull[0][0] < len(order) else 0.0  # below the floor nothing is asked
    scores = torch.zeros(len(order), dtype=torch.float64)
    scores[torch.tensor(list(reversed(order)), dtype=torch.long)] = worth
    return scores
