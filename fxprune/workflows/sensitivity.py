"""What cutting one thing, or one kind of things, does to the outputs: measured, with nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .. import registry
from ..data.batch import Batch, sample_count
from ..driver.parts import carry_out
from ..driver.run import reduce_tokens
from ..errors import NothingToPrune, OptionError
from ..ir.choice import TOKEN, AnyChoice, TokenChoice
from ..ir.cost import CostModel
from ..ir.group import Kind, PruneGroup, Tie
from ..ir.linear_layers import BlockGroup
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.token_flow import TokenSite
from ..process.jobs import run_jobs
from ..report.entries import frozen_entries

SHARES = (0.75, 0.5, 0.25)
REDUCER = "tome"  # what takes tokens away where only how many is asked
UNIT = (
    "mean KL to the dense class probabilities, nats; without logits, half the mean squared change of each sample's "
    "standardised output"
)
Thing: TypeAlias = PruneGroup | TokenSite


def sensitivity(
    program: Program, batches: Sequence[Batch], kinds: Sequence[Kind | str], shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """The damage of keeping a share of each thing of the wanted kinds, one at a time, and of all of a kind.

    program   dense, with its groups (those of tiles too) and their scores, and its token flow;  shares: between 0 and 1

    Which elements stay is what a search would keep at that count; the count is the nearest allowed one above the share
    (floor and granularity count); a part that is there or not goes at every share. Of tokens the share is of those that
    come to an attention; a reducer may not take as many. Each damage is that of a real cut: masking where that is the
    same thing, so that only what follows is run again, and carrying the choice out where it is not, and for whole
    kinds. Nothing is recovered. What is frozen is listed with its reason and without a damage: it was not tried.

    Returns ``groups`` and ``kinds``, each with ``levels`` of {share, kept, damage, flops_saved}, ``frozen``,
    ``unit``. Raises NothingToPrune, and OptionError for shares out of range.
    """
    from ..passes.search.search_plan import kinds_named

    if not shares or not all(0 < s < 1 for s in shares):
        raise OptionError("shares are between 0 and 1", where=f"--shares {','.join(f'{s:g}' for s in shares)}")
    wanted = kinds_named(tuple(kinds))
    things = _things(program, wanted)
    if not things:
        raise NothingToPrune(
            "no group of the wanted kinds can be cut",
            where=program.name,
            why=f"wanted {', '.join(map(str, wanted))}",
            cure="fxprune inspect says what can",
        )
    trial = _Trial.of(program, batches)

    def one(number: int) -> dict[str, torch.Tensor]:
        thing = things[number]
        found = trial.damages(thing, [_count(thing, share) for share in shares])
        return {"damage": torch.tensor(found, dtype=torch.float64)}

    groups = []
    for thing, result in zip(things, run_jobs("sensitivity.groups", len(things), one), strict=True):
        counts = [_count(thing, share) for share in shares]
        levels = [
            {"share": share, "kept": count, "damage": value, "flops_saved": trial.count_saved([thing], [count])}
            for share, count, value in zip(shares, counts, result["damage"].tolist(), strict=True)
        ]
        groups.append({"group": thing.name, "kind": str(thing.kind), "size": thing.size, "levels": levels})
    frozen = frozen_entries(program.need("groups"), program.tokens)
    return {
        "groups": groups,
        "kinds": _by_kind(trial, things, shares),
        "frozen": [f for f in frozen if f["kind"] in wanted],
        "unit": UNIT,
        "flops": trial.model().flops,
        "samples": sample_count(batches),
        "shares": list(shares),
    }


def _things(program: Program, wanted: Sequence[str]) -> list[Thing]:
    """What may be cut of the wanted kinds; of groups that are tied the members."""
    groups = [g for g in program.need("groups") if g.prunable and str(g.kind) in wanted and not isinstance(g, Tie)]
    sites = program.tokens.usable if program.tokens is not None and TOKEN in wanted else ()
    return [*groups, *sites]


def _by_kind(trial: _Trial, things: Sequence[Thing], shares: Sequence[float]) -> list[dict[str, Any]]:
    """All things of a kind at once; of tokens as many at every attention, so that the share is left behind the last."""
    kinds = list(dict.fromkeys(str(t.kind) for t in things))
    jobs = [(kind, share) for kind in kinds for share in shares]

    def counts(kind: str, share: float) -> tuple[list[Thing], list[int]]:
        members = [t for t in things if str(t.kind) == kind]
        if kind != TOKEN:
            return members, [_count(t, share) for t in members]
        each = -(-(members[0].size - _count(members[0], share)) // len(members))
        return members, [t.size - min(each, _cap(t)) for t in members if isinstance(t, TokenSite)]

    def together(number: int) -> dict[str, torch.Tensor]:
        return {"damage": torch.tensor(trial.cut(*counts(*jobs[number])), dtype=torch.float64)}

    found = [float(r["damage"]) for r in run_jobs("sensitivity.kinds", len(jobs), together)]
    result: dict[str, dict[str, Any]] = {}
    for (kind, share), value in zip(jobs, found, strict=True):
        members, kept = counts(kind, share)
        entry = result.setdefault(kind, {"kind": kind, "groups": len(members), "levels": []})
        saved = trial.count_saved(members, kept)
        entry["levels"].append({"share": share, "kept": sum(kept), "damage": value, "flops_saved": saved})
    return list(result.values())


def _count(thing: Thing, share: float) -> int:
    """The smallest count that a plan may choose and that is at least this share."""
    if isinstance(thing, TokenSite):
        return max(thing.level_above(share), thing.size - _cap(thing))
    return thing.level_above(share)


def _cap(site: TokenSite) -> int:
    """The most tokens that may go there at once."""
    return int(registry.reducer(REDUCER).cap(site.tokens, site.protected))


@dataclass(frozen=True)
class _Trial:
    """The dense program, and what is remembered of it while things are cut one by one."""

    program: Program
    batches: Sequence[Batch]
    model: CostModel
    damage: Any
    dense: Any

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch]) -> _Trial:
        from ..passes.analysis.importance.damage import Damage, Reference

        return cls(program, batches, CostModel(program), Damage(program, batches), Reference(program))

    def damages(self, thing: Thing, counts: Sequence[int]) -> list[float]:
        """Of one thing, at these counts."""
        from ..passes.analysis.importance.damage import Change

        if isinstance(thing, TokenSite) or not thing.exact or thing.name not in self.damage.sides:
            return [self.cut([thing], [count]) for count in counts]
        changes = []
        for count in counts:
            keep = torch.zeros(thing.size, dtype=torch.bool)
            keep[self.program.need("scores")[thing.name].ranking()[:count]] = True
            changes.append(Change(thing, keep))
        found: list[float] = self.damage.of(changes)
        return found

    def cut(self, things: Sequence[Thing], counts: Sequence[int]) -> float:
        """The damage of a real cut."""
        from ..passes.analysis.find_groups import FindGroups
        from ..passes.analysis.importance.damage import divergence
        from ..passes.transform.sparsify_blocks import SparsifyBlocks

        plan = CompressionPlan(self._choices(things, counts))
        small = self.program.but(plan=plan)
        if plan.blocks:
            small = SparsifyBlocks().run(small)
        elif plan.tokens is not None:
            small = reduce_tokens(small, (FindGroups(align=1),))
        else:
            small = carry_out(small)
        return divergence(self.dense, small, self.batches)

    def count_saved(self, things: Sequence[Thing], counts: Sequence[int]) -> int:
        """Multiply-accumulates that it saves."""
        choices = self._choices(things, counts)
        if isinstance(things[0], TokenSite):
            return self._count_saved_by_tokens(choices)
        if isinstance(things[0], BlockGroup):
            blocks = CompressionPlan(choices).blocks
            layers = [(t.matrix, blocks[t.matrix.parameter]) for t in things if isinstance(t, BlockGroup)]
            return sum(m.macs - round(m.macs * s.density) for m, s in layers)
        sizes: dict[Any, int] = {}
        for thing, count in zip(things, counts, strict=True):
            sizes |= thing.sizes(count)
        return self.model().flops - self.model(sizes).flops

    def _count_saved_by_tokens(self, choices: Mapping[str, AnyChoice]) -> int:
        from ..passes.search.token_schedule import TokenCosts

        costs, sites = TokenCosts.of(self.program, {}), self.program.need("tokens").usable
        gone = [c.removed if isinstance(c := choices.get(s.name), TokenChoice) else 0 for s in sites]
        return round(costs.total([0] * len(sites)) - costs.total(gone))

    def _choices(self, things: Sequence[Thing], counts: Sequence[int]) -> dict[str, AnyChoice]:
        scores = self.program.scores or {}
        found: dict[str, AnyChoice] = {}
        for thing, count in zip(things, counts, strict=True):
            found |= thing.choose(count, scores)
        return found
