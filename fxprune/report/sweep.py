"""``sweep.html``: the front of accuracy, cost and latency, the point that was chosen, and the sensitivity of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .page import cards, code, figure, fold, page, paragraph, section, table, text
from .plots import SERIES, draw_svg, scatter, short
from .render import COSTS, MEASURES, PLURAL, labels

Result = Mapping[str, Any]


def render(result: Result) -> str:
    """The page of what :func:`fxprune.workflows.sweep.sweep` returns."""
    return page(
        f"fxprune sweep: {result['name']}",
        [
            f"<h1>{text(result['name'])}</h1>",
            paragraph(
                f"target {result['target']}, criterion {result['importance']}, recovery {result['recover']}, seed "
                f"{result['seed']}",
                "soft",
            ),
            _render_chosen(result),
            _fronts(result),
            _points(result),
            _sensitivity(result["sensitivity"]),
            _notes(result),
        ],
    )


def _render_chosen(result: Result) -> str:
    if result["max_drop"] is None:
        return ""
    point = next((p for p in result["points"] if p.get("artifact") == result["chosen"] and result["chosen"]), None)
    if point is None:
        return section(
            "Chosen",
            paragraph(f"No ratio stays within a drop of {result['max_drop']:g}: keep the dense model, or allow more."),
        )
    measure = MEASURES[result["measure"]]
    return section(
        "Chosen",
        cards(
            [
                ("ratio", f"{point['ratio']:g}", f"of the dense {result['metric']}"),
                (measure, f"{result['dense']['value'] - point['drop']:.4f}", f"dense {result['dense']['value']:.4f}"),
                ("drop", f"{point['drop']:.4f}", f"allowed {result['max_drop']:g}"),
                ("artefact", str(point["artifact"]), "beside this page"),
            ]
        ),
        _describe_judge(result),
    )


def _describe_judge(result: Result) -> str:
    judged = result["judged"]
    return paragraph(
        f"Judged on {judged['samples']} samples of {judged['origin']} that nothing was decided or fitted "
        f"on; one of them is {judged['resolution']:.4f} of the measure, and a drop of that size is noise. "
        "The chosen point was chosen on these samples: on others it will do a little worse.",
        "soft",
    )


def _good(result: Result) -> list[dict[str, Any]]:
    return [p for p in result["points"] if "drop" in p]


def _fronts(result: Result) -> str:
    points, dense = _good(result), result["dense"]
    if not points:
        return ""
    measure, value = MEASURES[result["measure"]], dense["value"]
    line = None if result["max_drop"] is None else value - result["max_drop"]
    chosen = next((p for p in points if p["artifact"] == result["chosen"]), None)
    key = result["metric"]
    label = next(name for name, k, _ in COSTS if k == key)

    def place(point: dict[str, Any]) -> tuple[float, float, str]:
        return point["cost"][key] / dense["cost"][key], value - point["drop"], f"{point['ratio']:g}"

    parts = [
        figure(
            scatter(
                "front-cost",
                [("sweep", [(1.0, value, "dense"), *map(place, points)])],
                f"share of {label}",
                measure,
                line=line,
                chosen=None if chosen is None else place(chosen)[:2],
            ),
            f"{measure} against {label}",
        )
    ]
    series = []
    for row in result["latency"]:
        times = row["timings"]
        found = [
            (times[p["artifact"]]["median_ms"], value - p["drop"], f"{p['ratio']:g}")
            for p in points
            if p["artifact"] in times
        ]
        series.append((f"batch {row['batch']}", [(times["dense"]["median_ms"], value, "dense"), *found]))
    for number, one in enumerate(series):
        parts.append(
            figure(
                scatter(f"front-latency-{number}", [one], "median latency, ms", measure, line=line),
                f"{measure} against latency at {one[0]}, all points measured in turns",
            )
        )
    return section("The front", *parts)


def _points(result: Result) -> str:
    names = [row["batch"] for row in result["latency"]]
    figures = [
        k for k in ("accuracy", "top1", "kl", "cosine", "relational") if any(k in p["figures"] for p in _good(result))
    ]
    head = [
        "ratio",
        *(name for name, _, _ in COSTS),
        *(MEASURES[k] for k in figures),
        "drop",
        *(f"ms at batch {b}" for b in names),
        "speed-up",
        "of 1 / MACs",
    ]
    rows: list[list[object]] = []
    for point in result["points"]:
        if "infeasible" in point:
            rows.append([f"{point['ratio']:g}", "out of reach", *[""] * (len(head) - 2)])
            continue
        times = [row["timings"].get(point["artifact"]) for row in result["latency"]]
        speed = (
            ""
            if not times or times[0] is None
            else f"{result['latency'][0]['timings']['dense']['median_ms'] / times[0]['median_ms']:.2f}x"
        )
        real = "" if not times or times[0] is None or "realised" not in times[0] else f"{times[0]['realised']:.2f}"
        rows.append(
            [
                f"{point['ratio']:g}" + (" (chosen)" if point["artifact"] == result["chosen"] else ""),
                *(show(point["cost"][k]) for _, k, show in COSTS),
                *(f"{point['figures'][k]:.4g}" if k in point["figures"] else "" for k in figures),
                f"{point['drop']:.4f}",
                *(f"{t['median_ms']:.3f}" if t else "" for t in times),
                speed,
                real,
            ]
        )
    infeasible = "".join(f"<pre>{text(p['infeasible'])}</pre>" for p in result["points"] if "infeasible" in p)
    return section(
        "Every point",
        table(head, rows, range(1, len(head))),
        fold("out of reach, and why", infeasible),
        paragraph(f"MACs are {result['counted']}.", "soft"),
        "" if result["max_drop"] is not None else _describe_judge(result),
    )


def _sensitivity(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return ""
    groups, parts = measured["groups"], []
    for i, kind in enumerate(dict.fromkeys(g["kind"] for g in groups)):
        parts.append(
            figure(
                _curves(f"sensitivity-{i}", [g for g in groups if g["kind"] == kind]),
                f"{PLURAL.get(kind, kind)}: damage of cutting one group and nothing else",
            )
        )
    rows = [[k["kind"], k["groups"], *(f"{level['damage']:.4g}" for level in k["levels"])] for k in measured["kinds"]]
    head = ["kind, all groups at once", "groups", *(f"damage at {s:g}" for s in measured["shares"])]
    each = [[code(g["group"]), *(f"{level['damage']:.4g} ({level['kept']})" for level in g["levels"])] for g in groups]
    frozen = [[code(g["group"]), g["why"]] for g in measured["frozen"]]
    return section(
        "Sensitivity",
        *parts,
        table(head, rows, range(1, len(head))),
        fold(
            "every group: damage (elements kept)",
            table(["group", *(f"at {s:g}" for s in measured["shares"])], each, range(1, len(head) - 1)),
        ),
        fold(f"{len(frozen)} frozen groups were not tried", table(("group", "why"), frozen)),
        paragraph(f"Damage: {measured['unit']}; {measured['samples']} samples; nothing is recovered.", "soft"),
    )


def _curves(name: str, groups: Sequence[Mapping[str, Any]]) -> str:
    names = labels(groups)
    shares = [level["share"] for level in groups[0]["levels"]]

    def draw(axes: Any) -> None:
        width = 0.8 / len(shares)
        for i, share in enumerate(shares):
            axes.bar(
                [p - 0.4 + (i + 0.5) * width for p in range(len(groups))],
                [g["levels"][i]["damage"] for g in groups],
                width=width,
                color=SERIES[i % len(SERIES)],
                label=f"{share:g} kept",
            )
        step = max(1, math.ceil(len(groups) / 24))
        axes.set_xticks(range(0, len(groups), step), [short(n, 12) for n in names[::step]])
        axes.tick_params(length=0)
        axes.set_ylabel("damage")
        axes.grid(axis="y")
        axes.legend(loc="upper right", ncols=len(shares), bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)

    return draw_svg(name, 2.0, draw)


def _notes(result: Result) -> str:
    env = result["environment"]
    facts = [("CPU", env.get("cpu")), ("GPU", env.get("gpu") or "none"), ("threads", env.get("torch_threads"))]
    return section("Notes", *(paragraph(n) for n in result["notes"]), table(("", ""), facts))
