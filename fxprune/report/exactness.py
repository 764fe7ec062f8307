"""Sections of a page: zeros inside weights, and how exact everything was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.choice import BLOCK
from .entries import entries_of
from .latency import in_words, mark, parity_rows
from .page import bar, code, fold, paragraph, section, table
from .target_lines import constant_lines
from .units import giga

Report = Mapping[str, Any]


def zeros_section(report: Report) -> str:
    """What is zero inside weights, and what runs all the same."""
    told = report.get("sparsity")
    if not told:
        return ""
    flops, gate = told.get("flops", {}), (told.get("gate") or {}).get("layers", ())
    said = {d["parameter"]: d for d in gate}
    rows = [
        (
            code(w["parameters"][0]),
            "x".join(map(str, w["shape"])),
            w["kept"],
            w["size"],
            bar(w["density"]),
            f"{w['density']:.3f}",
            said.get(w["parameters"][0], {}).get("said", ""),
        )
        for w in entries_of(report, BLOCK)
    ]
    whole = max(flops.get("dense", 1), 1)
    words = "; ".join(
        f"{giga(flops[k])} GMACs {k} ({flops[k] / whole:.3f} of dense)" for k in ("effective", "executed") if k in flops
    )
    listing = table(("weight", "shape", "tiles kept", "of", "", "density", "on this target"), rows, (2, 3, 5))
    return section(
        "Zeros inside weights",
        paragraph(f"{told.get('pattern') or 'tiles'}: {words}."),
        fold(f"{len(rows)} weights", listing),
    )


def exactness_section(report: Report) -> str:
    """How near every form of the model is to the one before it."""
    rows: list[Sequence[object]] = []
    masked, parity = report.get("masked"), report.get("parity")
    old = [{"compared": "the dense graph with masks and the sliced one", **masked}] if masked else []
    links = report.get("proof") or old
    for link in links:
        verdict = mark(link["max_rel"] <= link["tolerance"])
        sizes = in_words(link.get("tried", ()))
        rows.append((link["compared"], "", f"{link['max_rel']:.1e}", f"{link['tolerance']:.0e}", verdict, sizes))
    rows += parity_rows(report)
    more = [] if not parity else [f"not run at {s['sizes']}: {s['why']}" for s in parity.get("skipped", ())]
    if parity and parity.get("unsteady"):
        more.append(f"{parity['unsteady']} samples were left out: the pruned model itself jumps there")
    if parity and parity.get("rounded"):
        more.append(
            f"outputs differ by {parity['rounded']:.1e} in places, which is rounding: the pruned model itself is as "
            "far from what fp64 gives"
        )
    more += constant_lines(parity)
    listing = table(("compared", "largest", "relative", "accepted", "", "sizes"), rows, (1, 2, 3))
    return section("How exact it is", listing, *(paragraph(m, "soft") for m in more))
