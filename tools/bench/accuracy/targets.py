"""What tools/bench/accuracy.py --check holds the results against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.accuracy.rows import BEST, ROWS, VARIANTS

DROPS: Mapping[str, Mapping[float, float]] = {
    "minilm-stsb": {0.9: 0.1, 0.75: 0.1, 0.6: 0.1, 0.5: 0.1, 0.4: 0.4, 0.3: 0.8, 0.2: 2.5}
}
"""task -> ratio -> how far below dense the best row may be at most, in points of the figure (mean over seeds)."""
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]


def check(summary: Mapping[str, Cells], dense: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """(targets met, targets missed), a sentence each; what was not measured is missed.

    Two per ratio: the drop from dense of the better of our rows (closed form, or with optimiser steps after it), and
    that every row of another method is lower.

    >>> cell = {"0.75": {"mean": 86.7}}
    >>> met, missed = check({"minilm-stsb": {"default": cell, "l2": {"0.75": {"mean": 80.0}}}},
    ...                     {"minilm-stsb": 86.72})
    >>> len(met), len(missed)
    (2, 12)
    """
    met: list[str] = []
    missed: list[str] = []
    for task, drops in DROPS.items():
        for ratio, allowed in drops.items():
            rows = {
                name: float(cells[f"{ratio:g}"]["mean"])
                for name, cells in summary.get(task, {}).items()
                if f"{ratio:g}" in cells
            }
            at, ours = f"{task} at {ratio:g}", {name: rows.pop(name) for name in (BEST, *VARIANTS) if name in rows}
            if not ours or task not in dense:
                missed += [f"{at}: {BEST} was not measured", f"{at}: {BEST} was not compared"]
                continue
            best = max(ours, key=lambda name: ours[name])
            drop = dense[task] - ours[best]
            text = f"{at}: {best} {ours[best]:.2f} is {drop:.2f} below dense {dense[task]:.2f}, allowed {allowed:g}"
            (met if drop <= allowed + 1e-9 else missed).append(text)
            better = {name: value for name, value in rows.items() if value >= ours[best]}
            if better:
                said = ", ".join(f"{name} {value:.2f}" for name, value in better.items())
                missed.append(f"{at}: {best} {ours[best]:.2f} is not above {said}")
            elif rows:
                met.append(f"{at}: {best} is above all {len(rows)} other rows, the next is {max(rows.values()):.2f}")
            else:
                missed.append(f"{at}: no other row was measured")
    return met, missed


def find_unmeasured(summary: Mapping[str, Cells]) -> list[str]:
    """``task: row`` of rows of the table without any figure, for tasks that have targets."""
    return [
        f"{task}: {name}"
        for task in DROPS
        for name, row in ROWS.items()
        if not row.only_labelled and name not in summary.get(task, {})
    ]
