"""After slicing: which tiles stay, what the others leave behind is made up for, and zeros."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.sources import generate
from ..errors import OptionError
from ..ir.cost import Cost, CostModel
from ..ir.linear_layers import sparse_layers
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.sparsity import TWO_OF_FOUR
from ..process import jobs
from ..process.environment import versions
from ..request.tiles import BlockWish

if TYPE_CHECKING:
    from .run import Work


def uncut(work: Work) -> Program:
    """The dense program, with its groups and a plan that cuts nothing: where tiles are all that is asked for."""
    work.budget = work.blocks.budget if work.blocks is not None else None
    return work.groups().but(plan=CompressionPlan({}, {"model": work.name, "versions": versions()}))


def decided(work: Work, program: Program, dense: Cost) -> tuple[Program, CompressionPlan]:
    """(the sliced ``program`` with its tiles chosen and its weights fitted, a plan of tiles alone).

    dense   what the model cost before slicing: the budget's ratio is of that
    """
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.search.search_blocks import SearchBlocks
    from ..passes.transform.permute_channels import PermuteChannels
    from ..passes.transform.recover_blocks import RecoverBlocks

    program = work.run(program.without_facts(), PropagateAxes())
    passes = work.tiles or _of_wish(work, program)
    data = _data(work, passes, program)
    before = program
    jobs.identify(lambda: fingerprint(before, data, work.seed, [",".join(map(str, passes))]))
    orders: dict[str, tuple[int, ...]] = {}
    for one in passes:
        if program.axes is None and "axes" in one.needs:
            program = work.run(program, PropagateAxes())
        if takes_data(one):
            one = replace(one, data=data)  # type: ignore[call-arg]
        if isinstance(one, SearchBlocks):
            one = replace(one, dense=dense.flops)
        if isinstance(one, PermuteChannels):
            one = replace(one, results=[])
        if isinstance(one, RecoverBlocks):
            one = replace(one, results=[])
        program = work.run(program, one)
        if isinstance(one, PermuteChannels) and one.results:
            orders = one.results[0]
        if isinstance(one, RecoverBlocks) and one.results:
            work.block_recovery = one.results[0].record()
    plan = program.need("plan")
    blocks = {name: replace(one, order=orders.get(name, ())) for name, one in plan.blocks.items()}
    program = program.but(plan=CompressionPlan({}, plan.about, blocks=blocks))
    return program, program.need("plan")


def _of_wish(work: Work, program: Program) -> tuple[Pass, ...]:
    """The passes that make tiles as they were asked for by options, without data."""
    from ..passes.analysis.find_blocks import FindBlocks
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.score_groups import ScoreGroups
    from ..passes.transform.permute_channels import PermuteChannels

    wish, seed = work.blocks, work.seed
    assert wish is not None
    permute = wish.pattern == TWO_OF_FOUR and wish.tiling.permute
    recover = [] if wish.recovery.method == "none" else [replace(wish.recovery, seed=seed)]
    return (
        *([FindGroups(align=1), PermuteChannels(seed=seed)] if permute else []),
        FindBlocks(wish.pattern, wish.tiling.ends, wish.tiling.floor, _known(program, wish)),
        ScoreGroups(criterion=wish.made, seed=seed),
        wish.search,
        *recover,
    )


def with_tiles(work: Work, program: Program) -> Program:
    """The dense ``program`` with the tiles of what its plan would leave added to the plan; nothing is changed in it."""
    from ..passes.transform.fold_indices import FoldIndices
    from ..passes.transform.slice_axes import SliceAxes

    plan = program.need("plan")
    if work.blocks is None and not work.tiles:
        return program
    if plan.tokens is not None and not plan.tokens.empty:
        where = work.blocks.where if work.blocks is not None else f"--pipeline .. {work.tiles[0]}"
        raise OptionError(
            "tiles cannot be planned beside tokens",
            where=where,
            why="they are chosen on the graph that merging tokens leaves",
            cure="use compile",
        )
    dense = CostModel(program)()
    sliced = work.run(program, SliceAxes())
    _, tiles = decided(work, work.run(sliced.without_facts(), FoldIndices()), dense)
    about = {**plan.about, "tiles": tiles.about, "pipeline": work.pipeline}
    return program.but(plan=CompressionPlan(plan.choices, about, plan.tokens, tiles.blocks))


def sparsified(
    work: Work, program: Program, plan: CompressionPlan, dense: Cost, now: Cost
) -> tuple[Program, CompressionPlan, dict[str, Any]]:
    """(the sliced ``program`` with zeros in its weights, the whole plan, what the report says of it).

    Tiles are chosen and weights fitted where the run asks for it; else those of ``plan`` are zeroed, and nothing is
    searched or fitted.

    dense, now   cost before anything, and after slicing
    """
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.sparsify_blocks import SparsifyBlocks

    if work.blocks is not None or work.tiles:
        program, tiles = decided(work, program, dense)
        plan = CompressionPlan(plan.choices, {**plan.about, "tiles": tiles.about}, plan.tokens, tiles.blocks)
    else:
        orders = {name: one.order for name, one in plan.blocks.items() if one.order}
        if orders:
            program, _ = _permuted(work, work.run(program.without_facts(), PropagateAxes()), orders)
    told = _described(program, plan, dense, now, work.block_recovery)
    only = CompressionPlan(blocks=plan.blocks)
    return work.run(program.without_facts().but(plan=only), SparsifyBlocks()), plan, told


def _described(
    program: Program, plan: CompressionPlan, dense: Cost, now: Cost, recovery: dict[str, Any] | None
) -> dict[str, Any]:
    """What is zero, as plain data for the report: per weight, and in multiply-accumulates of the whole model.

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
        "weights": [
            {
                "parameter": m.parameter,
                "shape": list(m.shape),
                "tiles": s.tiles,
                "kept": int(s.kept.sum()),
                "density": round(s.density, 4),
            }
            for m, s in layers
        ],
        "flops": {"dense": dense.flops, "effective": now.flops - gone, "executed": now.flops},
        "recovery": recovery,
    }


