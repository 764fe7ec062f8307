"""Several artefacts side by side: as plain data, and as one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..ir.plan import CompressionPlan
from ..report.headline import MEASURES, headline
from ..report.json_schema import problems
from ..report.latency import format_timing, setting
from ..report.latency import rows_of as measured_rows
from ..report.page import code, figure, fold, page, paragraph, section, table, text
from ..report.plots import EMPTY, SERIES, draw_svg, scatter, short
from ..report.render import COSTS, PLURAL, budget_words, labels
from ..report.render import render as render_one
from ..report.schema import REPORT as SCHEMA
from ..report.units import mebi
from .files import PLAN, check_files, read_report

MOST_PICTURE = 16 * 2**20  # bytes


def read_valid(path: str | Path) -> dict[str, Any]:
    """The report of an artefact, held against the schema. Raises LoadError with the place of what does not fit."""
    report = read_report(Path(path))
    found = problems(report, SCHEMA)
    if found:
        raise LoadError(
            "the report does not fit its schema",
            where=str(path),
            why="; ".join(found),
            cure="compile again; `fxprune report --schema` prints the schema",
        )
    return report


def again(path: Path) -> str:
    """The page of one artefact, made anew from its files."""
    report = read_valid(path)
    return render_one(report, CompressionPlan.read(path / PLAN), pictures_of(path, report))


def pictures_of(path: Path, report: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures of an artefact by name, as far as they are whole and not too large for a page."""
    picture = str((report.get("tokens") or {}).get("picture", ""))
    pictures: dict[str, bytes] = {}
    if picture in report["files"]:
        check_files(path, report, only=(picture,))
        if report["files"][picture]["size_bytes"] <= MOST_PICTURE:
            pictures[picture] = (path / picture).read_bytes()
    return pictures


