"""What a table does not say about a target: what checked the payload, and how to finish one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def target_lines(report: Mapping[str, Any]) -> list[str]:
    """What ran the payload when it was checked; and what is missing to finish it, with the commands that do."""
    from rich.markup import escape

    unfinished, lines = report.get("unfinished"), []
    runtime = (report.get("parity") or {}).get("runtime", "")
    if runtime and runtime != report["target"]:
        options = ", ".join(f"{k} {v}" for k, v in (report.get("target_options") or {}).items())
        name = f"{report['target']} ({options})" if options else report["target"]
        lines.append(escape(f"target    {name}, checked with {runtime}"))
    if unfinished:
        lines += [f"[yellow]missing[/]   {escape(what)}" for what in unfinished["missing"]]
        lines.append(escape(f"finish    on a machine that has it: {unfinished['finish']}"))
        by_hand = report.get("lowering", {}).get("trtexec")
        lines += [escape(f"   or     {by_hand}")] if by_hand else []
    return lines


def constant_lines(parity: Mapping[str, Any] | None) -> list[str]:
    """What the comparison could not show: outputs that were the same whatever went in, such as of a head of zeros."""
    names = (parity or {}).get("constant", ())
    return [f"output '{name}' was the same for every input tried: that it agrees shows little" for name in names]
