"""Whole layers: branches of a residual stream that may go, priced by what losing all of one costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.artifact.explain import explain
from fxprune.data.batch import Batch, Calibration
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.distance import Measure
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.measure_rungs import WHOLE, MeasureRungs, find_emptied
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.ladder import ladder
from fxprune.passes.search.search_plan import SearchPlan

WIDTH, HEADS, DEPTH, TOKENS = 16, 2, 3, 5
IDLE = 1
QUIET: dict[str, Any] = {"on_event": lambda _: None}


class Blocks(nn.Module):
    """Pre-norm or post-norm blocks; those of one layer hardly add anything."""

    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(DEPTH))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.fc1 = nn.ModuleList(nn.Linear(WIDTH, 32) for _ in range(DEPTH))
        self.fc2 = nn.ModuleList(nn.Linear(32, WIDTH) for _ in range(DEPTH))
        self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH)) for _ in range(2))
        self.stem, self.head = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, WIDTH)), nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.out[IDLE].weight.mul_(1e-3)
            self.fc2[IDLE].weight.mul_(1e-3)

    def attend(self, i: int, x: Tensor) -> Tensor:
        q, k, v = self.qkv[i](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out[i](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(DEPTH):
            if self.post:
                x = self.norm1[i](x + self.attend(i, x))
                x = self.norm2[i](x + self.fc2[i](functional.gelu(self.fc1[i](x))))
            else:
                x = x + self.attend(i, self.norm1[i](x))
                x = x + self.fc2[i](functional.gelu(self.fc1[i](self.norm2[i](x))))
        return self.head(x.mean(1))


def model(post: bool = False) -> Blocks:
    torch.manual_seed(0)
    return Blocks(post).eval()


def data(count: int = 12) -> Calibration:
    x = torch.randn(count, TOKENS, 8, generator=torch.Generator().manual_seed(1))
    return Calibration((Batch((x,)),), "normal")


def analysed(post: bool = False) -> Program:
    x = data().batches[0].args[0]
    return Pipeline((PropagateAxes(), FindGroups(align=4, layers=True))).run(capture(model(post), (x[:2],)))


@pytest.mark.parametrize("post", [False, True])
def test_branches_of_the_stream_may_go_and_nothing_else(post: bool) -> None:
    program = analysed(post)
    layers = {g.name: str(g.kind) for g in find_emptied(program, WHOLE)}
    assert sorted(layers.values()) == ["ffn"] * DEPTH + ["head"] * DEPTH
    assert not [name for name in layers if name.startswith("stem")], "without it there is no stream"


def test_losing_a_layer_is_measured_as_a_whole_and_is_the_last_rung() -> None:
    program, criterion = analysed(), Trajectory(samples=12, check=4)
    scored = ScoreGroups(criterion, data()).run(program)
    after = MeasureRungs(criterion, kinds=WHOLE, data=data()).run(scored).need("scores")
    alone = Removals(program, criterion.select_samples(program, data().batches), Measure(), 2**28)
    for group in find_emptied(program, WHOLE):
        one = after[group.name]
        assert one.whole is not None
        features, output = alone.together("x", {group: [torch.arange(group.size)]})
        added = criterion._found["added"](features, output)[group.name]
        assert one.whole == pytest.approx(float(added), rel=1e-4)
        assert torch.equal(one.values, scored.need("scores")[group.name].values)
        rungs = ladder(group, one, 1.0)
        assert rungs.counts[0] == 0
        assert rungs.values[-1] - rungs.values[0] >= one.whole * (1 - 1e-9)
        assert all(a <= b for a, b in zip(rungs.values, rungs.values[1:], strict=False))


@pytest.mark.parametrize("post", [False, True])
def test_a_layer_that_goes_is_gone_from_the_graph(post: bool, tmp_path: Path) -> None:
    x = data(64).batches[0].args[0]
    options: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "none", "data": x, **QUIET}
    made = fxprune.compile(model(post), x[:2], flops=0.72, prune="layers", out=tmp_path / "a", **options)
    gone = {name: c for name, c in made.plan.elements.items() if not c.keep}
    assert gone
    assert gone.keys() == made.plan.elements.keys(), "layers alone were asked for: all of one, or nothing"
    assert all(f".{IDLE}:" in name or f".{IDLE}." in name for name in gone)
    assert made.report["cost"]["ratio"]["flops"] <= 0.72
    assert made.report["masked"]["max_rel"] <= made.report["masked"]["tolerance"]
    assert not [n for n in made.module.state_dict() if n.startswith((f"qkv.{IDLE}", f"fc1.{IDLE}"))]
    attentions = [n for n in made.program.graph.nodes if "attention" in str(n.target)]
    assert len(attentions) == DEPTH - sum(name.startswith("qkv") for name in gone)
    name = next(iter(gone))
    assert any("the whole layer went" in line for line in explain(tmp_path / "a", name)["because"])
    assert any(note.startswith("layers that go") and name in note for note in made.report["notes"])
    again = fxprune.compile(model(post), x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]
    applied = fxprune.apply(model(post), tmp_path / "a" / "plan.json", x[:2], **QUIET)
    torch.testing.assert_close(applied.module(x), made.module(x), rtol=1e-5, atol=1e-6)


def test_on_one_ledger_with_heads_and_neurons() -> None:
    x = data(64).batches[0].args[0]
    options: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "refit", "data": x, **QUIET}
    made = fxprune.compile(model(), x[:2], flops=0.4, prune="heads,ffn,layers", **options)
    kept = {name: len(c.keep) / c.size for name, c in made.plan.elements.items()}
    assert any(share == 0 for share in kept.values())
    assert any(0 < share < 1 for share in kept.values())
    assert made.report["cost"]["ratio"]["flops"] <= 0.4


def test_without_the_kind_no_layer_goes() -> None:
    x = data(64).batches[0].args[0]
    made = fxprune.compile(model(), x[:2], flops=0.4, importance="l2", data=x, recover="none", **QUIET)
    assert all(c.keep for c in made.plan.elements.values())


def test_the_whole_is_checked_and_joined() -> None:
    with pytest.raises(fxprune.errors.InternalError, match="cannot cost"):
        ImportanceScores("a", torch.ones(2), "x", "y", whole=-1.0)
    program = analysed()
    plan = SearchPlan(Budget("flops", 0.6), kinds=(Kind.LAYER,)).run(ScoreGroups("l2").run(program)).need("plan")
    assert plan.elements
    assert not any(c.keep for c in plan.elements.values())
