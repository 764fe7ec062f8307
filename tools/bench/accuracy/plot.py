"""The picture of tools/bench/accuracy.py: accuracy against FLOPs ratio, a panel per task, a line per row.

``python tools/bench/accuracy.py --out RESULTS.json --check`` draws it anew, as ``RESULTS.png`` and ``.svg``. A
line is the mean over seeds, the band reaches from the lowest to the highest one. Beside each panel stands another that
shows only what is near dense. Needs matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLES = {  # row -> (colour, line, marker); ours are solid and dark, what it is compared with is lighter
    "random": ("#b0b0b0", ":", ""),
    "l2": ("#8c8c8c", "--", "s"),
    "taylor": ("#c49a6c", "--", "v"),
    "ptf": ("#7fb3d5", "-", "^"),
    "ptf-unlabelled": ("#7fb3d5", ":", "^"),
    "ptf-tuned": ("#2471a3", "-", "^"),
    "optin": ("#e59866", "-", "o"),
    "default": ("#c0392b", "-", "o"),
    "optin-recover": ("#d35400", "-", "o"),
    "obs-recover": ("#6c3483", "-", "D"),
    "torch-pruning-l2": ("#7dcea0", "--", "x"),
    "torch-pruning-taylor": ("#1e8449", "--", "x"),
}
NEAR = 6  # points below dense that the second panel of a task shows


def plot(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw ``results`` (what the benchmark writes) into ``out`` with .png and .svg; returns the paths.

    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in results["tasks"] if task in results["summary"]]
    titles = {row["name"]: row["title"] for row in results["rows"]}
    figure, grid = plt.subplots(len(tasks) or 1, 2, figsize=(12.4, 3.9 * (len(tasks) or 1) + 0.9), squeeze=False)
    drawn: dict[str, Any] = {}
    for task, panels in zip(tasks, grid, strict=False):
        for panel, near in zip(panels, (False, True), strict=True):
            drawn |= _panel(panel, task, results["tasks"][task], results["summary"][task], near)
    names = [name for name in STYLES if name in drawn] + [name for name in drawn if name not in STYLES]
    figure.legend(
        [drawn[name] for name in names],
        [titles.get(name, name) for name in names],
        loc="lower center",
        ncols=min(4, len(names) or 1),
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, (0.28 * math.ceil(len(names) / 4) + 0.1) / figure.get_figheight(), 1, 1))
    paths = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "fxprune"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _panel(panel: Any, task: str, about: Mapping[str, Any], rows: Mapping[str, Any], near: bool) -> dict[str, Any]:
    """One task, whole or ``near`` dense; row -> its line."""
    drawn = {}
    for name, cells in rows.items():
        colour, dashes, marker = STYLES.get(name, ("black", "-", "."))
        ratios = sorted(float(ratio) for ratio in cells)
        column = {part: [cells[f"{r:g}"][part] for r in ratios] for part in ("mean", "min", "max")}
        front = 3 if name == "default" else 2
        drawn[name] = panel.plot(
            ratios,
            column["mean"],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            linewidth=2.2 if front == 3 else 1.4,
            zorder=front,
        )[0]
        panel.fill_between(ratios, column["min"], column["max"], color=colour, alpha=0.15, linewidth=0)
    dense = about["dense"]
    panel.axhline(dense, color="black", linewidth=0.8, zorder=1)
    panel.annotate(
        f"dense {dense:.2f}",
        (1, dense),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    if near:
        panel.set_ylim(dense - NEAR, dense + NEAR / 8)
    panel.set_title(f"{task}, within {NEAR} points of dense" if near else task, fontsize=10)
    panel.set_xlabel("FLOPs ratio")
    panel.set_ylabel(f"{about['metric']} (%)" if about["metric"] == "accuracy" else f"{about['metric']} x 100")
    panel.invert_xaxis()
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return drawn
