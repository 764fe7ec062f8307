"""``report["groups"]``: everything that a search could choose, as plain data, and what was chosen of it; how readers
find tokens and tiles in it; reports of 0.1.0, which had a section for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..ir.choice import BLOCK, TOKEN
from ..ir.cost import CostModel
from ..ir.group import PruneGroup, Switch, Tie
from ..ir.importance import ImportanceScores
from ..ir.linear_layers import Matrix
from ..ir.plan import HALVED, TILES, CompressionPlan
from ..ir.program import Program
from ..ir.sparsity import TWO_OF_FOUR, Sparsity
from ..ir.token_flow import TokenFlow, describe_tokens
from .scores import encode

VERSION = 2
Scores = Mapping[str, ImportanceScores]
Entry = dict[str, Any]


def group_entries(
    program: Program, plan: CompressionPlan, scores: Scores | None, kinds: Collection[str]
) -> list[Entry]:
    """Every prunable group and part, in graph order; of groups that are tied the members.

    program   dense, with its groups;  kinds: those that the search might cut (``searched``)
    plan      says as well how often the search halved the groups' multiples

    ``macs`` and ``params`` are what one element costs in the dense program. ``scores`` [size], ``order`` [size], the
    last to be removed first, and ``curve`` [size + 1], what the k first are worth together, are encoded
    (:func:`encode`); ``order`` is null where it is that of the scores, ``curve`` where it is their sum.
    """
    params, halved = CostModel(program).ledger("params", {}), plan.about.get(HALVED, 0)
    return [
        {
            "group": group.name,
            "kind": str(group.kind),
            "searched": str(group.kind) in kinds,
            "size": group.size,
            "kept": len(plan.kept(group)),
            "granularity": group.finer(halved).granularity,
            "floor": group.floor,
            "exact": group.exact,
            "macs": int(group.macs),
            "params": -params.changes(group.sizes(group.size - 1)),
            "parameters": _parameters(program, group),
            **_score_entry(None if scores is None else scores.get(group.name)),
        }
        for group in program.need("groups")
        if group.prunable and not isinstance(group, Tie)
    ]


def token_entries(program: Program, plan: CompressionPlan) -> list[Entry]:
    """Every attention behind which tokens may become fewer: elements are its unprotected tokens, before and after.

    ``macs`` is what one of them costs from there to the next such attention; ``removed`` those that go there.
    """
    flow: TokenFlow = program.need("tokens")
    axes = [s.axis for s in flow.usable if s.axis is not None]
    model = None if flow.axes is None else CostModel(program, flow.axes, also=axes).ledger("flops", {})
    told = {s["site"]: s for s in describe_tokens(flow, plan.tokens)["sites"]}
    return [
        _plain(
            site.name,
            TOKEN,
            site.size,
            told[site.name]["left"] - site.protected,
            searched=plan.tokens is not None,
            macs=None if model is None or site.axis is None else -model.change(site.axis, site.size - 1),
            params=0,
            protected=site.protected,
            removed=told[site.name]["removed"],
        )
        for site in flow.usable
    ]


def tile_entries(layers: Iterable[tuple[Matrix, Sparsity]], scores: Scores | None) -> list[Entry]:
    """Every weight with zeros: elements are its tiles, ``macs`` those of one. With 2:4 scores are too many to keep."""
    found = []
    for matrix, sparsity in layers:
        own = None if scores is None or sparsity.pattern == TWO_OF_FOUR else scores.get(matrix.parameter + TILES)
        tile = sparsity.tile[0] * sparsity.tile[1]
        entry = _plain(
            matrix.parameter + TILES,
            BLOCK,
            sparsity.tiles,
            int(sparsity.kept.sum()),
            macs=matrix.rows * tile,
            params=tile,
            parameters=[matrix.parameter],
            pattern=sparsity.pattern,
            shape=list(matrix.shape),
            density=round(sparsity.density, 4),
        )
        found.append({**entry, **_score_entry(own)})
    return found


def frozen_entries(groups: Sequence[PruneGroup], flow: TokenFlow | None) -> list[Entry]:
    """What must stay whole, and why: groups and parts, and attentions where tokens must not become fewer."""
    sites = () if flow is None else (s for s in flow.sites if s.frozen)
    return [
        *({"group": g.name, "kind": str(g.kind), "size": g.size, "why": g.frozen} for g in groups if g.frozen),
        *({"group": s.name, "kind": TOKEN, "size": s.tokens, "why": s.frozen} for s in sites),
    ]


def _plain(name: str, kind: str, size: int, kept: int, searched: bool = True, **more: Any) -> Entry:
    entry = {
        "group": name,
        "kind": kind,
        "searched": searched,
        "size": size,
        "kept": kept,
        "granularity": 1,
        "floor": 0,
    }
    return {**entry, "exact": False, "macs": None, "params": 0, "parameters": [], **_score_entry(None), **more}


def _score_entry(one: ImportanceScores | None) -> Entry:
    return {
        "criterion": None if one is None else one.criterion,
        "unit": None if one is None else one.unit,
        "comparable": one is not None and one.comparable,
        "scores": None if one is None else encode(one.values),
        "order": None if one is None or one.order is None else encode(one.order),
        "curve": None if one is None or one.curve is None else encode(one.curve),
    }


def _parameters(program: Program, group: PruneGroup) -> list[str]:
    if isinstance(group, Switch):
        return sorted(name for node, name in program.tensor_of_placeholder.items() if node in group.inside)
    return sorted({s.parameter for s in group.slots})


# ------------------------------------------------------------ readers


def entries_of(report: Mapping[str, Any], kind: str) -> list[Entry]:
    """The entries of one kind."""
    return [e for e in report.get("groups", ()) if e["kind"] == kind]


def token_sites(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """How tokens flow, as ``describe_tokens`` says it; None for a model without attention over tokens."""
    if not report.get("tokens"):
        return None
    sites = [
        {
            "site": e["group"],
            "tokens": e["size"] + e["protected"],
            "protected": e["protected"],
            "removed": e["removed"],
            "left": e["kept"] + e["protected"],
            "frozen": "",
        }
        for e in entries_of(report, TOKEN)
    ]
    frozen = [f for f in report.get("frozen", ()) if f["kind"] == TOKEN]
    more = [{"site": f["group"], "tokens": f["size"], "removed": 0, "frozen": f["why"]} for f in frozen]
    return {"reducer": report["tokens"]["reducer"], "sites": [*sites, *more]}


def upgrade_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report of 0.1.0 as one of today: its token sites and sparse weights are entries of ``groups`` and ``frozen``.
    What it does not know (what a token costs) stays unknown. A report of today is returned as it is."""
    if report["fxprune_report"] != 1:
        return dict(report)
    now = {**report, "fxprune_report": VERSION}
    tokens, sparsity, added = report.get("tokens"), report.get("sparsity"), list[Entry]()
    if not isinstance(report.get("frozen", []), list) or not isinstance(report.get("groups", []), list):
        return now  # damaged: whoever reads more of it says so
    if isinstance(tokens, Mapping) and isinstance(tokens.get("sites"), list):
        now["tokens"] = {k: v for k, v in tokens.items() if k != "sites"}
        sites = [s for s in tokens["sites"] if isinstance(s, Mapping)]
        planned = tokens.get("reducer") is not None
        added += [_of_site(s, planned) for s in sites if not s.get("frozen")]
        frozen = [
            {"group": s.get("site"), "kind": TOKEN, "size": s.get("tokens"), "why": s["frozen"]}
            for s in sites
            if s.get("frozen")
        ]
        now["frozen"] = [*report.get("frozen", ()), *frozen]
    if isinstance(sparsity, Mapping) and isinstance(sparsity.get("weights"), list):
        now["sparsity"] = {k: v for k, v in sparsity.items() if k != "weights"}
        pattern = sparsity.get("pattern")
        added += [_of_weight(w, pattern) for w in sparsity["weights"] if isinstance(w, Mapping)]
    if added:
        now["groups"] = [*report.get("groups", ()), *added]
    return now


def _of_site(site: Mapping[str, Any], planned: bool) -> Entry:
    size, left, kept = site.get("tokens"), site.get("left"), site.get("protected", 0)
    known = isinstance(size, int) and isinstance(left, int) and isinstance(kept, int)
    size, left = (size - kept, left - kept) if known else (size, left)
    more = {"protected": kept, "removed": site.get("removed")}
    return _plain(str(site.get("site")), TOKEN, size, left, searched=planned, **more)  # type: ignore[arg-type]


def _of_weight(weight: Mapping[str, Any], pattern: Any) -> Entry:
    name = str(weight.get("parameter"))
    more = {"pattern": pattern, "shape": weight.get("shape"), "density": weight.get("density")}
    tiles, kept = weight.get("tiles"), weight.get("kept")
    return _plain(name + TILES, BLOCK, tiles, kept, parameters=[name], **more)  # type: ignore[arg-type]
