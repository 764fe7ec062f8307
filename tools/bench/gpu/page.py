"""One page of what the stages' files hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.cells import Record, Stage
from bench.record import read

DIGITS = 4


def write_page(out: Path, stages: Sequence[Stage], dry: bool) -> Path:
    """``gpu.md`` in ``out``, made anew from the files that are there."""
    lines = [
        "# A GPU, measured" if not dry else "# A dry run: toy sizes, on the CPU; nothing here says anything of a GPU"
    ]
    for stage in stages:
        lines += ["", f"## {stage.title}", "", *_stage(stage, stage.path(out), dry)]
    page = out / "gpu.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def _stage(stage: Stage, path: Path, dry: bool) -> list[str]:
    if not path.exists():
        return ["Not begun."]
    held = read(path)
    records, about = held.get("cells", []), held["about"]
    head = {key: held.get(key) for key in ("date", "commit", "gpu", "torch", "triton")}
    told = [", ".join(f"{key} {value}" for key, value in head.items() if value), ""]
    told += [f"{len(records)} of {about.get('cells', '?')} cells; {about.get('left', 'begun, not ended')}.", ""]
    told += [f"Not exercised: {text}." for text in stage.unexercised if dry]
    rows = [r for r in records if "error" not in r and "skipped" not in r]
    told += ["", *table(rows, stage.columns)] if rows else []
    told += [f"- {text}" for text in about.get("targets", ())]
    for word in ("skipped", "error"):
        told += [f"- {r['cell']}: {word}: {r[word]}" for r in records if word in r]
    return told


def table(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """A table of the records' ``columns``, those that no record has left out."""
    shown = [c for c in columns if any(r.get(c) is not None for r in records)]
    lines = [f"| {' | '.join(['cell', *shown])} |", f"|{'---|' * (len(shown) + 1)}"]
    return [*lines, *(f"| {' | '.join([r['cell'], *(words(r.get(c)) for c in shown)])} |" for r in records), ""]


def words(value: Any) -> str:
    """A figure in a cell of a table.

    >>> words({"1": {"ms": 0.123456, "ok": True}}), words(None), words([1, 2.0])
    ('1: (ms 0.1235, ok yes)', '', '1 / 2')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.{DIGITS}g}"
    if isinstance(value, dict):
        inner = (f"{k}: ({words(v)})" if isinstance(v, dict) else f"{k} {words(v)}" for k, v in value.items())
        return ", ".join(inner)
    if isinstance(value, list):
        return " / ".join(map(words, value))
    return str(value).replace("|", "/").replace("\n", " ")
