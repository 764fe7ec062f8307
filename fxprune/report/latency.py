"""What a report's page, and the terminal, say of time: measured beside the dense model, foretold and achieved, and the
other targets that the same program was lowered to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .page import Markup, code, figure, fold, paragraph, printable, section, table, verdict
from .plots import pairs

Report = Mapping[str, Any]
Row = Mapping[str, Any]


APART = 0.1  # share by which the ratio of the medians may be off the median of the rounds' ratios
BUSY = 0.05  # standard error over ratio: beyond it the machine did other things meanwhile


def rows_of(report: Report) -> list[Row]:
    """The measured rows, by batch size; none where nothing was measured."""
    told = report.get("measured") or {}
    return [row for row in told.get("rows") or () if _finite(row.get("compressed_ms"))]


def compare_latency(report: Report) -> list[Row]:
    """Those that have a dense figure beside them."""
    return [row for row in rows_of(report) if _finite(row.get("dense_ms")) and _finite(row.get("speedup"))]


def doubt(row: Row) -> str:
    """What to say of a row whose rounds do not agree, or whose medians tell another story; "" where they do.

    >>> doubt({"ratio": 0.5, "error": 0.001}), doubt({"ratio": 0.5, "error": 0.1})
    ('', 'the machine was busy: the ratio is known to 20 % only')
    >>> doubt({"ratio": 0.8, "error": 0.001, "dense_ms": 9.0, "compressed_ms": 6.0})
    'the machine was busy: the two medians alone would say 1.50x'
    """
    if not _finite(row.get("ratio")):
        return ""
    if row["error"] > BUSY * row["ratio"]:
        return f"the machine was busy: the ratio is known to {100 * row['error'] / row['ratio']:.0f} % only"
    if not _finite(row.get("dense_ms")) or not row["compressed_ms"]:
        return ""
    medians = row["dense_ms"] / row["compressed_ms"]
    return (
        ""
        if abs(medians * row["ratio"] - 1) <= APART
        else f"the machine was busy: the two medians alone would say {medians:.2f}x"
    )


def setting(row: Row) -> str:
    """The batch size and threads of a row, in words.

    >>> setting({"batch": 8, "threads": 1})
    'batch 8, 1 thread'
    """
    count = row["threads"]
    return f"batch {row['batch']}" + (f", {count} thread{'s' * (count > 1)}" if count else "")


def format_timing(row: Row) -> str:
    """Milliseconds and, where there is a dense figure, the speed-up.

    >>> format_timing({"compressed_ms": 2.0, "speedup": 1.5}), format_timing({"compressed_ms": 2.0, "speedup": None})
    ('2.000 (1.50x)', '2.000')
    """
    return f"{row['compressed_ms']:.3f}" + (f" ({row['speedup']:.2f}x)" if _finite(row.get("speedup")) else "")


def why_none(report: Report) -> str:
    """Why nothing was measured, in words for people; "" where something was."""
    if rows_of(report) or (report.get("latency") or {}).get("achieved_ms"):
        return ""
    why = (report.get("measured") or {}).get("why")
    return (
        f"Latency was not measured: {why}; fxprune bench measures it."
        if why
        else "Latency was not part of this run: fxprune bench measures it."
    )


def summary_rows(report: Report) -> list[Sequence[object]]:
    """(what, dense, compressed, ratio) for the table of dense against compressed."""
    found: list[Sequence[object]] = [
        (f"latency, {setting(r)}", f"{r['dense_ms']:.3f} ms", f"{r['compressed_ms']:.3f} ms", f"{r['ratio']:.3f}")
        for r in compare_latency(report)
    ]
    latency = report.get("latency") or {}
    if not found and latency.get("dense_ms") and latency.get("achieved_ms"):
        a, b = latency["dense_ms"], latency["achieved_ms"]
        found.append(("latency, measured", f"{a:.3f} ms", f"{b:.3f} ms", f"{b / a:.3f}"))
    return found


def summary_card(report: Report) -> list[tuple[str, str, str]]:
    """The speed-up, large: of the setting that was asked for, else of the first row."""
    rows = compare_latency(report)
    for row in [*(r for r in rows if r["by"] != "bench"), *rows][:1]:
        return [
            (
                "speed-up, measured",
                f"{row['speedup']:.2f}x",
                f"{row['dense_ms']:.3f} to {row['compressed_ms']:.3f} ms, {setting(row)}"
                + f"; {doubt(row)}" * bool(doubt(row)),
            )
        ]
    return []


def render_measured(report: Report) -> str:
    """Dense against compressed in time, with how sure that is and what of the promise it is."""
    told, rows = report.get("measured") or {}, rows_of(report)
    if not rows:
        return ""
    head = (
        "batch",
        "threads",
        "dense ms",
        "compressed ms",
        "ratio",
        "standard error",
        "speed-up",
        "of 1 / MACs",
        "rounds",
        "by",
    )
    cells = [
        (
            r["batch"],
            r["threads"] or "runtime's own",
            _number(r["dense_ms"], 3),
            _number(r["compressed_ms"], 3),
            _number(r["ratio"], 3),
            _number(r["error"], 4),
            _number(r["speedup"], 2, "x"),
            _number(r["realised"], 2),
            r["rounds"],
            r["by"],
        )
        for r in rows
    ]
    what = ", ".join(f"{k} {v}" for k, v in (told.get("versions") or {}).items())
    return section(
        "Measured latency",
        table(head, cells, range(9)),
        paragraph(
            f"{told.get('target')} on {told.get('device')}, {told.get('date')}, {what}. Both files were lowered "
            "in the same way and timed in turns; the ratio is the median of the rounds' own ratios. The speed-up "
            "over what the MACs promise (dense over compressed) is in the column 'of 1 / MACs': 1 means that "
            "all of it became real.",
            "soft",
        ),
        *(paragraph(f"At {setting(r)} {doubt(r)}. fxprune bench --record measures again.") for r in rows if doubt(r)),
        paragraph(f"No dense figure: {told['why']}.", "soft") if told.get("why") else "",
    )


def render_predicted(report: Report) -> str:
    """Predicted and achieved latency, whole and per layer, where a table was measured."""
    told = report.get("latency")
    if not told:
        return ""
    last = told.get("delivered") or {}
    rows: list[Sequence[object]] = [
        (words, f"{value:.3f} ms")
        for words, value in (
            ("asked for", told.get("target")),
            ("dense, measured", told.get("dense_ms")),
            ("predicted", told.get("predicted_ms")),
            ("achieved by the plan, before recovery", told.get("achieved_ms")),
            ("achieved by the delivered file", last.get("achieved_ms")),
        )
        if _finite(value)
    ]
    best = last.get("achieved_ms") or told.get("achieved_ms")
    if _finite(told.get("predicted_ms")) and _finite(best) and best:
        rows.append(("predicted over achieved", f"{told['predicted_ms'] / best:.3f}"))
    if last.get("met") is not None:
        rows.append(
            (
                "the budget",
                verdict(last["met"], "met by the delivered file" if last["met"] else "missed by the delivered file"),
            )
        )
    if tokens := told.get("tokens"):
        ops = [ms for ms in tokens["ops_ms"].values() if _finite(ms)]
        rows += [
            (f"of it, {len(ops)} ops that reduce tokens, predicted", f"{sum(ops):.3f} ms"),
            ("what goes with tokens between products, predicted against dense", f"{tokens['between_ms']:+.3f} ms"),
        ]
    layers = [one for one in told.get("layers") or () if isinstance(one, Mapping)]
    both = [one for one in layers if _finite(one.get("predicted_ms")) and _finite(one.get("achieved_ms"))]
    names = [str(one.get("name") or one.get("layer") or i) for i, one in enumerate(both)]
    columns = list(dict.fromkeys(k for one in layers for k in one))
    return section(
        "Predicted and achieved latency",
        table(("", ""), rows, (1,)),
        figure(
            pairs(
                "latency",
                names,
                [one["predicted_ms"] for one in both],
                [one["achieved_ms"] for one in both],
                "ms",
                ("predicted", "achieved"),
            ),
            "Per layer",
        ),
        fold("per layer", table(columns, [[one.get(k, "") for k in columns] for one in layers])),
    )


def parity_rows(report: Report) -> list[Sequence[object]]:
    """(compared, largest, relative, accepted, verdict, sizes) of this target and of earlier ones."""
    found: list[Sequence[object]] = []
    mine = {"target": report["target"], "payload": report.get("payload"), "parity": report.get("parity")}
    for one in (mine, *report.get("earlier", ())):
        parity = one.get("parity")
        if not parity:
            continue
        tried = in_words(parity["tried"])
        words = f"{one['target']}: {one.get('payload')} against the sliced graph"
        if one is not mine:
            words += " (an earlier target, its file is not here)"
        found.append(
            (
                words,
                f"{parity['max_abs']:.1e}",
                f"{parity['max_rel']:.1e}",
                f"{parity['tolerance']:.0e}",
                mark(parity["ok"]),
                tried,
            )
        )
    return found


def in_words(tried: Iterable[Mapping[str, Any]]) -> str:
    """The sizes of several runs."""
    return "; ".join(", ".join(f"{k}={v}" for k, v in sizes.items()) or "example sizes" for sizes in tried)


def render_earlier(report: Report) -> str:
    """What is known of other targets that the same program was lowered to."""
    rows = []
    for one in report.get("earlier", ()):
        parity = one.get("parity") or {}
        speeds = "; ".join(f"{r['speedup']:.2f}x at {setting(r)}" for r in compare_latency(one))
        rows.append(
            (
                code(one["target"]),
                parity.get("runtime", ""),
                _number(parity.get("max_rel"), 1, form="e"),
                speeds,
                ", ".join(f"{k} {v}" for k, v in (parity.get("versions") or {}).items()),
            )
        )
    return section(
        "Earlier targets", table(("target", "checked with", "differs by", "measured", "versions"), rows, (2,))
    )


def mark(ok: bool) -> Markup:
    """Passed or failed, in its colour."""
    return verdict(ok, "passed" if ok else "failed")


def speed_lines(report: Report) -> list[str]:
    """For the terminal: how fast the result is, or why nobody knows."""
    from rich.markup import escape

    told = report.get("measured")
    if not told:
        return []
    lines = []
    for r in rows_of(report):
        if r not in compare_latency(report):
            lines.append(f"speed     {r['compressed_ms']:.3g} ms  ({told['target']}, {setting(r)})")
            continue
        lines.append(
            f"speed     {r['speedup']:.2f}x, {r['dense_ms']:.3g} to {r['compressed_ms']:.3g} ms, measured: "
            f"{r['realised']:.2f} of what the MACs promise  ({told['target']} on {told['device']}, "
            f"{setting(r)}, standard error {r['error'] / r['ratio']:.1%})"
        )
        if doubt(r):
            lines.append(f"          {doubt(r)}; fxprune bench --record measures again")
    if told.get("why"):
        lines.append(f"speed     not measured{' beside dense' * bool(lines)}: {told['why']}")
    return [escape(printable(line)) for line in lines]


def _number(value: Any, digits: int, unit: str = "", form: str = "f") -> str:
    return f"{value:.{digits}{form}}{unit}" if _finite(value) else ""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
