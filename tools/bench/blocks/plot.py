"""The pictures of tools/bench/blocks.py: accuracy per tile size, kept share per layer, and the tiles themselves.

``python tools/bench/blocks.py --out NAME.json --draw`` draws anew NAME.png (accuracy), NAME-layers.png (kept share per
layer at one ratio) and NAME-tiles.png (masks). Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {
    "lsp": "#c0392b",
    "lsp-paper": "#8e44ad",
    "lsp-no-power": "#c39bd3",
    "uniform": "#e59866",
    "magnitude": "#7f8c8d",
    "wanda": "#5499c7",
    "obert": "#1e8449",
}
SHOWN = ("32x32", 0.5)  # tile and ratio of the plans whose layers are drawn
BARS = ("lsp", "lsp-paper", "lsp-no-power", "uniform")


def plot(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """Draw what there is; returns the paths. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    drawn = []
    for suffix, figure in (
        ("", _accuracy(results, plt)),
        ("-layers", _layers(results, plt)),
        ("-tiles", _tiles(results, plt)),
    ):
        if figure is not None:
            path = stem.with_name(stem.name + suffix + ".png")
            figure.savefig(path, dpi=110)
            plt.close(figure)
            drawn.append(path)
    return drawn


def _accuracy(results: Mapping[str, Any], plt: Any) -> Any:
    """One panel per task and tile: figure against the ratio, dashed without recovery."""
    cells = [c for c in results["measured"] if "figure" in c]
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    tiles = list(dict.fromkeys(c["tile"] for c in cells))
    if not cells:
        return None
    figure, grid = plt.subplots(
        len(tasks), len(tiles), figsize=(3.3 * len(tiles) + 0.5, 3.1 * len(tasks) + 1.1), squeeze=False, sharey="row"
    )
    lines: dict[str, Any] = {}
    for task, panels in zip(tasks, grid, strict=True):
        for tile, panel in zip(tiles, panels, strict=True):
            here = [c for c in cells if (c["task"], c["tile"]) == (task, tile)]
            panel.set_visible(bool(here))
            for label in dict.fromkeys(c["row"] for c in here):
                row, _, recovered = label.partition("+")
                mean: dict[float, list[float]] = {}
                for c in here:
                    if c["row"] == label:
                        mean.setdefault(c["ratio"], []).append(c["figure"])
                x = sorted(mean)
                line = panel.plot(
                    x,
                    [sum(mean[r]) / len(mean[r]) for r in x],
                    color=COLOURS.get(row, "black"),
                    linestyle="-" if recovered else ":",
                    marker="o" if recovered else "",
                    markersize=3,
                )
                lines[label] = line[0]
            panel.axhline(results["tasks"][task]["dense"], color="black", linewidth=0.7)
            panel.set_title(f"{task}, tiles {tile}", fontsize=9)
            panel.invert_xaxis()
            panel.grid(alpha=0.25)
        panels[0].set_ylabel(results["tasks"][task]["metric"])
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=min(7, len(lines)), frameon=False, fontsize=8)
    figure.suptitle("share of MACs that are not zero (effective; what runs is up to the gate)", fontsize=9)
    figure.tight_layout(rect=(0, 0.75 / figure.get_figheight(), 1, 1))
    return figure


def _layers(results: Mapping[str, Any], plt: Any) -> Any:
    """Bars: the kept share of every layer, a group of bars per allocation."""
    tile, ratio = SHOWN
    chosen = {
        (c["task"], c["row"]): c["kept"]
        for c in results["measured"]
        if "kept" in c and c["tile"] == tile and c["ratio"] == ratio and c["row"] in BARS
    }
    tasks = list(dict.fromkeys(task for task, _ in chosen))
    if not tasks:
        return None
    figure, panels = plt.subplots(len(tasks), 1, figsize=(11, 3.4 * len(tasks)), squeeze=False)
    for task, panel in zip(tasks, panels[:, 0], strict=True):
        rows = [row for row in BARS if (task, row) in chosen]
        names = list(chosen[task, rows[0]])
        for i, row in enumerate(rows):
            at = [n + (i - len(rows) / 2) * 0.8 / len(rows) for n in range(len(names))]
            panel.bar(at, [chosen[task, row][n] for n in names], 0.8 / len(rows), color=COLOURS[row], label=row)
        panel.set_xticks(range(len(names)), [_short(n) for n in names], rotation=60, ha="right", fontsize=7)
        panel.set_title(f"{task}: share of tiles kept per layer, {tile} at {ratio:g} of the MACs", fontsize=9)
        panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def _tiles(results: Mapping[str, Any], plt: Any, most: int = 24) -> Any:
    """The tiles of every layer of one plan: dark ones stay."""
    masks = [
        (task, name, kept) for task, layers in results["masks"].items() for name, kept in list(layers.items())[:most]
    ]
    if not masks:
        return None
    wide = 8
    figure, grid = plt.subplots(-(-len(masks) // wide), wide, figsize=(12, 1.6 * -(-len(masks) // wide)), squeeze=False)
    for panel in grid.flat:
        panel.axis("off")
    for panel, (task, name, kept) in zip(grid.flat, masks, strict=False):
        panel.imshow(kept, cmap="Greys", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
        panel.set_title(f"{task}\n{_short(name)}", fontsize=6)
    figure.tight_layout()
    return figure


def _short(name: str) -> str:
    return name.removesuffix(".weight").replace("encoder.", "").replace("layer.", "").replace("attention.", "attn.")