def _permuted(
    work: Work, program: Program, orders: dict[str, tuple[int, ...]] | None
) -> tuple[Program, dict[str, tuple[int, ...]]]:
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.permute_channels import PermuteChannels

    one = PermuteChannels(orders=orders)  # which needs no seed: nothing is searched
    program = work.run(program, FindGroups(align=1), one)
    if program.axes is None:
        program = work.run(program, PropagateAxes())
    return program, one.results[0] if one.results else {}


def _data(work: Work, passes: Sequence[Pass], program: Program) -> Calibration | None:
    """What tiles are scored on and fitted to: none when nothing needs any, made up (loudly) when nobody gave some."""
    from ..passes.analysis.importance.objective import without_foreign_labels

    asking = [c for c in (getattr(one, "criterion", None) for one in passes) if getattr(c, "needs_data", False)]
    fitting = any(takes_data(one) and getattr(one, "method", "none") != "none" for one in passes)
    if not asking and (not fitting or work.calibration is None):
        return None
    if work.calibration is None:
        assert work.source is not None
        work.warn(
            f"no data was given: '{asking[0]}' scores tiles on generated inputs, which are not what the "
            "model will see; give --data (data=...) for a better choice"
        )
        work.calibration = generate_for(program, work.source, 128, work.seed)
    work.calibration = without_foreign_labels(program, work.calibration)
    return work.calibration


def takes_data(one: Pass) -> bool:
    """Whether a pass runs on calibration data, which is given to it when its turn comes."""
    return any(f.name == "data" and not f.repr for f in fields(one))


def _known(program: Program, wish: BlockWish) -> tuple[str, ...]:
    """The globs that name a weight: others name groups of slicing."""
    return tuple(p for p in wish.freeze if any(fnmatch.fnmatchcase(name, p) for name in program.tensors))
