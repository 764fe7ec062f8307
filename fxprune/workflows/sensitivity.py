"""What cutting one layer, or one kind of layers, does to the outputs: measured, with nothing else changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..data.batch import Batch, sample_count
from ..errors import NothingToPrune, OptionError
from ..ir.cost import CostModel
from ..ir.group import Kind, PruneGroup
from ..ir.plan import Choice, CompressionPlan
from ..ir.program import Program
from ..process.jobs import run_jobs

SHARES = (0.75, 0.5, 0.25)
UNIT = (
    "mean KL to the dense class probabilities, nats; without logits, half the mean squared change of each sample's "
    "standardised output"
)


def sensitivity(
    program: Program, batches: Sequence[Batch], kinds: Sequence[Kind | str], shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """The damage of keeping a share of each group of the wanted kinds, one at a time, and of all groups of a kind.

    program   dense, with its groups and scores;  shares: between 0 and 1

    Which elements stay is what a search would keep at that count; the count is the nearest allowed one above the share
    (floor and granularity count). Each damage is that of a real cut: masking where that is the same thing, so that only
    what follows is run again, and slicing where it is not (a norm averages over fewer elements) and for whole kinds.
    Nothing is recovered. A frozen group is listed with its reason and without a damage: it was not tried.

    Returns ``groups`` and ``kinds``, each with ``levels`` of {share, kept, damage, flops_saved}, ``frozen``,
    ``unit``. Raises NothingToPrune, and OptionError for shares out of range.
    """
    from ..passes.analysis.importance.damage import Change, Damage, Reference, divergence
    from ..passes.search.search_plan import kinds_named
    from ..passes.transform.slice_axes import SliceAxes

    if not shares or not all(0 < s < 1 for s in shares):
        raise OptionError("shares are between 0 and 1", where=f"--shares {','.join(f'{s:g}' for s in shares)}")
    wanted = kinds_named(tuple(kinds))
    live = [g for g in program.need("groups") if g.prunable and g.kind in wanted]
    if not live:
        raise NothingToPrune(
            "no group of the wanted kinds can be cut",
            where=program.name,
            why=f"wanted {', '.join(map(str, wanted))}",
            cure="fxprune inspect says what can",
        )
    orders = {g.name: _order(program, g) for g in live}
    model, whole = CostModel(program), CostModel(program)().flops
    damage, dense = Damage(program, batches), Reference(program)

    def cut(plan: CompressionPlan) -> float:
        return divergence(dense, SliceAxes().run(program.but(plan=plan)), batches)

    def choice(group: PruneGroup, count: int) -> Choice:
        return Choice(str(group.kind), group.size, tuple(sorted(orders[group.name][:count])))

    def one(number: int) -> dict[str, torch.Tensor]:
        group = live[number]
        counts = [_count(group, share) for share in shares]
        if group.exact and group.name in damage.sides:
            changes = []
            for count in counts:
                keep = torch.zeros(group.size, dtype=torch.bool)
                keep[orders[group.name][:count]] = True
                changes.append(Change(group, keep))
            found = damage.of(changes)
        else:
            found = [cut(CompressionPlan({group.name: choice(group, count)})) for count in counts]
        return {"damage": torch.tensor(found, dtype=torch.float64)}

    groups = []
    for group, result in zip(live, run_jobs("sensitivity.groups", len(live), one), strict=True):
        levels = [
            {"share": share, "kept": count, "damage": value, "flops_saved": whole - model({group.axis: count}).flops}
            for share, value in zip(shares, result["damage"].tolist(), strict=True)
            for count in (_count(group, share),)
        ]
        groups.append({"group": group.name, "kind": str(group.kind), "size": group.size, "levels": levels})
    present = [k for k in dict.fromkeys(g.kind for g in live)]
    jobs = [(kind, share) for kind in present for share in shares]

    def together(number: int) -> dict[str, torch.Tensor]:
        kind, share = jobs[number]
        plan = CompressionPlan({g.name: choice(g, _count(g, share)) for g in live if g.kind == kind})
        return {"damage": torch.tensor(cut(plan), dtype=torch.float64)}

    found = [float(r["damage"]) for r in run_jobs("sensitivity.kinds", len(jobs), together)]
    by_kind: dict[str, dict[str, Any]] = {}
    for (kind, share), value in zip(jobs, found, strict=True):
        members = [g for g in live if g.kind == kind]
        saved = whole - model({g.axis: _count(g, share) for g in members}).flops
        entry = by_kind.setdefault(str(kind), {"kind": str(kind), "groups": len(members), "levels": []})
        entry["levels"].append(
            {"share": share, "kept": sum(_count(g, share) for g in members), "damage": value, "flops_saved": saved}
        )
    frozen = [
        {"group": g.name, "kind": str(g.kind), "size": g.size, "why": g.frozen}
        for g in program.need("groups")
        if g.frozen and g.kind in wanted
    ]
    return {
        "groups": groups,
        "kinds": list(by_kind.values()),
        "frozen": frozen,
        "unit": UNIT,
        "flops": whole,
        "samples": sample_count(batches),
        "shares": list(shares),
    }


def _count(group: PruneGroup, share: float) -> int:
    """The smallest count that a plan may choose and that is at least this share."""
    least = math.ceil(share * group.size - 1e-9)
    return next(count for count in group.levels() if count >= least)


def _order(program: Program, group: PruneGroup) -> list[int]:
    """Elements, the last to be removed first, as a search takes them."""
    scores = program.need("scores")[group.name]
    if scores.order is not None:
        order: list[int] = scores.order.tolist()
        return order
    return torch.argsort(scores.values.detach().to("cpu", torch.float64), descending=True, stable=True).tolist()
