"""``report.html``: everything ``report.json`` knows, on one page for people. One file, no script, no request."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..ir.choice import TOKEN
from ..ir.plan import CompressionPlan
from .entries import entries_of
from .exactness import exactness_section, zeros_section
from .headline import CROSS_FITTED, HELD_OUT, MEASURES, Headline, headline
from .latency import render_earlier, render_measured, render_predicted, summary_card, summary_rows, why_none
from .op_gaps import gap_lines
from .page import Markup, bar, cards, code, figure, fold, page, paragraph, picture, section, table, text
from .plots import SERIES, draw_kept, heat_map, pairs
from .units import giga, mebi, mega

Report = Mapping[str, Any]
PLURAL = {
    "head": "attention heads",
    "kv": "key/value heads",
    "ffn": "neurons",
    "channel": "channels",
    "token": "tokens",
    "query": "query heads",
    "qk": "query/key width",
    "v": "value width",
    "width": "residual width",
    "block": "tiles",
}
COSTS = (("GMACs", "flops", giga), ("parameters", "params", mega), ("weights", "bytes", mebi))


def render(report: Report, plan: CompressionPlan, pictures: Mapping[str, bytes]) -> str:
    """The page. All names in ``report`` are taken for untrusted text.

    pictures   PNG files of the artefact by name, such as the one that ``report["tokens"]["picture"]`` names
    """
    return page(
        f"fxprune: {report['name']}",
        [
            _head(report),
            _summary(report),
            _errors(report),
            _render_kept(report),
            _tokens(report, pictures),
            _importance(report, plan),
            zeros_section(report),
            render_measured(report),
            render_predicted(report),
            exactness_section(report),
            render_earlier(report),
            _frozen(report),
            section("Sliced, and not known in full", *map(paragraph, gap_lines(report.get("gaps", ())))),
            _replay(report),
            _provenance(report),
        ],
    )


def labels(entries: Sequence[Mapping[str, Any]], key: str = "group") -> list[str]:
    """Short names of groups or sites: the number of the layer where that tells them apart, else the path.

    >>> labels([{"group": "blocks.0.mlp.fc1:ffn"}, {"group": "blocks.1.mlp.fc1:ffn"}])
    ['0', '1']
    """
    names = [str(e[key]) for e in entries]
    numbers = ["".join(re.findall(r"(?:^|\.)(\d+)(?=\.)", n)[:1]) for n in names]
    stages = [".".join(re.findall(r"(?:^|\.)(\d+)(?=\.)", n)) for n in names]
    for made in (numbers, stages):
        if all(made) and len(set(made)) == len(made):
            return made
    return [n.partition(":")[0] for n in names]


def budget_words(report: Report) -> str:
    """What was asked for."""
    budget = report.get("budget")
    if not budget:
        return "no budget: the plan or the token counts were given"
    if budget["relative"]:
        return f"at most {budget['amount']:g} of the dense {budget['metric']}"
    return f"at most {budget['amount']:.6g} {budget['metric']}"


def _head(report: Report) -> str:
    made = f"target {report['target']}, criterion {report.get('importance') or 'none'}, seed {report['seed']}"
    return f"<h1>{text(report['name'])}</h1>\n{paragraph(made, 'soft')}"


def _summary(report: Report) -> str:
    cost, memory, parity = report["cost"], report.get("memory"), report.get("parity")
    first = headline(report)
    rows: list[Sequence[object]] = []
    if first is not None:
        rows.append((first.about, "" if first.dense is None else f"{first.dense:.4f}", str(first), ""))
    for label, key, show in COSTS:
        rows.append((label, show(cost["dense"][key]), show(cost["compressed"][key]), f"{cost['ratio'][key]:.3f}"))
    if memory:
        for label, key in (
            ("largest activations, one sample (estimate)", "activations"),
            ("weights and activations", ""),
        ):
            a, b = (
                side[key] if key else side["weights"] + side["activations"]
                for side in (memory["dense"], memory["compressed"])
            )
            rows.append((label, mebi(a), mebi(b), f"{b / a:.3f}" if a else ""))
    rows += summary_rows(report)
    payload = report.get("files", {}).get(report.get("payload"))
    if payload:
        rows.append((f"file {report['payload']}", "", mebi(payload["size_bytes"]), ""))
    shown = [
        (label, f"{cost['ratio'][key]:.3f}", f"{show(cost['dense'][key])} to {show(cost['compressed'][key])}")
        for label, key, show in COSTS
    ]
    if first is not None:
        dense = "" if first.dense is None else f"dense {first.dense:.3f}, "
        shown.insert(0, (MEASURES[first.measure], f"{first.value:.3f}", f"{dense}{first.samples} {first.on} samples"))
    shown += summary_card(report)
    if parity:
        shown.append(
            (
                f"{report['target']} differs by",
                f"{parity['max_rel']:.1e}",
                f"relative; accepted {parity['tolerance']:.0e}",
            )
        )
    return section(
        "Dense against compressed",
        cards(shown),
        table(("", "dense", "compressed", "ratio"), rows, (1, 2, 3)),
        paragraph(f"Budget: {budget_words(report)}. MACs are {cost['counted']}.", "soft"),
        paragraph(_describe_samples(first, report["agreement"]), "soft") if first is not None else "",
        paragraph(f"Memory is {memory['counted']}.", "soft") if memory else "",
        paragraph(why_none(report), "soft") if why_none(report) else "",
    )


def _describe_samples(first: Headline, about: Mapping[str, Any]) -> str:
    """On which samples the first figure was measured, and what that makes of it."""
    said = f"{MEASURES[first.measure]} on {first.samples} samples of {about['origin']}"
    if first.on == HELD_OUT:
        said += " that nothing was decided or fitted on"
    elif first.on == CROSS_FITTED:
        said += ", each judged by fits to the others; the plan was scored on all of them"
    else:
        said += " that scoring and recovery saw too: the data held no others, so read it as an upper bound"
    return f"{said}." if first.error is None else f"{said}; ± is one standard error over samples."


def _errors(report: Report) -> str:
    parts = []
    steps = (report.get("agreement") or {}).get("steps", ())
    keys = [k for k in ("accuracy", "top1", "kl", "cosine", "relational") if any(k in s for s in steps)]
    if steps:
        parts.append(
            table(
                ("after", *(MEASURES[k] for k in keys)),
                [(s["after"], *(f"{s[k]:.4g}" if k in s else "" for k in keys)) for s in steps],
                range(1, len(keys) + 1),
            )
        )
    recovery = report.get("recovery") or {}
    fitted = [s for s in recovery.get("steps", ()) if _finite(s["before"]) and _finite(s["after"])]
    if fitted:
        parts.append(
            figure(
                pairs(
                    "recovery",
                    [s["parameter"].removesuffix(".weight") for s in fitted],
                    [s["before"] for s in fitted],
                    [s["after"] for s in fitted],
                    "weighted error",
                ),
                f"Error of each layer's target before and after recovery ({recovery['method']}, on "
                f"{recovery.get('samples', 0)} samples).",
            )
        )
    guard = recovery.get("guard") or {}
    if guard:
        columns = sorted({k for v in guard.values() for k in v})
        why = recovery.get("rejected") or {}
        rows = [
            (
                ("* " if name == (recovery.get("chosen") or recovery["method"]) else "") + name,
                *(f"{v[k]:.5g}" if k in v else "" for k in columns),
                why.get(name, ""),
            )
            for name, v in guard.items()
        ]
        parts.append(
            fold(
                f"candidates of recovery, judged on {recovery.get('held_out', 0)} held-out samples",
                table(("candidate", *columns, "rejected because"), rows, range(1, len(columns) + 1)),
            )
        )
    return section("Error after each step", *parts)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _by_kind(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Kind -> its groups with short labels: those that the search might cut, or that were cut."""
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in report.get("groups", ()):
        if entry.get("searched", True) or entry["kept"] < entry["size"]:
            found[entry["kind"]].append(dict(entry))
    for entries in found.values():
        for entry, label in zip(entries, labels(entries), strict=True):
            entry["label"] = label
    return found


