"""After slicing: which tiles stay, what the others leave behind is made up for, and zeros."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..errors import OptionError
from ..ir.cost import Cost, CostModel
from ..ir.importance import ImportanceScores
from ..ir.linear_layers import sparse_layers
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.sparsity import TWO_OF_FOUR
from ..process import jobs
from ..process.environment import versions
from ..report.entries import tile_entries
from ..request.tiles import TileGoal
from .decide import Decided, make_up_data
from .proof import prove_prepared
from .run import Run, carry_out_parts, find_groups


@dataclass(frozen=True)
class Tiled:
    """A sliced program whose tiles were chosen.

    run       with fitted weights; its plan is of tiles alone
    scores    that the tiles were chosen by
    recovery  what fitting did, as plain data
    """

    run: Run
    plan: CompressionPlan
    recovery: dict[str, Any] | None = field(default=None)
    scores: Mapping[str, ImportanceScores] | None = field(default=None, repr=False)


def keep_everything(run: Run) -> Decided:
    """The dense program, with its groups and a plan that cuts nothing: where tiles are all that is asked for."""
    tiles = run.request.tiles
    run = prove_prepared(find_groups(run)).but(
        plan=CompressionPlan({}, {"model": run.opened.name, "versions": versions()})
    )
    return Decided(run, run.program, tiles.budget if tiles is not None else None)


def decide_tiles(run: Run, stated: Sequence[Pass], dense: Cost) -> Tiled:
    """The sliced program with its tiles chosen and its weights fitted.

    stated  passes that choose them, in place of those that the request's options say
    dense   what the model cost before slicing: the budget's ratio is of that
    """
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.search.search_blocks import SearchBlocks
    from ..passes.transform.permute_channels import PermuteChannels
    from ..passes.transform.recover_blocks import RecoverBlocks

    run = run.on(run.program.without_facts()).through(PropagateAxes())
    passes = tuple(stated) or _passes_of(run)
    run = replace(run, data=_usable_data(run, passes))
    before, data = run.program, run.data
    jobs.identify(lambda: fingerprint(before, data, run.seed, [",".join(map(str, passes))]))
    orders: Mapping[str, tuple[int, ...]] = {}
    recovery, scores = None, None
    for one in passes:
        if run.program.axes is None and "axes" in one.needs:
            run = run.through(PropagateAxes())
        if isinstance(one, SearchBlocks):
            one = replace(one, dense=dense.flops)
        run = run.through(one)
        if isinstance(one, SearchBlocks):
            scores = run.program.scores
        if isinstance(one, PermuteChannels):
            orders = run.record
        if isinstance(one, RecoverBlocks) and run.record is not None:
            recovery = run.record.record()
    plan = run.program.need("plan")
    blocks = {name: replace(one, order=orders.get(name, ())) for name, one in plan.blocks.items()}
    tiles = CompressionPlan({}, plan.about).with_blocks(blocks)
    return Tiled(run.but(plan=tiles), tiles, recovery, scores)


def _passes_of(run: Run) -> tuple[Pass, ...]:
    """The passes that make tiles as they were asked for by options, without data."""
    from ..passes.analysis.find_blocks import FindBlocks
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.score_groups import ScoreGroups
    from ..passes.transform.permute_channels import PermuteChannels

    wish, seed = run.request.tiles, run.seed
    assert wish is not None
    permute = wish.pattern == TWO_OF_FOUR and wish.tiling.permute
    recover = [] if wish.recovery.method == "none" else [replace(wish.recovery, seed=seed)]
    return (
        *([FindGroups(align=1), PermuteChannels(seed=seed)] if permute else []),
        FindBlocks(wish.pattern, wish.tiling.ends, wish.tiling.floor, _weight_globs(run.program, wish)),
        ScoreGroups(criterion=wish.scorer, seed=seed),
        wish.search,
        *recover,
    )


def plan_tiles(decided: Decided) -> Decided:
    """The plan with the tiles of what it would leave added; the dense program stays as it is."""
    from ..passes.transform.fold_indices import FoldIndices
    from ..passes.transform.slice_axes import SliceAxes

    run, wish = decided.run, decided.run.request.tiles
    program, plan = run.program, run.program.need("plan")
    if wish is None and not decided.tiles:
        return decided
    if plan.tokens is not None and not plan.tokens.empty:
        raise OptionError(
            "tiles cannot be planned beside tokens",
            where=wish.where if wish is not None else f"--pipeline .. {decided.tiles[0]}",
            why="they are chosen on the graph that merging tokens leaves",
            cure="use compile",
        )
    sliced = carry_out_parts(run).through(SliceAxes())
    sliced = sliced.on(sliced.program.without_facts()).through(FoldIndices())
    tiled = decide_tiles(sliced, decided.tiles, CostModel(program)())
    about = {**plan.about, "tiles": tiled.plan.about, "pipeline": tiled.run.pipeline}
    whole = CompressionPlan(plan.choices, about).with_blocks(tiled.plan.blocks)
    return replace(decided, run=replace(tiled.run, program=program.but(plan=whole)))


@dataclass(frozen=True)
class Zeroed:
    """A sliced program with zeros in its weights.

    plan     the whole plan, tiles included
    told     what the report says of the zeros;  entries: of each weight, for its ``groups``
    """

    run: Run
    plan: CompressionPlan
    told: dict[str, Any]
    entries: list[dict[str, Any]]


def zero_tiles(run: Run, decided: Decided, dense: Cost, now: Cost) -> Zeroed:
    """The sliced ``run`` with zeros in its weights.

    Tiles are chosen and weights fitted where the run asks for it; else those of the plan are zeroed, and nothing is
    searched or fitted.

    dense, now   cost before anything, and after slicing
    """
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.permute_channels import PermuteChannels
    from ..passes.transform.sparsify_blocks import SparsifyBlocks

    plan, recovery, scores = decided.run.program.need("plan"), None, None
    if run.request.tiles is not None or decided.tiles:
        tiled = decide_tiles(run, decided.tiles, dense)
        run, recovery, scores = tiled.run, tiled.recovery, tiled.scores
        plan = replace(plan, about={**plan.about, "tiles": tiled.plan.about}).with_blocks(tiled.plan.blocks)
    elif orders := {name: one.order for name, one in plan.blocks.items() if one.order}:
        run = run.on(run.program.without_facts())
        run = run.through(PropagateAxes(), FindGroups(align=1), PermuteChannels(orders=orders))  # nothing is searched
        if run.program.axes is None:
            run = run.through(PropagateAxes())
    told = _describe(run.program, plan, dense, now, recovery)
    entries = tile_entries(sparse_layers(run.program, plan.blocks), scores)
    run = run.on(run.program.without_facts().but(plan=CompressionPlan().with_blocks(plan.blocks)))
    return Zeroed(run.through(SparsifyBlocks()), plan, told, entries)


def _describe(
    program: Program, plan: CompressionPlan, dense: Cost, now: Cost, recovery: dict[str, Any] | None
) -> dict[str, Any]:
    """What is zero, as plain data for the report, in multiply-accumulates of the whole model.

    flops   ``dense``: before anything; ``effective``: of what is not zero; ``executed``: what would run if nothing knew
            of the zeros, until the target has decided
    """
    layers = list(sparse_layers(program, plan.blocks))
    gone = sum(m.macs - round(m.macs * s.density) for m, s in layers)
    about = plan.about.get("tiles", {})
    return {
        "pattern": layers[0][1].pattern if layers else about.get("pattern"),
        "criterion": about.get("criterion"),
        "allocation": about.get("method"),
        "power": about.get("power"),
        "flops": {"dense": dense.flops, "effective": now.flops - gone, "executed": now.flops},
        "recovery": recovery,
    }


def _usable_data(run: Run, passes: Sequence[Pass]) -> Calibration | None:
    """What tiles are scored on and fitted to: none when nothing needs any, made up (loudly) when nobody gave some."""
    from ..passes.analysis.importance.objective import without_foreign_labels
    from ..passes.transform.recover_blocks import RecoverBlocks

    asking = [
        c
        for one in passes
        if "criterion" in one.takes
        for c in [getattr(one, "criterion", None)]
        if getattr(c, "needs_data", False)
    ]
    fitting = any(isinstance(one, RecoverBlocks) and one.method != "none" for one in passes)
    if not asking and (not fitting or run.data is None):
        return run.data
    data = run.data
    if data is None:
        data = make_up_data(run, f"'{asking[0]}' scores tiles", run.request.samples)
    return without_foreign_labels(run.program, data)


def _weight_globs(program: Program, wish: TileGoal) -> tuple[str, ...]:
    """The globs that name a weight: others name groups of slicing."""
    return tuple(p for p in wish.freeze if any(fnmatch.fnmatchcase(name, p) for name in program.tensors))
