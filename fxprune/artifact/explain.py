"""Why elements of a group went, from what its artefact's report and plan hold."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..errors import OptionError, nearest, spell
from ..ir.choice import BLOCK, TOKEN, AnyChoice, Choice
from ..ir.plan import CompressionPlan
from ..ir.sparsity import TWO_OF_FOUR, Sparsity
from ..passes.analysis.measure_rungs import KINDS
from ..report.scores import decode, rank
from .compare import read_valid
from .files import PLAN, check_files

Entry = Mapping[str, Any]

FIELDS = ("kind", "size", "granularity", "floor", "macs", "params", "criterion", "unit", "comparable", "parameters")
"""What an explanation repeats of a group's entry in the report."""


def explain(artifact: str | Path, group: str) -> dict[str, Any]:
    """What is known of one thing that a search could choose: its ``elements`` in the order in which they would be kept,
    and ``because``, in words.

    group   as in plan.json and the report, e.g. ``blocks.0.mlp.fc1:ffn``, ``blocks.3.attn.proj:token``. Which tokens go
            is decided for every image anew: they are no ``elements``

    Raises OptionError with the nearest name, LoadError for an artefact that is damaged or from before scores were kept.
    """
    path = Path(artifact)
    report = read_valid(path)
    check_files(path, report, only=(PLAN,))
    entries = {g["group"]: g for g in report.get("groups", ())}
    frozen = {f["group"]: f for f in report["frozen"]}
    if group in frozen:
        f = frozen[group]
        return {
            "group": group,
            "kind": f["kind"],
            "size": f["size"],
            "kept": f["size"],
            "frozen": f["why"],
            "elements": [],
            "recovery": [],
            "because": [f"nothing went: the group is frozen ({f['why']})"],
        }
    if group not in entries:
        raise OptionError(
            f"the artefact has no group '{group}'", where=str(path), cure=_nearest(group, entries, frozen)
        )
    entry = entries[group]
    keep = _elements_kept(CompressionPlan.read(path / PLAN).choices.get(group), entry)
    elements = [] if entry["kind"] == TOKEN else _elements(entry, keep)
    recovery = [s for s in (report.get("recovery") or {}).get("steps", ()) if s["parameter"] in entry["parameters"]]
    edge = _edge(entry, len(keep), report)
    return {
        "group": group,
        **{k: entry[k] for k in FIELDS},
        "kept": len(keep),
        "removed": sorted(set(range(entry["size"])) - keep),
        "elements": elements,
        "edge": edge,
        "recovery": recovery,
        "frozen": "",
        "because": _because(entry, len(keep), elements, edge, recovery, report),
    }


def _elements_kept(choice: AnyChoice | None, entry: Entry) -> set[int]:
    """The elements that stay; of tokens, which have no identity, as many."""
    if isinstance(choice, Choice):
        return set(choice.keep)
    if isinstance(choice, Sparsity):
        return set(choice.kept.flatten().nonzero().flatten().tolist())
    return set(range(entry["kept"] if entry["kind"] == TOKEN else entry["size"]))


def _elements(entry: Entry, keep: set[int]) -> list[dict[str, Any]]:
    """In the order in which they would be kept, where scores are known."""
    if entry["scores"] is None:
        return [
            {"element": e, "score": None, "rank": None, "rank_by_score": None, "kept": e in keep}
            for e in range(entry["size"])
        ]
    scores = decode(entry["scores"], entry["size"])
    by_score = {e: i + 1 for i, e in enumerate(sorted(range(len(scores)), key=lambda e: (-scores[e], e)))}
    return [
        {"element": e, "score": scores[e], "rank": i + 1, "rank_by_score": by_score[e], "kept": e in keep}
        for i, e in enumerate(rank(entry))
    ]


def _nearest(group: str, entries: Mapping[str, Entry], frozen: Mapping[str, Entry]) -> str:
    said = nearest(group, [*entries, *frozen])
    close = said.partition("? (")
    return close[0] + "?" if close[1] and len(entries) + len(frozen) > 12 else said


