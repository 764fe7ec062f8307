"""Drawings for reports: matplotlib's SVG, inline, in colours that follow the page from light to dark."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .page import printable
from .scores import decode, rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib draws in these; the page has a variable for each, which knows whether it is dark
INK, SOFT, LINE, EMPTY = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102f{i}" for i in range(6))
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", EMPTY: "empty", **{c: f"c{i}" for i, c in enumerate(SERIES)}}
WIDTH = 8.6  # inches
COLUMNS = 64  # of a heat map
EACH = 32  # elements up to which a heat map shows every one at its place
LABELS = 40  # names along an axis


def draw_svg(
    name: str, height: float, draw: Callable[[Axes], None], below: float = 0.28, left: float = 0.62, right: float = 0.1
) -> str:
    """What ``draw`` makes of one pair of axes, as an ``<svg>``.

    name                 of the drawing, unique within a page: the ids in it begin so
    below, left, right   room for what stands beside the axes, inches: fitting it takes longer than drawing

    The same input gives the same bytes. Text stays text, and nothing of it is read as mathematics.
    """
    with _style(name) as made:
        figure = made(WIDTH, height)
        draw(figure.add_axes((left / WIDTH, below / height, 1 - (left + right) / WIDTH, 1 - (below + 0.3) / height)))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    return re.sub(r"#0102(?:0[3-6]|f[0-5])", lambda m: f"var(--{_VARIABLES[m[0]]})", svg)


@contextmanager
def _style(name: str) -> Iterator[Callable[[float, float], Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    def make_figure(width: float, height: float) -> Figure:
        figure = Figure(figsize=(width, height), dpi=100)
        FigureCanvasSVG(figure)
        return figure

    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore")  # a name in a script that no font here knows: the browser has one
        mpl.rcdefaults()  # whatever style the user's own files ask for
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": f"fxprune {name}",
                "text.parse_math": False,
                "text.usetex": False,
                "font.size": 9.0,
                "text.color": INK,
                "axes.labelcolor": SOFT,
                "axes.edgecolor": LINE,
                "xtick.color": SOFT,
                "ytick.color": SOFT,
                "axes.facecolor": "none",
                "figure.facecolor": "none",
                "savefig.facecolor": "none",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "axes.linewidth": 0.8,
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "legend.fontsize": 9.0,
            }
        )
        yield make_figure


def draw_kept(name: str, entries: Sequence[Mapping[str, Any]], colour: str, unit: str) -> str:
    """Per layer, how many elements there were and how many stay.

    entries   each with ``label``, ``size`` and ``kept``
    """
    places, names = range(len(entries)), [str(e["label"]) for e in entries]

    def draw(axes: Axes) -> None:
        axes.bar(places, [e["size"] for e in entries], color=EMPTY, width=0.8, label="dense")
        axes.bar(places, [e["kept"] for e in entries], color=colour, width=0.8, label="kept")
        _names(axes, names)
        axes.set_ylabel(short(unit))
        axes.grid(axis="y")
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)

    return draw_svg(name, 1.6 + _room(names), draw, _room(names)) if entries else ""


def heat_map(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Scores of one kind of groups: a row per group, on a logarithmic scale.

    Few elements: each at its place, a cross where it went. Many: in the order in which they would be kept, in bins, and
    a line where keeping stopped.
    """
    import numpy as np

    entries = [e for e in entries if e["scores"] is not None]
    if not entries:
        return ""
    single = max(e["size"] for e in entries) <= EACH
    columns = max(e["size"] for e in entries) if single else COLUMNS
    rows = np.full((len(entries), columns), np.nan)
    for i, entry in enumerate(entries):
        values, order = np.array(decode(entry["scores"], entry["size"])), rank(entry)
        top = float(values.max()) or 1.0
        if not entry["comparable"]:
            values = values / top
        if single:
            rows[i, : len(values)] = values
        else:
            edges = np.linspace(0, len(values), columns + 1)
            rows[i] = [values[order][int(a) : max(int(a) + 1, int(b))].mean() for a, b in itertools.pairwise(edges)]
    top = float(np.nanmax(rows)) or 1.0
    rows = np.log10(np.clip(rows / top, 1e-4, None))
    low = min(-0.1, float(np.nanmin(rows)))

    def draw(axes: Axes) -> None:
        shown = axes.imshow(
            np.ma.masked_invalid(rows),
            aspect="auto",
            cmap="viridis",
            vmin=low,
            vmax=0,
            interpolation="nearest",
            extent=(0, columns, len(entries), 0),
        )
        for i, entry in enumerate(entries):
            gone = sorted(rank(entry)[entry["kept"] :]) if "gone" not in entry else entry["gone"]
            if single:
                axes.scatter(
                    [g + 0.5 for g in gone], [i + 0.5] * len(gone), marker="x", s=26, color="#ff3b30", linewidths=1.6
                )
            elif 0 < entry["kept"] < entry["size"]:
                at = columns * entry["kept"] / entry["size"]
                axes.plot([at, at], [i, i + 1], color="#ff3b30", linewidth=1.8)
        axes.set_xlabel("element" if single else "elements, the last to go first (share)")
        axes.set_xticks([0, columns], ["0", str(columns) if single else "1"])
        step = max(1, math.ceil(len(entries) / LABELS))
        axes.set_yticks(
            [i + 0.5 for i in range(0, len(entries), step)], [short(str(e["label"])) for e in entries[::step]]
        )
        axes.tick_params(length=0)
        bar = axes.figure.colorbar(shown, ax=axes, pad=0.01, fraction=0.03, aspect=12)
        bar.outline.set_visible(False)
        bar.set_ticks([low, 0], labels=[f"{'≤' if low <= -4 else ''}{10**low:.2g}", "1"])

    longest = max(len(short(str(e["label"]))) for e in entries)
    return draw_svg(name, min(8.0, 1.1 + 0.2 * len(entries)), draw, 0.5, 0.25 + 0.075 * longest, 0.45)