def names_of(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart.

    >>> names_of([Path("a/small"), Path("b/small")])
    ['a/small', 'b/small']
    """
    for count in range(1, 1 + max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-count:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]


def compare(paths: Sequence[str | Path]) -> dict[str, Any]:
    """``artifacts``: one entry each, in the order given. Raises LoadError for what is none."""
    folders = [Path(p) for p in paths]
    found = []
    for name, path in zip(names_of([f.resolve() for f in folders]), folders, strict=True):
        report = read_valid(path)
        first = headline(report)
        payload = report["files"].get(report["payload"], {})
        kinds: dict[str, list[int]] = {}
        for entry in (*report.get("groups", ()), *(() if "groups" in report else report["pruned"])):
            kept = kinds.setdefault(entry["kind"], [0, 0])
            kept[0] += entry["kept"]
            kept[1] += entry["size"]
        found.append(
            {
                "name": name,
                "path": str(path),
                "model": report["name"],
                "target": report["target"],
                "budget": budget_words(report),
                "importance": report.get("importance"),
                "recovery": (report.get("recovery") or {}).get("method", "none"),
                "cost": report["cost"],
                "memory": report.get("memory"),
                "measure": "" if first is None else first.measure,
                "dense_value": None if first is None else first.dense,
                "value": None if first is None else first.value,
                "error": None if first is None else first.error,
                "judged_on": None if first is None else first.on,
                "latency": report.get("latency"),
                "measured": report.get("measured"),
                "file_bytes": payload.get("size_bytes"),
                "max_rel": (report["parity"] or {}).get("max_rel"),
                "tolerance": (report["parity"] or {}).get("tolerance"),
                "kept": kinds,
                "pipeline": report["pipeline"],
                "plan_sha256": report["files"].get(PLAN, {}).get("sha256"),
                "groups": [{k: g[k] for k in ("group", "kind", "size", "kept")} for g in report.get("groups", ())],
            }
        )
    return {"artifacts": found}


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """A row per fact, a column per artefact: the table of the page and of the terminal."""
    artifacts = result["artifacts"]

    def row(words: str, cell: Any) -> list[str]:
        return [words, *(str(cell(a)) for a in artifacts)]

    rows = [
        row("model", lambda a: a["model"]),
        row("target", lambda a: a["target"]),
        row("budget", lambda a: a["budget"]),
        row("criterion, recovery", lambda a: f"{a['importance'] or 'none'}, {a['recovery']}"),
    ]
    for measure in dict.fromkeys(a["measure"] for a in artifacts if a["value"] is not None):
        rows.append(
            row(
                MEASURES[measure],
                lambda a, m=measure: "" if a["measure"] != m else f"{a['value']:.4f} ({a['judged_on']})",
            )
        )
    for label, key, show in COSTS:
        rows.append(
            row(label, lambda a, k=key, s=show: f"{s(a['cost']['compressed'][k])} ({a['cost']['ratio'][k]:.3f})")
        )
    if any(a["memory"] for a in artifacts):
        rows.append(
            row("largest activations", lambda a: mebi(a["memory"]["compressed"]["activations"]) if a["memory"] else "")
        )
    if any((a["latency"] or {}).get("achieved_ms") for a in artifacts):
        rows.append(
            row(
                "latency, measured, ms",
                lambda a: f"{a['latency']['achieved_ms']:.3f}" if (a["latency"] or {}).get("achieved_ms") else "",
            )
        )
    rows += _timing_rows(artifacts, row)
    rows.append(row("file", lambda a: mebi(a["file_bytes"]) if a["file_bytes"] else ""))
    rows.append(row("differs from its graph by", lambda a: "" if a["max_rel"] is None else f"{a['max_rel']:.1e}"))
    for kind in dict.fromkeys(k for a in artifacts for k, (kept, size) in a["kept"].items() if kept < size):
        rows.append(
            row(PLURAL.get(kind, kind), lambda a, k=kind: "{} of {}".format(*a["kept"][k]) if k in a["kept"] else "")
        )
    return rows


def _timing_rows(artifacts: Sequence[Mapping[str, Any]], row: Callable[[str, Any], list[str]]) -> list[list[str]]:
    """A row per batch size and count of threads that any of them was timed at, and where."""
    settings = {setting(r): (r["batch"], r["threads"]) for a in artifacts for r in measured_rows(a)}

    def cell(a: Mapping[str, Any], at: tuple[int, int]) -> str:
        return next((format_timing(r) for r in measured_rows(a) if (r["batch"], r["threads"]) == at), "")

    def place(a: Mapping[str, Any]) -> str:
        return a["measured"]["device"] if measured_rows(a) else (a["measured"] or {}).get("why") or "not measured"

    by_setting = sorted(settings.items(), key=lambda one: one[1])
    rows = [row(f"{words}, ms (speed-up)", lambda a, at=at: cell(a, at)) for words, at in by_setting]
    return [*rows, row("measured on", place)] if settings else []


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    artifacts = result["artifacts"]
    names = [a["name"] for a in artifacts]
    rows = [[words, *cells] for words, *cells in rows_of(result)]
    return page(
        "fxprune: " + ", ".join(names),
        [
            f"<h1>{len(artifacts)} artefacts</h1>",
            paragraph(", ".join(names), "soft"),
            section(
                "Side by side",
                table(("", *names), rows, range(1, len(names) + 1)),
                paragraph(
                    "In brackets: share of the artefact's own dense model. Figures on seen samples are upper bounds.",
                    "soft",
                ),
            ),
            _front(artifacts),
            _layers(artifacts),
            section("Pipelines", *(fold(a["name"], f"<pre>{text(a['pipeline'])}</pre>") for a in artifacts)),
            section(
                "Plans",
                table(("artefact", "SHA-256 of plan.json"), [(a["name"], code(a["plan_sha256"])) for a in artifacts]),
            ),
        ],
    )


def _front(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """Measure against cost, a line per measure."""
    parts = []
    for i, measure in enumerate(dict.fromkeys(a["measure"] for a in artifacts if a["value"] is not None)):
        points = [(a["cost"]["ratio"]["flops"], a["value"], a["name"]) for a in artifacts if a["measure"] == measure]
        parts.append(
            figure(
                scatter(f"front-{i}", [(MEASURES[measure], points)], "share of GMACs", MEASURES[measure]),
                f"{MEASURES[measure]} against GMACs",
            )
        )
    return section("What it costs, what it does", *parts)


def _layers(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """Kept share per layer, one line per artefact, for kinds whose groups all of them name alike."""
    parts = []
    for i, kind in enumerate(dict.fromkeys(g["kind"] for a in artifacts for g in a["groups"])):
        sides = [[g for g in a["groups"] if g["kind"] == kind] for a in artifacts]
        groups = sides[0]
        alike = all([g["group"] for g in side] == [g["group"] for g in groups] for side in sides)
        if not groups or not alike or all(g["kept"] == g["size"] for side in sides for g in side):
            continue
        words = labels(groups)

        def draw(axes: Any, sides: Any = sides, words: Any = words) -> None:
            places = range(len(words))
            axes.plot(places, [1.0] * len(words), color=EMPTY)
            for j, (side, artifact) in enumerate(zip(sides, artifacts, strict=True)):
                axes.plot(
                    places,
                    [g["kept"] / g["size"] for g in side],
                    marker="o",
                    markersize=4,
                    color=SERIES[j % len(SERIES)],
                    label=short(artifact["name"]),
                )
            step = max(1, -(-len(words) // 24))
            axes.set_xticks(range(0, len(words), step), [short(w, 12) for w in words[::step]])
            axes.set_ylim(0, 1.05)
            axes.set_ylabel("share kept")
            axes.grid(axis="y")
            axes.legend(loc="upper right", ncols=4, bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)

        parts.append(figure(draw_svg(f"layers-{i}", 2.3, draw), f"{PLURAL.get(kind, kind)} kept, layer by layer"))
    return section("What stays, layer by layer", *parts)
