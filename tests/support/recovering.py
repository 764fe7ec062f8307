"""What the tests of recovery share: data, analysed programs with a plan, and a run of the pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxprune.data.batch import Batch, Calibration
from fxprune.intake.capture import capture
from fxprune.ir.axis import Keep
from fxprune.ir.group import DEFAULT_KINDS
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.moments import Moments
from fxprune.passes.transform.recovery.sites import Site, find_sites
from fxprune.passes.transform.resize import resize
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.testing import keep_of, masked_run, relative_error, run_flat
from support import laws

START = ("axes", "groups", "plan")


def texts(count: int, batch: int = 16, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(0, count, batch):
        ids = torch.randint(1, 50, (batch, 7), generator=generator)
        mask = (torch.arange(7) < torch.randint(3, 8, (batch, 1), generator=generator)).long()
        batches.append(Batch((), {"input_ids": ids * mask, "attention_mask": mask}))
    return Calibration(tuple(batches), "random ids")


def floats(*shape: int, batches: int = 4) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(tuple(Batch((torch.randn(shape, generator=generator),)) for _ in range(batches)), "normal")


def analysed(model: nn.Module, data: Calibration, **options: Any) -> Program:
    batch = data.batches[0]
    passes = (Clean(), Inline(), PropagateAxes(), FindGroups(**{"align": 1, "floor": 0.0, **options}))
    return Pipeline(passes).run(capture(model.eval(), batch.args, dict(batch.kwargs)))


def planned(program: Program, share: float = 0.5, seed: int = 0) -> Program:
    return program.but(plan=laws.random_plan(program, DEFAULT_KINDS, share, seed))


def recovered(program: Program, data: Calibration, method: str = "ridge", **options: Any) -> tuple[Program, Any]:
    one = Recover(method=method, data=data, **options)
    after, (result,) = Pipeline((one,), start=START).apply(program)
    return after, result.record


def flat(program: Program, batch: Batch) -> list[Any]:
    return program.flatten(batch.args, batch.kwargs)


def sites_of(program: Program, refit: bool = False) -> tuple[list[Site], dict[str, str]]:
    keep: Keep = keep_of(program, program.need("plan"))
    found = find_sites(program, keep, resize(program, keep).graph, refit)
    return list(found.sites), dict(found.skipped)


def laws_hold(program: Program, after: Program, data: Calibration) -> None:
    """Sliced equals masked with the new weights, and cut entries keep their old ones."""
    small = SliceAxes().run(after)
    inputs = flat(program, data.batches[0])
    assert relative_error(run_flat(small, inputs), masked_run(after, after.need("plan"), inputs)) < 1e-4


def moments(c: Tensor, r: Tensor, w: Tensor, pieces: int = 1) -> Moments:
    made = Moments()
    for part in zip(c.chunk(pieces), r.chunk(pieces), w.chunk(pieces), strict=True):
        made.add(*part)
    return made


def rows(n: int = 60, k: int = 5, o: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, k) + 3, torch.randn(n, o) - 2, torch.rand(n)
