"""The picture of tools/bench/tokens.py: accuracy against FLOPs, a panel per schedule; one budget; measured latency.

``python tools/bench/tokens.py --out RESULTS.json --check`` draws it anew, as ``RESULTS.png`` and ``.svg``.
Above: a panel per schedule, a line per reducer. Below: ToMe's schedules, one budget for weights, tokens or both, then
accuracy against measured latency, a panel per batch size, the ideal of each point (dense latency times its share of
the MACs) as a faint mark. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.tokens.compare import average

STYLES = {  # row -> (colour, line, marker)
    "tome": ("#c0392b", "-", "o"),
    "prune-class-value": ("#2471a3", "-", "^"),
    "prune-class": ("#7fb3d5", "-", "v"),
    "prune-entropy-value": ("#a9cce3", "--", "<"),
    "zero-tprune": ("#1e8449", "-", "D"),
    "ppt": ("#6c3483", "-", "s"),
    "transform": ("#e59866", "-", "P"),
    "random": ("#b0b0b0", ":", ""),
    "weights": ("#34495e", "-", "s"),
    "tokens": ("#c0392b", "-", "o"),
    "joint": ("#117a65", "-", "D"),
}
COLOURS = {
    "constant": "#2471a3",
    "decreasing": "#e59866",
    "elimination": "#1e8449",
    "optin": "#c0392b",
    "auto": "#6c3483",
}  # of ToMe's schedules
DASHES = {"constant": ":", "decreasing": "--", "elimination": (0, (1, 3)), "optin": "-", "auto": "-."}
PANELS = ("constant", "decreasing", "elimination", "optin")
BATCHES = ("1", "32")
LEDGERS = ("weights", "tokens", "joint")
Record = Mapping[str, Any]


def plot(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw ``results`` (what the benchmark writes) into ``out`` with .png and .svg; returns the paths.

    Raises ImportError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    records = average([r for r in results["measured"] if "accuracy" in r])
    dense = results["model"]["accuracy"]
    figure, grid = plt.subplots(2, 4, figsize=(18, 8.6), sharey="row")
    for panel, schedule in zip(grid[0], PANELS, strict=True):
        _sweep(panel, against_dense(records, results["model"]), schedule)
        _finish(panel, f"tokens alone, schedule {schedule}", "FLOPs ratio", 0.0, "points beside dense, same images")
    _schedules(grid[1][0], records)
    _finish(grid[1][0], "ToMe, tokens alone", "FLOPs ratio", dense)
    _ledgers(grid[1][1], records)
    _finish(grid[1][1], "one budget: weights, tokens, both", "FLOPs ratio", dense)
    for panel, batch in zip(grid[1][2:], BATCHES, strict=True):
        _latency(panel, records, batch)
        _finish(panel, f"ONNX Runtime CPU, batch {batch}", "latency, as a share of dense", dense)
    figure.tight_layout()
    paths = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "fxprune"}):
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def against_dense(records: Iterable[Record], model: Mapping[str, Any]) -> list[Record]:
    """Records with their accuracy less that of the dense model; those judged on other images are left out."""
    alike = (r for r in records if r.get("images", model.get("images")) == model.get("images"))
    return [{**r, "accuracy": r["accuracy"] - model["accuracy"]} for r in alike]


def _lines(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records that share the fields ``names``, each by falling ratio."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(records, key=lambda r: -r["ratio"]):
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def _sweep(panel: Any, records: Iterable[Record], schedule: str) -> None:
    here = (r for r in records if r["schedule"] == schedule and r["row"] not in LEDGERS)
    for (row,), cells in _lines(here, "row").items():
        _draw(panel, [c["share"] for c in cells], cells, row, STYLES[row][1], row)


def _schedules(panel: Any, records: Iterable[Record]) -> None:
    """Tokens alone without recovery, as a row of the ledgers, is ToMe's default as well."""
    alone = [{**r, "row": "tome"} if r["row"] == "tokens" and r["recover"] == "none" else r for r in records]
    here = (r for r in alone if r["row"] == "tome")
    lines = {schedule: cells for (schedule,), cells in _lines(here, "schedule").items()}
    for schedule in filter(lines.__contains__, COLOURS):
        cells = lines[schedule]
        _draw(panel, [c["share"] for c in cells], cells, "tome", DASHES[schedule], schedule, COLOURS[schedule])


def _ledgers(panel: Any, records: Iterable[Record]) -> None:
    """Tokens alone without recovery is a row of the sweep."""
    here = [{**r, "row": "tokens"} if r["row"] == "tome" and r["schedule"] == "auto" else r for r in records]
    here = [r for r in here if r["row"] in LEDGERS]
    for (row, recover), cells in _lines(here, "row", "recover").items():
        label = row if recover == "auto" else f"{row}, no recovery"
        _draw(
            panel,
            [c["share"] for c in cells],
            cells,
            row,
            "-" if recover == "auto" else "--",
            label,
            hollow=recover != "auto",
        )


def _latency(panel: Any, records: Iterable[Record], batch: str) -> None:
    """OPTIN's schedule, and the constant one of reducers without it: a line per reducer is as much as a panel holds."""
    timed = [r for r in records if batch in r.get("latency", {})]
    ours = {r["row"] for r in timed if r["schedule"] == "optin"}
    here = (r for r in timed if r["row"] in LEDGERS or r["schedule"] == ("optin" if r["row"] in ours else "constant"))
    for (row, schedule), cells in _lines(here, "row", "schedule").items():
        label = f"{row}, {schedule}" if row not in LEDGERS else row
        _draw(panel, [1 / c["latency"][batch]["speedup"] for c in cells], cells, row, DASHES.get(schedule, "-"), label)
        panel.plot(
            [c["share"] for c in cells],
            [c["accuracy"] for c in cells],
            color=STYLES[row][0],
            linestyle="",
            marker="|",
            markersize=9,
            alpha=0.4,
            zorder=1,
        )


def _draw(
    panel: Any,
    across: list[float],
    cells: list[Record],
    row: str,
    dashes: str,
    label: str,
    colour: str = "",
    hollow: bool = False,
) -> None:
    panel.plot(
        across,
        [c["accuracy"] for c in cells],
        color=colour or STYLES[row][0],
        linestyle=dashes,
        marker=STYLES[row][2],
        markersize=4,
        fillstyle="none" if hollow else "full",
        linewidth=1.6,
        label=label,
        zorder=3,
    )


def _finish(panel: Any, title: str, across: str, dense: float, up: str = "accuracy (%)") -> None:
    panel.axhline(dense, color="black", linewidth=0.8, zorder=1)
    panel.annotate(
        f"dense {dense:.2f}" if dense else "dense",
        (1, dense),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.invert_xaxis()
    panel.grid(alpha=0.25)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=7, frameon=False, loc="lower left")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
