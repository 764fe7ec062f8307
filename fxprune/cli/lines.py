"""What a program and a report say in a few lines of a terminal."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.choice import BLOCK
from ..ir.cost import COUNTED, CostModel
from ..ir.group import Kind, PruneGroup
from ..ir.program import Program
from ..ir.token_flow import describe_tokens
from ..report.entries import entries_of
from ..report.op_gaps import op_gaps
from ..report.units import giga

pass
if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    pass

PLACES = 3  # how many places or names a line lists before it says "and n more"


def inspection(program: Program) -> dict[str, Any]:
    """The groups of a program as plain data, for ``fxprune inspect --json``."""
    dense = CostModel(program)()

    def one(g: PruneGroup) -> dict[str, Any]:
        return {
            "name": g.name,
            "kind": str(g.kind),
            "size": g.size,
            "prunable": g.prunable,
            "frozen": g.frozen,
            "exact": g.exact,
            "macs_per_element": g.macs,
            "share_of_macs": g.macs * g.size / max(dense.flops, 1),
            "granularity": g.granularity,
            "floor": g.floor,
            "nodes": list(g.nodes),
            "slots": [{"parameter": s.parameter, "dimension": s.position} for s in g.slots],
        }

    axes = program.need("axes")
    return {
        "name": program.name,
        "cost": {"flops": dense.flops, "params": dense.params, "bytes": dense.bytes},
        "counted": COUNTED,
        "groups": [one(g) for g in program.need("groups")],
        "notes": list(program.notes),
        "ops_without_a_rule": dict(axes.unknown),
        "gaps": gaps_of(program),
        "tokens": None if program.tokens is None else describe_tokens(program.tokens, None),
    }


def gaps_of(program: Program) -> list[dict[str, Any]]:
    """What is not known of ops that prunable groups pass through."""
    groups = program.need("groups")
    return op_gaps(groups, [g.name for g in groups if g.prunable])


def token_lines(told: Mapping[str, Any] | None) -> list[str]:
    """Where tokens become fewer, or may, and why not elsewhere; nothing for models without attention."""
    sites = told["sites"] if told else []
    if not told or not sites:
        return []
    usable, lines = [s for s in sites if not s["frozen"]], []
    if told["reducer"] and any(s["removed"] for s in sites):
        left = " ".join(str(s["left"]) for s in usable)
        lines.append(f"tokens    {plain_text(told['reducer'])}: {usable[0]['tokens']} in front, then {left}")
    elif usable:
        first = usable[0]
        lines.append(
            f"tokens    {first['tokens']} ({first['protected']} protected) may be reduced behind "
            f"{len(usable)} attentions  [dim]({plain_text(some([s['site'] for s in usable]))})[/]"
        )
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for site in sites:
        if site["frozen"]:
            by_reason[site["frozen"].partition(" at ")[0]].append(site["site"])
    reasons = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    lines += [
        f"frozen    {len(names)} token sites: {plain_text(why)}  [dim]({plain_text(some(names))})[/]"
        for why, names in reasons[:4]
    ]
    more = [f"[dim]          and {len(reasons) - 4} more reasons (--json lists them)[/]"] if reasons[4:] else []
    return [*lines, *more]


def sparsity_lines(report: Mapping[str, Any]) -> list[str]:
    """Zeros inside weights: what is not zero, and what runs all the same, in MACs of the whole model."""
    told = report.get("sparsity")
    if not told:
        return []
    flops = told["flops"]
    share = {k: flops[k] / max(flops["dense"], 1) for k in ("effective", "executed")}
    count, pattern = len(entries_of(report, BLOCK)), told.get("pattern") or "tiles"
    return [
        f"zeros     {pattern} in {count} weights: {giga(flops['effective'])} GMACs are effective "
        f"({share['effective']:.3f}), {giga(flops['executed'])} are executed ({share['executed']:.3f})"
    ]


def latency_lines(report: Mapping[str, Any]) -> list[str]:
    """What one call takes: dense, predicted, and measured where the plan itself was."""
    told = report.get("latency")
    if not told:
        return []
    dense, count = told["dense_ms"], told["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if count else ""
    figures = [
        f"{name} {told[key]:.3g} ms ({told[key] / dense:.3f})"
        for name, key in (("asked", "target"), ("predicted", "predicted_ms"), ("achieved", "achieved_ms"))
        if told[key] is not None
    ]
    if last := told.get("delivered"):
        figures.append(f"delivered {last['achieved_ms']:.3g} ms ({last['achieved_ms'] / dense:.3f})")
    return [
        f"latency   dense {dense:.3g} ms, {', '.join(figures)}  "
        f"[dim]({plain_text(told['backend'])} on {plain_text(told['device'])}, batch {told['batch']}{threads})[/]"
    ]


def frozen_lines(frozen: Iterable[Mapping[str, Any]], short: bool = False) -> list[str]:
    """One line per reason, most frequent first, from entries of {group, kind, size, why} as in ``report.json``.

    short   kernels, vocabularies and other axes that nobody would prune share one line
    """
    by_reason: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for entry in frozen:
        if entry["size"] > 1:
            by_reason[entry["why"].partition(" at ")[0]].append(entry)  # the op is reason enough; its node is in --json
    lines, trivial = [], []
    for why, entries in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        if short and all(e["kind"] == str(Kind.OTHER) for e in entries):
            trivial.append(f"{why} {len(entries)}")
            continue
        kinds = "/".join(sorted({e["kind"] for e in entries}))
        which = plain_text(some([e["group"] for e in entries]))
        lines.append(f"frozen    {len(entries)} {kinds}: {plain_text(why)}  [dim]({which})[/]")
    if trivial:
        lines.append(f"[dim]fixed     {plain_text(', '.join(trivial))} (`fxprune inspect` lists them)[/]")
    return lines


def _frozen(program: Program) -> list[dict[str, Any]]:
    return [
        {"group": g.name, "kind": str(g.kind), "size": g.size, "why": g.frozen}
        for g in program.need("groups")
        if g.frozen
    ]


def count_kept(choices: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Kind -> (groups, elements kept, elements in the dense model) over what a plan cuts."""
    totals: dict[str, tuple[int, int, int]] = {}
    for c in choices.values():
        groups, kept, size = totals.get(c.kind, (0, 0, 0))
        totals[c.kind] = (groups + 1, kept + len(c.keep), size + c.size)
    return totals


def places(group: PruneGroup) -> str:
    """Where a group reaches: its weights with the dimension it indexes, below the path they share."""
    slots = [s for s in group.slots if s.parameter.endswith("weight")] or list(group.slots)
    paths = [s.parameter.removesuffix(".weight").split(".") for s in slots]
    shared = 0
    while len(paths) > 1 and all(len(p) > shared + 1 and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    tails = [f"{'.'.join(p[shared:])}[{s.position}]" for p, s in zip(paths, slots, strict=True)]
    return (".".join(paths[0][:shared]) + ": " if shared else "") + some(tails, 4)


def some(names: Sequence[str], count: int = PLACES) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def plain_text(text: str | Path) -> str:
    """Text that rich must not read as markup: names hold square brackets."""
    from rich.markup import escape

    return escape(str(text))
