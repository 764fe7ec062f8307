"""Members of channels: by scores or by OBS, whichever is nearer to dense once it is repaired."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks import ResidualConvolutions
from torch import nn

import fxprune
from fxprune.data import Batch, Calibration
from fxprune.driver import decide
from fxprune.driver.members import in_doubt, is_obs_nearer
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan


def photographs(count: int = 96) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    return Calibration(
        tuple(Batch((x,)) for x in torch.randn(count, 3, 12, 12, generator=generator).split(16)), "normal"
    )


def planned(model: nn.Module, data: Calibration, criterion: str, flops: float) -> Program:
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(model, (data.batches[0].args[0][:2],)))
    return SearchPlan(Budget("flops", flops)).run(ScoreGroups(criterion, data, 0).run(program))


def test_the_plan_that_is_nearer_once_repaired_is_taken() -> None:
    torch.manual_seed(1)
    data = photographs()
    model = ResidualConvolutions().eval()
    mild, harsh = (planned(model, data, "l2", flops) for flops in (0.9, 0.3))
    assert in_doubt(mild)
    finders = (FindGroups(align=1),)
    assert is_obs_nearer(harsh, mild, finders, data, 0)[0]
    taken, told = is_obs_nearer(mild, harsh, finders, data, 0)
    assert not taken
    assert "by their scores" in told
    assert is_obs_nearer(mild, mild, finders, data, 0)[0]  # a tie


@pytest.mark.parametrize("nearer", [True, False])
def test_the_pipeline_says_which_members_were_taken(nearer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(decide, "is_obs_nearer", lambda *_: (nearer, "as told"))
    options: dict[str, Any] = {"flops": 0.6, "importance": "fisher", "seconds": 0, "on_event": lambda _: None}
    x = [batch.args[0] for batch in photographs().batches]
    made = fxprune.compile(ResidualConvolutions().eval(), x[0][:2], data=x, **options)
    assert ("rank-within" in made.report["pipeline"]) == nearer
    assert "as told" in made.report["notes"]
    again = fxprune.compile(
        ResidualConvolutions().eval(),
        x[0][:2],
        data=x,
        pipeline=made.report["pipeline"],
        seconds=0,
        on_event=lambda _: None,
    )
    assert again.report["pipeline"] == made.report["pipeline"]
