"""The few ways in which the kernel may run. ``fxprune tune`` measures them; without a measurement the default is taken.

``stages`` count double here: where a tile stands must be loaded before the rows of x that it meets, so the compiler's
pipeline spends every other stage on the index. Six stages keep the operands of two (sm_80) or three (sm_90) products in
shared memory, three stages keep one, which hides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Tile = tuple[int, int]


@dataclass(frozen=True)
class Configuration:
    """rows of x per program (BM), warps per program, and the depth of the pipeline of loads (stages)."""

    rows: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"rows={self.rows},warps={self.warps},stages={self.stages}"

    @staticmethod
    def parse(text: str) -> Configuration:
        """What ``str`` wrote."""
        return Configuration(**{key: int(value) for key, _, value in (part.partition("=") for part in text.split(","))})


_SMALL = (Configuration(64, 4, 8), Configuration(128, 4, 8))
_LARGE = (Configuration(64, 4, 6), Configuration(128, 4, 6), Configuration(256, 8, 6))
_WIDE = (Configuration(64, 4, 6), Configuration(128, 8, 6))
CONFIGURATIONS: Mapping[Tile, tuple[Configuration, ...]] = {
    (16, 16): _SMALL,
    (16, 32): _SMALL,
    (32, 16): _SMALL,
    (32, 32): _SMALL,
    (64, 64): _LARGE,
    (128, 64): _WIDE,
}
"""Tile (BN, BK) -> what is worth measuring; the first two are the defaults for few and for many rows. Tensor cores want
16 or more on every side. What a program loads per product falls with rows and BN: where x comes from the L2 cache, 128
rows by 64 outputs make 43 operations per byte, 256 by 128 make 85, so large tiles are what can keep tensor cores busy.
"""
SLACK = 256  # bytes of shared memory for synchronisation
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Compute capability -> bytes of shared memory that one program may take."""


def usable(tile: Tile, element_size: int) -> tuple[Configuration, ...]:
    """The configurations that fit every chip: operands of two products on the one with the least shared memory."""
    least = min(SHARED_LIMIT.values())
    return tuple(
        one for one in CONFIGURATIONS[tile] if 2 * (one.rows + tile[0]) * tile[1] * element_size + SLACK <= least
    )


def default(m: int, tile: Tile, element_size: int) -> Configuration:
    """Without a measurement: few rows per program where there are few rows, so that there are enough programs."""
    several = usable(tile, element_size)
    return several[0] if m < 4096 else several[min(1, len(several) - 1)]