def worth(entry: Entry, kept: int) -> tuple[float | None, float | None]:
    """(what the last chunk that stays is worth per element's MAC, what the first one that went was worth).

    A chunk is one step of the granularity. How many stay is decided by the curve, or by the best scores, whoever the
    members are. None where there is no such chunk, or no scores.
    """
    if entry["scores"] is None or not entry["macs"]:
        return None, None
    size, step = entry["size"], entry["granularity"]
    best = sorted(decode(entry["scores"], size), reverse=True)
    curve = decode(entry["curve"], size + 1) if entry.get("curve") and entry["comparable"] else [0.0, *accumulate(best)]
    down = max(kept - step if kept < size else ((size - 1) // step) * step, 0)
    inside = (curve[kept] - curve[down]) / ((kept - down) * entry["macs"]) if kept > 0 else None
    upper = min(kept + step, size)
    outside = (curve[upper] - curve[kept]) / ((upper - kept) * entry["macs"]) if kept < size else None
    return inside, outside


def _edge(entry: Entry, kept: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """Scores per MAC at the cut, here and elsewhere; only where scores of different groups can be compared."""
    inside, outside = worth(entry, kept)
    edge: dict[str, Any] = {"kept": inside, "removed": outside, "elsewhere": None}
    if not entry["comparable"]:
        return edge
    others = [
        (g["group"], *worth(g, g["kept"]))
        for g in report["groups"]
        if g["group"] != entry["group"]
        and g["comparable"]
        and g.get("searched", True)
        and g["criterion"] == entry["criterion"]
    ]
    spared = [(w, name) for name, w, _ in others if w is not None]
    if spared:
        low, name = min(spared)
        edge["elsewhere"] = {"kept": low, "group": name}
    return edge


def _because(
    entry: Entry,
    kept: int,
    elements: list[dict[str, Any]],
    edge: Mapping[str, Any],
    recovery: list[dict[str, Any]],
    report: Mapping[str, Any],
) -> list[str]:
    gone, unit = entry["size"] - kept, entry["unit"]
    lines = _what_went(entry, gone, report)
    if not entry.get("searched", True):
        lines.append(spell(f"groups of kind '{entry['kind']}' were not asked for (`--prune`)"))
    if entry["kind"] == TOKEN:
        return lines
    if entry["size"] > 1:
        lines.append(
            f"counts are multiples of {entry['granularity']}, and at least {entry['floor']}"
            + (": it is at its floor" if kept == entry["floor"] and gone else "")
            + (": it went below its floor, which nobody asked for" if kept < entry["floor"] else "")
        )
    if entry["scores"] is None:
        why = "too many to keep" if entry.get("pattern") == TWO_OF_FOUR else "the plan was given, not searched"
        return [*lines, f"no scores are known: {why}"]
    stay = [e["score"] for e in elements if e["kept"]]
    went = [e["score"] for e in elements if not e["kept"]]
    if went and stay:
        lines.append(
            f"{entry['criterion']} ({unit}): what went scores {min(went):.4g} to {max(went):.4g}, what stays "
            f"{min(stay):.4g} to {max(stay):.4g}"
        )
    if entry["size"] == 1:
        lines.append(
            f"{entry['criterion']} ({unit}): it is worth {elements[0]['score']:.4g}, "
            "what its elements are worth together"
        )
    if (said := _tail(entry, kept)) and gone:
        lines.append(said)
    elif entry["order"] is not None and gone:
        swapped = sum(not e["kept"] and e["rank_by_score"] <= kept for e in elements)
        lines.append(
            f"how many stay follows from the scores, which ones from structured OBS: {swapped} of those that "
            "went score among the best, but others can do their work"
        )
    elif went and stay and max(went) > min(stay):
        lines.append("members were chosen by more than their own scores (rearranged, or scored again in rounds)")
    if not entry["comparable"]:
        lines.append(
            "scores of different groups have no common unit: the group competes by the share of its score "
            "that stays, against the share of the MACs it costs"
        )
    elif edge["removed"] is not None and edge["elsewhere"] is not None and edge["removed"] > 0:
        where, value = edge["elsewhere"]["group"], edge["elsewhere"]["kept"]
        lines.append(
            f"threshold: the next ones to keep here are worth {1e6 * edge['removed']:.4g} per MMAC; the least "
            f"that stays elsewhere is worth {1e6 * value:.4g} ({where})"
        )
    scale = (report.get("search") or {}).get("head_scale", 1.0)
    if scale != 1.0 and entry["kind"] in ("head", "kv", "query"):
        lines.append(f"heads counted {scale:g} times their score")
    for step in recovery:
        lines.append(
            f"recovery: {step['parameter']} had a weighted error of {step['before']:.4g}, {step['after']:.4g} "
            f"after ({step['role']})"
        )
    if gone and not recovery and entry["kind"] != BLOCK:
        lines.append("recovery changed no weight that the group reaches")
    return lines


def _tail(entry: Entry, kept: int) -> str:
    """What was known of the elements that went as the tail of an order; "" where members were chosen one by one."""
    if entry["order"] is None:
        return ""
    if entry.get("curve") is None:
        return "its elements are the directions of a basis, in the order of what they carry: they go from the end"
    if entry["kind"] not in map(str, KINDS) or entry["criterion"] == "obs":
        return ""
    curve = decode(entry["curve"], entry["size"] + 1)
    low = entry["floor"]
    return (
        f"what went was measured as a whole: losing the last {entry['size'] - kept} at once costs "
        f"{curve[-1] - curve[kept]:.4g} ({entry['unit']}), going down to {low} would cost {curve[-1] - curve[low]:.4g}"
    )


def _what_went(entry: Entry, gone: int, report: Mapping[str, Any]) -> list[str]:
    """How much of it went, and what an element costs."""
    size, each = entry["size"], "" if entry["macs"] is None else f"{entry['macs'] / 1e3:,.3f} kMACs"
    if entry["kind"] == TOKEN:
        by = (report.get("tokens") or {}).get("reducer")
        said = f"{gone} of {size} tokens are gone behind this attention, {entry['removed']} of them here"
        lines = [said + (f", by {by}" if by else "") + f"; {entry['protected']} more are protected"]
        if each:
            lines.append(f"each costs {each} from here to the next attention where tokens may go")
        return [*lines, "how many go was decided on whole schedules; which ones, is decided for every image anew"]
    if entry["kind"] == BLOCK:
        gate = {d["parameter"]: d for d in ((report.get("sparsity") or {}).get("gate") or {}).get("layers", ())}
        said = gate.get(entry["parameters"][0], {}).get("said")
        lines = [f"{gone} of {size} tiles of {entry['pattern']} are zero" + (f"; each costs {each}" if each else "")]
        return [*lines, *([f"on this target: {said}"] if said else [])]
    cost = f"{each} and {entry['params']:,} parameters in the dense model"
    if size == 1:
        return [f"it {'went' if gone else 'stays'} as a whole: it costs {cost}"]
    if gone == size:
        return [f"the whole layer went, with all that only it needs: all {size} elements; each costs {cost}"]
    return [f"{gone} of {size} went; each costs {cost}"]