def pairs(
    name: str,
    labels: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    unit: str,
    words: tuple[str, str] = ("before", "after"),
) -> str:
    """Two bars per label, on a logarithmic scale where they differ much."""
    if not labels:
        return ""
    places = range(len(labels))
    positive = [v for v in (*before, *after) if v > 0 and math.isfinite(v)]

    def draw(axes: Axes) -> None:
        axes.bar([p - 0.2 for p in places], before, width=0.4, color=EMPTY, label=words[0])
        axes.bar([p + 0.2 for p in places], after, width=0.4, color=SERIES[0], label=words[1])
        if positive and max(positive) > 50 * min(positive):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes mathematics
            axes.yaxis.set_minor_formatter("")
        _names(axes, labels)
        axes.set_ylabel(short(unit))
        axes.grid(axis="y")
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)

    return draw_svg(name, 1.8 + _room(labels), draw, _room(labels))


def scatter(
    name: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    across: str,
    up: str,
    *,
    line: float | None = None,
    chosen: tuple[float, float] | None = None,
) -> str:
    """Points (x, y, label) per series, and a line through those that no other beats: less x, more y (the Pareto front).

    line    a level that is drawn;  chosen: a point that is ringed
    """

    def draw(axes: Axes) -> None:
        for i, (label, points) in enumerate(series):
            colour = SERIES[i % len(SERIES)]
            best = front(points)
            axes.plot([p[0] for p in best], [p[1] for p in best], color=colour, linewidth=1.2)
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                marker="o",
                markersize=5,
                linestyle="none",
                color=colour,
                label=short(label, 40),
            )
            for x, y, words in points:
                axes.annotate(short(words), (x, y), xytext=(4, 5), textcoords="offset points", color=SOFT, fontsize=8)
        if line is not None:
            axes.axhline(line, color=SERIES[4], linewidth=1.0, linestyle="--", label="least accepted")
        if chosen is not None:
            axes.scatter(
                [chosen[0]],
                [chosen[1]],
                s=150,
                facecolors="none",
                edgecolors=SERIES[2],
                linewidths=2,
                label="chosen",
                zorder=3,
            )
        axes.set_xlabel(short(across))
        axes.set_ylabel(short(up, 40))
        axes.grid()
        axes.margins(0.08)
        if len(series) > 1 or line is not None or chosen is not None:
            axes.legend(loc="best")

    return draw_svg(name, 3.4, draw, 0.5) if any(points for _, points in series) else ""


def front(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points that no other one beats in both, in order of x.

    >>> front([(1, .7, "a"), (2, .6, "b"), (3, .9, "c")])
    [(1, 0.7, 'a'), (3, 0.9, 'c')]
    """
    kept: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def _names(axes: Axes, labels: Sequence[str]) -> None:
    """Labels along x: all of them where there is room, else every n-th; long ones stand upright."""
    step, upright = max(1, math.ceil(len(labels) / LABELS)), _upright(labels)
    axes.set_xticks(
        range(0, len(labels), step),
        [short(label) for label in labels[::step]],
        rotation=90 if upright else 0,
        fontsize=7.5 if upright else 9,
    )
    axes.tick_params(length=0)
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _upright(labels: Sequence[str]) -> bool:
    step = max(1, math.ceil(len(labels) / LABELS))
    return max(len(short(label)) + 2 for label in labels) * len(labels[::step]) > 120


def _room(labels: Sequence[str]) -> float:
    """Inches below the axes for these labels."""
    return 0.12 + 0.068 * max(len(short(label)) for label in labels) if labels and _upright(labels) else 0.28


def short(label: object, most: int = 28) -> str:
    """The end of a long name, where names differ; nothing in it that a font cannot be asked for."""
    label = printable(label)
    return label if len(label) <= most else f"…{label[-most + 1 :]}"
