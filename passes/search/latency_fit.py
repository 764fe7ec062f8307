"""A measured table of latencies as a line with a flat start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import OptionError


def rising(values: Sequence[float]) -> list[float]:
    """The closest sequence that never falls, by least squares (pool adjacent violators).

    >>> rising([1.0, 3.0, 2.0, 4.0])
    [1.0, 2.5, 2.5, 4.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [value for value, many in pools for _ in range(many)]


@dataclass(frozen=True)
class LatencyFit:
    """``T(0) = 0;  T(n) = constant for 1 <= n <= threshold;  T(n) = constant + slope * (n - threshold)`` beyond.

    Hardware runs a narrow layer no faster than a somewhat wider one, so the first units are free once a layer is
    there, and the others cost the same each.

    threshold   units up to which the time does not change
    constant    time of a layer that is there at all, in the unit of the table
    slope       time per unit beyond the threshold, never negative
    error       sum of squared differences from the table
    """

    threshold: int
    constant: float
    slope: float
    error: float

    def __call__(self, count: int) -> float:
        """Time at ``count`` units."""
        return 0.0 if count <= 0 else self.constant + self.slope * max(0, count - self.threshold)


def fit_latency(table: Sequence[float]) -> LatencyFit:
    """The fit of least squared error; of equal ones that with the smallest threshold.

        for every threshold t:  ``c = mean(table[:t])``,  ``a = max(0, sum x y / sum x^2)``  over  ``y = table[t:] - c``
        at ``x = 1, 2, ..``  (0 where nothing is left)

    table    ``table[n - 1]`` is the measured time of n units
    Source   Kwon et al. 2022, arXiv:2204.09656, section 4.1
    Errors   OptionError for an empty table, or times that are negative or not finite

    >>> fit_latency([1, 1, 1, 2, 3])
    LatencyFit(threshold=3, constant=1.0, slope=1.0, error=0.0)
    """
    if not table or not all(math.isfinite(time) and time >= 0 for time in table):
        raise OptionError(
            "this is no table of latencies",
            where="latencies",
            why="it is empty, or holds a time that is negative or not finite",
            cure="measure every count from one unit to all of them",
        )
    best: LatencyFit | None = None
    for threshold in range(1, len(table) + 1):
        constant = math.fsum(table[:threshold]) / threshold
        rest = [time - constant for time in table[threshold:]]
        weight = sum(x * x for x in range(1, len(rest) + 1)) or 1
        slope = max(0.0, math.fsum(x * y for x, y in enumerate(rest, 1)) / weight)
        error = math.fsum(
            [
                *((time - constant) ** 2 for time in table[:threshold]),
                *((y - slope * x) ** 2 for x, y in enumerate(rest, 1)),
            ]
        )
        if best is None or error < best.error:
            best = LatencyFit(threshold, constant, slope, error)
    assert best is not None
    return best
