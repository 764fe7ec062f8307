"""After slicing: which tiles stay, what the others leave behind is made up for, and zeros."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import jobs, journal
from .block_wish import BlockWish
from .cost import Budget, Cost, CostModel
from .data import Calibration, generate
from .errors import OptionError
from .matrices import sparse_layers
from .measure import versions
from .plan import CompressionPlan
from .program import Program
from .sparsity import TWO_OF_FOUR

if TYPE_CHECKING:
    from .work import Work


def uncut(work: Work) -> Program:
    """The dense program, with its groups and a plan that cuts nothing: where tiles are all that is asked for."""
    work.budget = work.blocks.budget if work.blocks is not None else None
    return work.groups().but(plan=CompressionPlan({}, {"model": work.name, "versions": versions()}))


def decided(work: Work, program: Program, dense: Cost) -> tuple[Program, CompressionPlan]:
    """(the sliced ``program`` with its tiles chosen and its weights fitted, a plan of tiles alone).

    dense   what the model cost before slicing: the budget's ratio is of that
    """
    from .passes.analysis.find_blocks import FindBlocks
    from .passes.analysis.propagate_axes import PropagateAxes
    from .passes.analysis.score_groups import ScoreGroups

    wish = work.blocks
    assert wish is not None
    program = work.run(program.without_facts(), PropagateAxes())
    data = _data(work, wish, program)
    before = program
    jobs.identify(lambda: journal.fingerprint(before, data, work.seed, [repr(wish)]))
    orders: dict[str, tuple[int, ...]] = {}
    if wish.pattern == TWO_OF_FOUR and wish.tiling.permute:
        program, orders = _permuted(work, program, None)
    search = wish.search
    if wish.budget is not None:  # of the dense model
        search = replace(search, budget=Budget("flops", wish.budget.limit(dense), relative=False))
    program = work.run(program, FindBlocks(wish.pattern, wish.tiling.ends, wish.tiling.floor, _known(program, wish)),
                       ScoreGroups(criterion=wish.made, data=data, seed=work.seed), search)
    plan = program.need("plan")
    about = {**plan.about, "blocks": wish.text, "budget": None if wish.budget is None else str(wish.budget)}
    blocks = {name: replace(one, order=orders.get(name, ())) for name, one in plan.blocks.items()}
    program = program.but(plan=CompressionPlan({}, about, blocks=blocks))
    if wish.recovery.method != "none":
        one = replace(wish.recovery, data=data, seed=work.seed, results=[])
        program = work.run(program, one)
        work.block_recovery = one.results[0].record() if one.results else None
    return program, program.need("plan")


def with_tiles(work: Work, program: Program) -> Program:
    """The dense ``program`` with the tiles of what its plan would leave added to the plan; nothing is changed in it."""
    from .passes.transform.fold_indices import FoldIndices
    from .passes.transform.slice_axes import SliceAxes

    plan = program.need("plan")
    if work.blocks is None:
        return program
    if plan.tokens is not None and not plan.tokens.empty:
        raise OptionError("tiles cannot be planned beside tokens", where=work.blocks.where,
                          why="they are chosen on the graph that merging tokens leaves", cure="use compile")
    dense = CostModel(program)()
    sliced = work.run(program, SliceAxes())
    _, tiles = decided(work, work.run(sliced.without_facts(), FoldIndices()), dense)
    return program.but(plan=CompressionPlan(plan.choices, {**plan.about, "tiles": tiles.about}, plan.tokens,
                                            tiles.blocks))


def sparsified(work: Work, program: Program, plan: CompressionPlan, dense: Cost,
               now: Cost) -> tuple[Program, CompressionPlan, dict[str, Any]]:
    """(the sliced ``program`` with zeros in its weights, the whole plan, what the report says of it).

    Tiles are chosen and weights fitted where the run asks for it; else those of ``plan`` are zeroed, and nothing is
    searched or fitted.

    dense, now   cost before anything, and after slicing
    """
    from .passes.analysis.propagate_axes import PropagateAxes
    from .passes.transform.sparsify_blocks import SparsifyBlocks

    if work.blocks is not None:
        program, tiles = decided(work, program, dense)
        plan = CompressionPlan(plan.choices, {**plan.about, "tiles": tiles.about}, plan.tokens, tiles.blocks)
    else:
        orders = {name: one.order for name, one in plan.blocks.items() if one.order}
        if orders:
            program, _ = _permuted(work, work.run(program.without_facts(), PropagateAxes()), orders)
    told = _described(program, plan, dense, now, work.block_recovery)
    only = CompressionPlan(blocks=plan.blocks)
    return work.run(program.without_facts().but(plan=only), SparsifyBlocks()), plan, told


def _described(program: Program, plan: CompressionPlan, dense: Cost, now: Cost,
               recovery: dict[str, Any] | None) -> dict[str, Any]:
    """What is zero, as plain data for the report: per weight, and in multiply-accumulates of the whole model.

    flops   ``dense``: before anything; ``effective``: of what is not zero; ``executed``: what would run if nothing knew
            of the zeros, until the target has decided
    """
    layers = list(sparse_layers(program, plan.blocks))
    gone = sum(m.macs - round(m.macs * s.density) for m, s in layers)
    about = plan.about.get("tiles", {})
    return {
        "pattern": layers[0][1].pattern if layers else about.get("pattern"),
        "criterion": about.get("criterion"), "allocation": about.get("method"), "power": about.get("power"),
        "weights": [{"parameter": m.parameter, "shape": list(m.shape), "tiles": s.tiles, "kept": int(s.kept.sum()),
                     "density": round(s.density, 4)} for m, s in layers],
        "flops": {"dense": dense.flops, "effective": now.flops - gone, "executed": now.flops}, "recovery": recovery,
    }


def _permuted(work: Work, program: Program,
              orders: dict[str, tuple[int, ...]] | None) -> tuple[Program, dict[str, tuple[int, ...]]]:
    from .passes.analysis.find_groups import FindGroups
    from .passes.analysis.propagate_axes import PropagateAxes
    from .passes.transform.permute_channels import PermuteChannels

    one = PermuteChannels(seed=work.seed, orders=orders)
    program = work.run(program, FindGroups(align=1), one)
    if program.axes is None:
        program = work.run(program, PropagateAxes())
    return program, one.results[0] if one.results else {}


def _data(work: Work, wish: BlockWish, program: Program) -> Calibration | None:
    """What tiles are scored on and fitted to: none when nothing needs any, made up (loudly) when nobody gave some."""
    from .passes.analysis.importance.objective import without_foreign_labels

    if not wish.needs_data:
        return None
    if work.calibration is None:
        assert work.source is not None
        work.warn(f"no data was given: '{wish.criterion}' scores tiles on generated inputs, which are not what the "
                  "model will see; give --data (data=...) for a better choice")
        work.calibration = generate(work.source, samples=128, seed=work.seed)
    work.calibration = without_foreign_labels(program, work.calibration)
    return work.calibration


def _known(program: Program, wish: BlockWish) -> tuple[str, ...]:
    """The globs that name a weight: others name groups of slicing."""
    return tuple(p for p in wish.freeze if any(fnmatch.fnmatchcase(name, p) for name in program.tensors))
