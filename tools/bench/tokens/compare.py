"""Comparing measurements of tools/bench/tokens.py: on the same images, over the draws of a reducer that draws, over
reducers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bench.tokens.cells import DRAWN, RATIOS, REDUCERS, Record, add_schedule, ledgers, reducer

AVERAGED = ("accuracy", "agreement", "kl")
SURE = 2.0  # standard errors beyond which a difference is taken for one


def pack_bits(bits: Tensor) -> str:
    """Which images were right, as text: two measurements can be compared image by image. [n] of bool"""
    return base64.b64encode(np.packbits(bits.numpy()).tobytes()).decode()


def answers(record: Mapping[str, Any], further: bool) -> np.ndarray:
    """Which images were right: those of the test split, then the ``further`` ones. [images] of 0, 1"""
    parts = [record, *([record["further"]] if further else [])]
    return np.concatenate(
        [np.unpackbits(np.frombuffer(base64.b64decode(p["right"]), np.uint8))[: p["images"]] for p in parts]
    ).astype(float)


def apart(ones: Sequence[Record], twos: Sequence[Record]) -> np.ndarray | None:
    """By how much ``ones`` are more often right than ``twos``, image by image, a row per pair. [pairs, images]

    On the images that all of them were judged on; None where answers are not recorded.
    """
    both = [*ones, *twos]
    if not ones or len(ones) != len(twos) or any("right" not in r for r in both):
        return None
    images = min(r["images"] for r in both)  # of the test split, the first ones of each
    further = all("further" in r and r["images"] == images for r in both)
    found = [answers(r, further)[: None if further else images] for r in both]
    return np.stack([a - b for a, b in zip(found, found[len(ones) :], strict=False)])


def points(apart: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) in points, of what :func:`apart` gives. Other images would give another mean, and so would
    other draws: the variance of the mean is the sum of both."""
    draws, images = apart.shape
    variance = apart.mean(axis=0).var(ddof=1) / images
    if draws > 1:
        variance += apart.mean(axis=1).var(ddof=1) / draws
    return 100 * float(apart.mean()), 100 * float(variance) ** 0.5


def difference(one: Record, two: Record) -> tuple[float, float]:
    """(accuracy of ``one`` minus that of ``two``, its standard error), both in points, over the same images."""
    found = apart([one], [two])
    if found is None:
        raise ValueError("which images were right is not recorded")
    return points(found)


def draws(records: Iterable[Record], row: str, schedule: str, ratio: float) -> list[Record]:
    """The measurements of a cell of the sweep by seed: one, or as many as a reducer that draws was measured with."""
    found = sorted(
        (
            r
            for r in records
            if "accuracy" in r
            and r["ratio"] == ratio
            and r["recover"] == "none"
            and r["prune"] == "tokens"
            and r["tokens"] == add_schedule(reducer(row, r["seed"]), schedule)
        ),
        key=lambda r: int(r["seed"]),
    )
    return found if row in DRAWN else found[:1]


def pairs(
    records: Sequence[Record], row: str, schedule: str, other: str, ratio: float
) -> tuple[list[Record], list[Record]]:
    """The measurements of two schedules at the seeds that both have."""
    ones, twos = ({int(r["seed"]): r for r in draws(records, row, name, ratio)} for name in (schedule, other))
    both = sorted(set(ones) & set(twos))
    return [ones[s] for s in both], [twos[s] for s in both]


def mean_of(records: Sequence[Record]) -> Record | None:
    """Draws as one record: figures averaged, the rest from the first."""
    if not records:
        return None
    means = {name: sum(float(r[name]) for r in records) / len(records) for name in AVERAGED if name in records[0]}
    return {**records[0], **means, "draws": len(records)}


def average(records: Sequence[Record]) -> list[Record]:
    """Records with those that differ in the draw alone taken together."""
    found = [r for r in records if r["row"] not in DRAWN]
    kept = dict.fromkeys((r["row"], r["schedule"], r["ratio"]) for r in records if r["row"] in DRAWN)
    return found + [mean for cell in kept if (mean := mean_of(draws(records, *cell))) is not None]


def find(records: Iterable[Record], prune: str, tokens: str, recover: str, ratio: float) -> Record | None:
    """The measurement of these options with a figure, at the lowest seed."""
    fitting = (
        r
        for r in records
        if "accuracy" in r
        and r["ratio"] == ratio
        and (r["prune"], r["tokens"], r["recover"]) == (prune, tokens, recover)
    )
    return min(fitting, key=lambda r: r["seed"], default=None)


def of_row(records: Iterable[Record], row: str, schedule: str, ratio: float) -> Record | None:
    """Of the sweep, draws averaged."""
    return mean_of(draws(records, row, schedule, ratio))


def of_ledger(records: Iterable[Record], row: str, recover: str, ratio: float) -> Record | None:
    """Of the ledgers."""
    return next(
        (
            found
            for cell in ledgers([row], [recover], [ratio])
            if (found := find(records, cell.prune, cell.tokens, cell.recover, ratio))
        ),
        None,
    )


def compare(records: Sequence[Record], schedule: str, other: str = "constant") -> dict[tuple[str, float], np.ndarray]:
    """(row, ratio) -> by how much ``schedule`` is more often right than ``other``, [draws, images] each, where both are
    there."""
    found = {(row, ratio): apart(*pairs(records, row, schedule, other, ratio)) for row in REDUCERS for ratio in RATIOS}
    return {cell: each for cell, each in found.items() if each is not None}


def over_reducers(records: Sequence[Record], schedule: str) -> dict[float, tuple[float, float, int]]:
    """ratio -> (points by which ``schedule`` is above the constant one in the mean over the reducers, its standard
    error, reducers), on the images that all of them were judged on."""
    found = compare(records, schedule)
    by = {ratio: [each for (_, r), each in found.items() if r == ratio] for ratio in RATIOS}
    return {
        ratio: (
            *points(np.mean([e.mean(axis=0)[: min(p.shape[1] for p in each)] for e in each], axis=0)[None]),
            len(each),
        )
        for ratio, each in by.items()
        if each
    }


def overall(records: Sequence[Record], schedule: str) -> tuple[bool, str]:
    """Of all reducers and ratios: how often a schedule's accuracy is that of the constant one, above it, below it;
    and whether none is below it by more than two standard errors."""
    pairwise = compare(records, schedule)
    found = {cell: points(each) for cell, each in pairwise.items()}
    images = sorted({each.shape[1] for each in pairwise.values()}) or [0]
    moved = {cell: d for cell, d in found.items() if d[1]}
    above, below = ([cell for cell, (by, _) in moved.items() if by * sign > 0] for sign in (1, -1))
    far = [
        f"{row} at {ratio:g} ({by:+.2f}, standard error {error:.2f})"
        for (row, ratio), (by, error) in moved.items()
        if by < -error
    ]
    mean = sum(by for by, _ in moved.values()) / max(len(moved), 1)
    equal = len(found) - len(above) - len(below)
    surely = [cell for cell, (by, error) in moved.items() if by < -SURE * error]
    return bool(found) and not surely, (
        f"{schedule} in {len(found)} cells, {'/'.join(map(str, images))} images: {equal} as constant, {len(above)} "
        f"above, {len(below)} below; by {mean:+.2f} points in the mean where they differ; below by more than a "
        f"standard error: {', '.join(far) or 'none'}; by more than two: {len(surely)}"
    )
