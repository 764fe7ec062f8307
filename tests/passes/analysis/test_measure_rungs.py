"""Rungs: directions that go from the end of an order are worth what losing the whole tail costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.artifact.explain import explain
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.measure_rungs import MeasureRungs, by_rungs, find_tailed
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.refine_scores import RefineScores
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.ladder import ladder
from fxprune.passes.search.search_plan import SearchPlan

WIDTH, HEADS, EACH, TOKENS = 12, 2, 6, 5


class Attention(nn.Module):
    """Two blocks of separate projections."""

    def __init__(self) -> None:
        super().__init__()
        inner = HEADS * EACH
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(WIDTH, inner) for _ in range(2)) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(inner, WIDTH) for _ in range(2))
        self.fc1 = nn.ModuleList(nn.Linear(WIDTH, 16) for _ in range(2))
        self.fc2 = nn.ModuleList(nn.Linear(16, WIDTH) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            y = self.norm[i](x)
            q, k, v = (one[i](y).unflatten(-1, (HEADS, EACH)).transpose(1, 2) for one in (self.q, self.k, self.v))
            p = (q @ k.transpose(-1, -2) / math.sqrt(EACH)).softmax(-1)
            x = x + self.out[i]((p @ v).transpose(1, 2).flatten(2))
            x = x + self.fc2[i](functional.gelu(self.fc1[i](x)))
        return self.head(x.mean(1))


def model(order: Tensor | None = None) -> Attention:
    """The same function whatever ``order`` [EACH] says: it relabels the width of queries and keys in every head."""
    torch.manual_seed(2)
    made = Attention().double()
    for weight in made.parameters():
        weight.data = torch.randn_like(weight) * 0.5
    if order is not None:
        rows = (torch.arange(HEADS)[:, None] * EACH + order).flatten()
        for one in (*made.q, *made.k):
            one.weight.data, one.bias.data = one.weight.data[rows], one.bias.data[rows]
    return made.eval()


def data(count: int = 6) -> Calibration:
    x = torch.randn(count, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Calibration((Batch((x,)),), "normal")


def analysed(module: nn.Module, **limits: Any) -> Program:
    x = data().batches[0].args[0]
    return Pipeline((PropagateAxes(), FindGroups(**{"align": 1, **limits}))).run(capture(module, (x[:2],)))


def scored(program: Program, criterion: Trajectory) -> Program:
    return ScoreGroups(criterion, data()).run(program)


EXACT = {"mode": "exact", "samples": 6}


def measured(program: Program, criterion: Trajectory | None = None, **more: Any) -> Program:
    chosen = criterion or Trajectory(**EXACT)  # type: ignore[arg-type]
    return MeasureRungs(chosen, data=data(), **more).run(scored(program, chosen))


def test_a_tail_of_one_costs_what_its_element_costs_alone() -> None:
    program = analysed(model())
    criterion = Trajectory(**EXACT)  # type: ignore[arg-type]
    alone, after = scored(program, criterion).need("scores"), measured(program, criterion).need("scores")
    groups = find_tailed(program, (Kind.QK, Kind.V))
    assert len(groups) == 4
    for group in groups:
        curve, values = after[group.name].curve, alone[group.name].values
        assert curve is not None
        assert float(curve[-1] - curve[-2]) == pytest.approx(float(values.min()), rel=1e-9)
        assert after[group.name].ranking() == alone[group.name].ranking()
    others = {g.name for g in program.need("groups") if g.prunable} - {g.name for g in groups}
    assert others
    assert all(after[name] is alone[name] or after[name].curve is None for name in others)


def test_all_costs_at_least_what_any_tail_costs_and_no_sum() -> None:
    after = measured(analysed(model())).need("scores")
    alone = scored(analysed(model()), Trajectory(**EXACT)).need("scores")  # type: ignore[arg-type]
    bent = 0
    for group in find_tailed(analysed(model()), (Kind.QK,)):
        curve = after[group.name].curve
        assert curve is not None
        assert bool((curve[1:] >= curve[:-1]).all())
        assert float(curve[0]) == 0
        sums = alone[group.name].values.sort(descending=True).values.cumsum(0)
        bent += bool((curve[1:] / curve[-1] - sums / sums[-1]).abs().max() > 0.01)
    assert bent, "a softmax reads them: what they do together is no sum"


def test_relabelling_leaves_the_curve_and_relabels_the_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, two = (measured(analysed(model(o))).need("scores") for o in (None, order))
    for group in find_tailed(analysed(model()), (Kind.QK,)):
        a, b = one[group.name], two[group.name]
        assert a.curve is not None
        assert b.curve is not None
        torch.testing.assert_close(a.curve, b.curve, rtol=1e-8, atol=1e-10)
        assert order[b.ranking()].tolist() == a.ranking()


def test_elements_of_a_basis_go_from_the_end_whatever_they_score() -> None:
    program = analysed(model())
    ordered = program.but(groups=tuple(g.but(ordered=g.kind is Kind.QK) for g in program.need("groups")))
    for after in (measured(ordered), ScoreGroups("l2").run(ordered)):
        for group in find_tailed(ordered, (Kind.QK,)):
            assert after.need("scores")[group.name].ranking() == list(range(EACH))
            assert group.choose(2, after.need("scores"))[group.name].keep == (0, 1)
    plan = SearchPlan(Budget("flops", 0.7), kinds=(Kind.QK, Kind.V)).run(measured(ordered)).need("plan")
    kept = [c.keep for c in plan.elements.values() if c.kind == "qk"]
    assert kept
    assert all(keep == tuple(range(len(keep))) for keep in kept)


def test_at_most_so_many_counts_are_measured_and_the_rest_lies_between() -> None:
    after = measured(analysed(model(), floor=0.0), most=2).need("scores")
    for group in find_tailed(analysed(model()), (Kind.V,)):
        curve = after[group.name].curve
        assert curve is not None
        steps = (curve[1:] - curve[:-1])[1:]
        assert len({round(float(s), 6) for s in steps}) <= 2


def test_a_search_sees_the_curve_and_refining_leaves_it() -> None:
    program = analysed(model())
    criterion = Trajectory(samples=6, check=4)
    after = measured(program, criterion)
    group = find_tailed(program, (Kind.QK,))[0]
    curve = after.need("scores")[group.name].curve
    assert curve is not None
    one = ladder(group, after.need("scores")[group.name], 1.0)
    assert one.values == tuple(float(curve[n]) for n in one.counts)
    planned = SearchPlan(Budget("flops", 0.6), kinds=(Kind.HEAD, Kind.FFN, Kind.QK, Kind.V)).run(after)
    assert {"qk", "v"} & set(planned.need("plan").kinds)
    refined = RefineScores(criterion, data()).run(planned).need("scores")
    for name in (g.name for g in find_tailed(program, (Kind.QK, Kind.V))):
        assert torch.equal(refined[name].values, after.need("scores")[name].values)


def test_what_is_only_summed_keeps_its_scores() -> None:
    program = ScoreGroups("l2").run(analysed(model()))
    assert MeasureRungs("l2").run(program).need("scores") == program.need("scores")
    probes = Trajectory(mode="probe", samples=6)
    assert not probes.measures_sets
    before = scored(analysed(model()), probes)
    after = MeasureRungs(probes, data=data()).run(before).need("scores")
    assert all(s.curve is None for s in after.values())
    with pytest.raises(OptionError, match="needs data"):
        MeasureRungs().run(before)
    with pytest.raises(OptionError, match="at least one"):
        MeasureRungs(most=0)


def test_scores_are_slopes_of_the_hull() -> None:
    plain = scored(analysed(model()), Trajectory(**EXACT)).need("scores")  # type: ignore[arg-type]
    one = next(s for s in plain.values() if len(s.values) == EACH)
    made = by_rungs(one, torch.tensor([5, 4, 3, 2, 1, 0]), [(1, 9.0), (2, 4.0), (4, 4.5)])
    assert made.curve is not None
    assert made.curve.tolist() == pytest.approx([0.0, 5.0, 10.0, 10.0, 10.0, 12.0, 14.0])
    assert float(made.values.sum()) == pytest.approx(14.0)
    assert made.values.argmax() in (4, 5)


@pytest.mark.parametrize("importance", ["trajectory{samples=8,check=4}", "l2"])
def test_a_run_that_cuts_width_says_so_and_replays(importance: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = data(24).batches[0].args[0].float()
    options: dict[str, Any] = {"flops": 0.6, "prune": "heads,ffn,qk,v", "align": 1, "recover": "none"}
    quiet: dict[str, Any] = {"on_event": lambda _: None, "data": x}
    out = tmp_path / "a"
    made = fxprune.compile(model().float(), x[:2], importance=importance, out=out, **options, **quiet)
    by_rung = importance != "l2"
    assert ("measure-rungs{" in made.report["pipeline"]) == by_rung
    again = fxprune.compile(model().float(), x[:2], pipeline=made.report["pipeline"], **quiet)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]
    entry = next(g for g in made.report["groups"] if g["kind"] in ("qk", "v") and g["kept"] < g["size"])
    assert (entry["curve"] is not None) == by_rung
    said = explain(out, entry["group"])["because"]
    assert any("what went was measured as a whole" in line for line in said) == by_rung
    assert not any("structured OBS" in line for line in said)