def _render_kept(report: Report) -> str:
    parts, rows = [], []
    for i, (kind, entries) in enumerate(sorted(_by_kind(report).items())):
        kept, size = (sum(e[k] for e in entries) for k in ("kept", "size"))
        words = PLURAL.get(kind, kind)
        said = f"{words}: {kept} of {size} stay in {len(entries)} groups"
        if kind == TOKEN:
            said = f"Tokens behind every attention, by {(report.get('tokens') or {}).get('reducer')}"
        parts.append(figure(draw_kept(f"kept-{i}", entries, SERIES[i % len(SERIES)], words), said))
        rows += [
            (
                code(e["group"]),
                e["kind"],
                e["kept"],
                e["size"],
                bar(e["kept"] / max(e["size"], 1)),
                "" if e["macs"] is None else f"{e['macs'] / 1e3:,.1f}",
                e["floor"],
                e["granularity"],
            )
            for e in entries
        ]
    listing = table(("group", "kind", "kept", "of", "", "kMACs each", "floor", "multiple of"), rows, (2, 3, 5, 6, 7))
    return section("What stays, layer by layer", *parts, fold(f"all {len(rows)} groups", listing))


def _tokens(report: Report, pictures: Mapping[str, bytes]) -> str:
    told = report.get("tokens") or {}
    png = pictures.get(told.get("picture", ""))
    if not png or not any(e["removed"] for e in entries_of(report, TOKEN)):
        return ""
    words = "Inputs, and below them what is left: merged patches share a colour, dropped ones are black"
    return section("Tokens", picture(png, words))


def _importance(report: Report, plan: CompressionPlan) -> str:
    parts = []
    for i, (kind, entries) in enumerate(sorted(_by_kind(report).items())):
        entries = [e for e in entries if e["scores"] is not None]
        for entry in entries:
            choice = plan.elements.get(entry["group"])
            entry["gone"] = [] if choice is None else sorted(set(range(choice.size)) - set(choice.keep))
        if not entries:
            continue
        first = entries[0]
        scale = (
            f"{first['criterion']}, in {first['unit']}, over the largest"
            if first["comparable"]
            else f"{first['criterion']}, over the largest of its group (scores of different groups have no common unit)"
        )
        parts.append(
            figure(
                heat_map(f"heat-{i}", entries),
                f"{PLURAL.get(kind, kind)}: {scale}. A row per group; red: what went, or where keeping stopped",
            )
        )
    return section("Importance", *parts)


def _frozen(report: Report) -> str:
    reasons: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for entry in report.get("frozen", ()):
        reasons[entry["why"].partition(" at ")[0]].append(entry)
    rows = [
        (
            why,
            len(entries),
            ", ".join(sorted({e["kind"] for e in entries})),
            Markup(
                fold(
                    "which",
                    "".join(f"<div>{code(e['group'])} {text(e['size'])}: {text(e['why'])}</div>" for e in entries),
                )
            ),
        )
        for why, entries in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return section("Frozen, and why", table(("reason", "groups", "kinds", ""), rows, (1,)))


def _replay(report: Report) -> str:
    rows = [
        (p["name"], f"{p['seconds']:.3f}", p["added"], p["removed"], p["edited"], p["resized"])
        for p in report["passes"]
    ]
    beside = ["the same model, data, --samples", f"--seed {report['seed']}"]
    beside += [f"--held-out {data['held_out']:g}" for data in [report.get("data") or {}] if data.get("held_out")]
    beside += ["--plan with the plan.json that lies here"] * ("read-plan" in report["pipeline"])
    return section(
        "The pipeline that replays it",
        f"<pre>{text(report['pipeline'])}</pre>",
        paragraph(f"fxprune compile --pipeline takes this text. Beside it give {', '.join(beside)}.", "soft"),
        fold(
            f"what each of {len(rows)} passes changed",
            table(("pass", "seconds", "nodes added", "removed", "edited", "tensors resized"), rows, range(1, 6)),
        ),
    )


def _provenance(report: Report) -> str:
    data = report.get("data")
    facts: list[Sequence[object]] = [
        (
            "data",
            "none"
            if not data
            else f"{data['origin']}: {data['samples']} samples"
            + (", labelled" if data["labelled"] else "")
            + (", made up" if data["generated"] else "")
            + (f"; beside them {data['held_out']:g} of the data was held back" if data.get("held_out") else "")
            + (f" ({data['amount']})" if data.get("amount") else ""),
        ),
        ("inputs", "; ".join(f"{i['name']} {i['dtype']} {i['shape']}" for i in report["inputs"])),
        ("outputs", ", ".join(report["outputs"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())),
    ]
    files = [(code(name), f"{entry['size_bytes']:,}", code(entry["sha256"])) for name, entry in report["files"].items()]
    return section(
        "Notes, versions, hashes",
        *(paragraph(n) for n in report["notes"]),
        table(("", ""), facts),
        table(("file", "bytes", "SHA-256"), files, (1,)),
    )
