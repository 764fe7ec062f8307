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
from fxprune.ir.dataflow import op_name
from fxprune.ir.group import LAYERS, Kind, Switch, with_derived
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.find_layers import FindLayers
from fxprune.passes.analysis.importance.distance import Measure, output_change
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.importance.whole_layers import outputs_without
from fxprune.passes.analysis.measure_rungs import MeasureRungs
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
        for i in range(len(self.qkv)):
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
    return Pipeline((PropagateAxes(), FindGroups(align=4), FindLayers())).run(capture(model(post), (x[:2],)))


def layers_of(program: Program) -> dict[str, Switch]:
    return {g.name: g for g in program.need("groups") if isinstance(g, Switch)}


@pytest.mark.parametrize("post", [False, True])
def test_branches_of_the_stream_and_whole_layers_are_found_and_nothing_else(post: bool) -> None:
    found = layers_of(analysed(post))
    assert [str(g.kind) for g in found.values()] == ["attention", "mlp", "layer"] * DEPTH
    assert list(found)[:3] == ["out.0:attention", "fc2.0:mlp", "fc2.0:layer"]
    assert all(set(g.shares) == {"qkv.0:head", "fc1.0:ffn"} for name, g in found.items() if name == "fc2.0:layer")


def test_losing_a_layer_is_measured_as_a_whole() -> None:
    program, criterion = analysed(), Trajectory(samples=12, check=4)
    scored = ScoreGroups(criterion, data()).run(program)
    after = MeasureRungs(criterion, kinds=LAYERS, data=data()).run(scored).need("scores")
    removals = Removals(program, criterion.select_samples(program, data().batches), Measure(), 2**28)
    for part in layers_of(program).values():
        one = after[part.name]
        features, output = removals.together("x", {part: [torch.arange(1)]})
        added = criterion._found["added"](features, output)[part.name]
        assert one.whole == float(one.values) == pytest.approx(float(added), rel=1e-4)
        assert with_derived([part], after)[part.name].whole == one.whole, "what was measured stays"
        assert ladder(part, one, 1.0).values == (0.0, one.whole)
    worth = {name: one.whole for name, one in after.items() if name in layers_of(program)}
    assert f".{IDLE}:" in min(worth, key=worth.__getitem__)


def test_without_a_bias_it_is_what_losing_all_of_its_elements_is() -> None:
    net = model()
    for linear in (*net.out, *net.fc2):
        nn.init.zeros_(linear.bias)
    batches = data().batches
    passes = (PropagateAxes(), FindGroups(align=4), FindLayers())
    program = Pipeline(passes).run(capture(net, (batches[0].args[0][:2],)))
    removals, groups = Removals(program, batches, Measure(), 2**28), program.group_by_name
    for part in layers_of(program).values():
        if part.kind != Kind.LAYER:
            (group,) = (groups[name] for name in part.shares)
            as_part = removals.together("x", {part: [torch.arange(1)]})
            as_group = removals.together("y", {group: [torch.arange(group.size)]})
            for one, two in zip(as_part, as_group, strict=True):
                assert float(one[part.name]) == pytest.approx(float(two[group.name]), rel=1e-3)


def test_a_layer_without_taps_behind_it_is_judged_by_its_own() -> None:
    program = analysed()
    removals = Removals(program, data().batches, Measure(), 2**28)
    last = layers_of(program)[f"fc2.{DEPTH - 1}:mlp"]
    features, output = removals.together("x", {last: [torch.arange(1)]})
    assert float(features[last.name]) > 0
    assert float(output[last.name]) > 0


@pytest.mark.parametrize("post", [False, True])
def test_a_layer_that_goes_is_gone_from_the_graph(post: bool, tmp_path: Path) -> None:
    x = data(64).batches[0].args[0]
    options: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "none", "data": x, **QUIET}
    made = fxprune.compile(model(post), x[:2], flops=0.72, prune="attention,mlp", out=tmp_path / "a", **options)
    gone = {name: c for name, c in made.plan.elements.items() if not c.keep}
    assert gone
    assert gone.keys() == made.plan.elements.keys(), "layers alone were asked for: all of one, or nothing"
    assert gone.keys() == {f"out.{IDLE}:attention", f"fc2.{IDLE}:mlp"}
    assert made.report["cost"]["ratio"]["flops"] <= 0.72
    assert made.report["masked"]["max_rel"] <= made.report["masked"]["tolerance"]
    assert not [n for n in made.module.state_dict() if n.startswith((f"qkv.{IDLE}", f"fc1.{IDLE}", f"fc2.{IDLE}"))]
    names = [op_name(n) for n in made.program.graph.nodes if n.op == "call_function"]
    stays = DEPTH - 1
    assert names.count("scaled_dot_product_attention") == stays
    assert names.count("layer_norm") == 2 * (DEPTH if post else stays), "norms of a post-norm stream are the stream's"
    assert (names.count("add"), names.count("gelu")) == (2 * stays, stays + 1)
    name = f"fc2.{IDLE}:mlp"
    told = explain(tmp_path / "a", name)["because"]
    assert any("the layer is gone" in line for line in told)
    assert any(note.startswith("layers that go") and name in note for note in made.report["notes"])
    again = fxprune.compile(model(post), x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]
    applied = fxprune.apply(model(post), tmp_path / "a" / "plan.json", x[:2], **QUIET)
    torch.testing.assert_close(applied.module(x), made.module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kinds", ["heads,ffn,attention,mlp", "heads,ffn,layers"])
def test_on_one_ledger_with_heads_and_neurons(kinds: str) -> None:
    x = data(64).batches[0].args[0]
    options: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "refit", "data": x, **QUIET}
    made = fxprune.compile(model(), x[:2], flops=0.4, prune=kinds, **options)
    kept = {name: len(c.keep) / c.size for name, c in made.plan.elements.items()}
    assert any(share == 0 for share in kept.values())
    assert any(0 < share < 1 for share in kept.values())
    assert made.report["cost"]["ratio"]["flops"] <= 0.4


def test_without_the_kind_no_layer_goes() -> None:
    x = data(64).batches[0].args[0]
    made = fxprune.compile(model(), x[:2], flops=0.4, importance="l2", data=x, recover="none", **QUIET)
    assert all(c.keep for c in made.plan.elements.values())


@pytest.mark.parametrize("kind", LAYERS)
def test_without_data_a_layer_is_worth_what_is_in_it(kind: Kind) -> None:
    with pytest.raises(fxprune.errors.InternalError, match="cannot cost"):
        ImportanceScores("a", torch.ones(2), "x", "y", whole=-1.0)
    program = analysed()
    plan = SearchPlan(Budget("flops", 0.6), kinds=(kind,)).run(ScoreGroups("l2").run(program)).need("plan")
    assert {c.kind for c in plan.elements.values()} == {str(kind)}
    assert not any(c.keep for c in plan.elements.values())


@pytest.mark.parametrize("post", [False, True])
def test_a_whole_layer_goes_with_its_norms(post: bool, tmp_path: Path) -> None:
    x = data(64).batches[0].args[0]
    options: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "none", "data": x, **QUIET}
    made = fxprune.compile(model(post), x[:2], flops=0.72, prune="layers", target="onnx", out=tmp_path / "a", **options)
    assert list(made.plan.elements) == [f"fc2.{IDLE}:layer"]
    names = [op_name(n) for n in made.program.graph.nodes if n.op == "call_function"]
    assert (names.count("layer_norm"), names.count("scaled_dot_product_attention")) == (2 * DEPTH - 2, DEPTH - 1)
    assert made.report["parity"]["max_rel"] <= 1e-4
    with torch.no_grad():
        want = without(model(post), IDLE)(x)
    torch.testing.assert_close(made.module(x), want, rtol=1e-5, atol=1e-6)


def without(net: Blocks, layer: int) -> Blocks:
    for name in ("qkv", "out", "fc1", "fc2", "norm1", "norm2"):
        del getattr(net, name)[layer]
    return net


@pytest.mark.parametrize("kind", ["attention", "mlp", "layer"])
@pytest.mark.parametrize("method", ["bias", "ridge", "refit"])
def test_the_last_projection_before_it_makes_up_for_a_layer_that_is_gone(kind: str, method: str) -> None:
    x = data(64).batches[0].args[0]
    name = f"{'out' if kind == 'attention' else 'fc2'}.{IDLE}:{kind}"
    plan = CompressionPlan({name: Choice(kind, 1, ())})
    made = {how: fxprune.compile(model(), x[:2], plan=plan, data=x, recover=how, **QUIET) for how in ("none", method)}
    step = next(s for s in made[method].report["recovery"]["steps"] if s["role"] == "carries")
    before = {"attention": f"fc2.{IDLE - 1}", "mlp": f"out.{IDLE}", "layer": f"fc2.{IDLE - 1}"}[kind]
    assert step["parameter"] == f"{before}.weight"
    assert step["after"] < step["before"]
    dense = model()(x).detach()
    error = {how: float((one.module(x) - dense).square().sum().detach()) for how, one in made.items()}
    assert error[method] < error["none"]


def test_a_post_norm_stream_carries_nothing_past_its_norm() -> None:
    x = data(64).batches[0].args[0]
    plan = CompressionPlan({f"fc2.{IDLE}:mlp": Choice("mlp", 1, ())})
    made = fxprune.compile(model(post=True), x[:2], plan=plan, data=x, recover="refit", **QUIET)
    assert {s["role"] for s in made.report["recovery"]["steps"]} == {"makes", "reads"}


def test_layers_that_did_nothing_leave_the_weights_as_they_were() -> None:
    net, x = model(), data(64).batches[0].args[0]
    for linear in (net.out[IDLE], net.fc2[IDLE]):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    plan = CompressionPlan({f"fc2.{IDLE}:layer": Choice("layer", 1, ())})
    made = fxprune.compile(net, x[:2], plan=plan, data=x, recover="refit", **QUIET)
    for parameter, value in made.module.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[parameter], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ --layers


OPTIONS: dict[str, Any] = {"importance": "trajectory{samples=16,check=4}", "recover": "none", **QUIET}


@pytest.mark.parametrize(
    ("asked", "prune", "gone"),
    [
        (-1, None, [f"fc2.{IDLE}:layer"]),
        ("-1", "layers", [f"fc2.{IDLE}:layer"]),
        (-2, "attention,mlp", [f"out.{IDLE}:attention", f"fc2.{IDLE}:mlp"]),
        (-1, "mlp", [f"fc2.{IDLE}:mlp"]),
        ("0,2", None, ["fc2.0:layer", "fc2.2:layer"]),
        ("0-1", "attention", ["out.0:attention", "out.1:attention"]),
        ([2], "attention,mlp", ["out.2:attention", "fc2.2:mlp"]),
    ],
)
def test_so_many_layers_go_or_those_that_are_named(asked: Any, prune: str | None, gone: list[str]) -> None:
    x = data(64).batches[0].args[0]
    made = fxprune.compile(model(), x[:2], layers=asked, prune=prune, data=x, **OPTIONS)
    assert sorted(made.plan.elements) == sorted(gone)
    assert made.report["masked"]["max_rel"] <= made.report["masked"]["tolerance"]
    assert made.report["options"]["layers"] == (asked if not isinstance(asked, tuple) else list(asked))
    again = fxprune.compile(model(), x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]
    searched = {e["kind"] for e in made.report["groups"] if e["searched"]}
    assert searched == {c.kind for c in made.plan.elements.values()}


def test_a_budget_is_met_by_what_is_left() -> None:
    x = data(64).batches[0].args[0]
    made = fxprune.compile(model(), x[:2], layers=-1, flops=0.4, floor=0.25, data=x, **{**OPTIONS, "recover": "refit"})
    assert not made.plan.elements[f"fc2.{IDLE}:layer"].keep
    rest = {name: c for name, c in made.plan.elements.items() if c.keep}
    assert {c.kind for c in rest.values()} <= {"head", "ffn"}
    assert rest
    assert not [name for name in rest if f".{IDLE}" in name], "what lies inside is gone with it"
    assert all(len(c.keep) >= 0.25 * c.size for c in rest.values())
    assert made.report["cost"]["ratio"]["flops"] <= 0.4
    assert made.report["search"]["method"] in ("two-class", "lagrangian", "dynamic")
    again = fxprune.compile(model(), x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]


def test_named_layers_need_no_scores_and_no_data() -> None:
    x = data(4).batches[0].args[0]
    made = fxprune.compile(model(), x, layers="1", **QUIET)
    assert "score-groups" not in made.report["pipeline"]
    torch.testing.assert_close(made.module(x), without(model(), 1)(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("4", "there is no layer 4"),
        (-3, "3 layers cannot go"),
        ("3-1", "names no layer"),
        ("half", "does not say which layers go"),
        (4.5, "does not say which layers go"),
    ],
)
def test_layers_that_cannot_go(asked: Any, says: str) -> None:
    x = data(4).batches[0].args[0]
    with pytest.raises(fxprune.errors.OptionError, match=says):
        fxprune.compile(model(), x, layers=asked, **QUIET)


@pytest.mark.parametrize(
    "more", [{"rounds": 2}, {"tokens": "tome:r=1"}, {"blocks": "8x8"}, {"flops": None, "latency": 0.5}]
)
def test_what_layers_do_not_go_with(more: dict[str, Any]) -> None:
    x = data(4).batches[0].args[0]
    with pytest.raises(fxprune.errors.OptionError, match=r"--layers|in one round|not by time|layers"):
        fxprune.compile(model(), x, layers=-1, **{"flops": 0.5, **more}, **QUIET)


# ------------------------------------------------------------ criteria of layers


def worths(criterion: str, program: Program, kinds: tuple[Kind, ...] = LAYERS) -> dict[str, float]:
    scored = ScoreGroups(criterion, data()).run(program)
    assert scored.scores == {}, "it says nothing of what is inside"
    found = MeasureRungs(criterion, kinds=kinds, data=data()).run(scored).need("scores")
    assert {str(g.kind) for g in layers_of(program).values() if g.name in found} == set(map(str, kinds))
    return {name: float(one.values) for name, one in found.items()}


def test_block_influence_is_how_far_a_layer_turns_the_stream() -> None:
    net, x = model(), data().batches[0].args[0]
    found = worths("block-influence", analysed())
    with torch.no_grad():
        before = net.stem(x)
        middle = before + net.attend(0, net.norm1[0](before))
        after = middle + net.fc2[0](functional.gelu(net.fc1[0](net.norm2[0](middle))))
    for name, a, b in (
        ("out.0:attention", before, middle),
        ("fc2.0:mlp", middle, after),
        ("fc2.0:layer", before, after),
    ):
        assert found[name] == pytest.approx(float(1 - functional.cosine_similarity(a, b, dim=-1).mean()), rel=1e-4)
    assert worths("block-influence{samples=3}", analysed()).keys() == found.keys()


def test_finercut_takes_what_changes_the_outputs_least_with_the_others_gone() -> None:
    program, kinds = analysed(), (Kind.ATTENTION, Kind.MLP)
    found = worths("finercut{samples=12}", program, kinds)
    parts = {name: g for name, g in layers_of(program).items() if g.kind in kinds}
    dense = next(outputs_without(program, data().batches, ()))

    def change(gone: list[str]) -> float:
        now = next(outputs_without(program, data().batches, [parts[name] for name in gone]))
        return float(output_change(now, dense, 1.0).mean())

    order, left = [], list(parts)
    while left:
        order.append(min(left, key=lambda name: change([*order, name])))
        left.remove(order[-1])
        worth = max(change(order[: i + 1]) for i in range(len(order)))
        assert found[order[-1]] == pytest.approx(worth, rel=1e-4)
    assert sorted(found, key=found.__getitem__) == order
    short = worths("finercut{samples=12,most=2}", program, kinds)
    assert sorted(short, key=short.__getitem__)[:2] == sorted(found, key=found.__getitem__)[:2] == order[:2]


def test_finercut_of_layers_and_what_is_in_them() -> None:
    found = worths("finercut", analysed())
    for i in range(DEPTH):
        assert found[f"fc2.{i}:layer"] >= min(found[f"out.{i}:attention"], found[f"fc2.{i}:mlp"])


@pytest.mark.parametrize("criterion", ["finercut", "block-influence"])
def test_layers_are_chosen_by_a_criterion_of_layers(criterion: str, tmp_path: Path) -> None:
    x = data(64).batches[0].args[0]
    options = {"importance": criterion, "data": x, "recover": "none", **QUIET}
    made = fxprune.compile(model(), x[:2], layers=-1, out=tmp_path / "a", **options)
    assert list(made.plan.elements) == [f"fc2.{IDLE}:layer"]
    assert any(line.startswith(criterion) for line in explain(tmp_path / "a", f"fc2.{IDLE}:layer")["because"])
    assert any("no scores" in line for line in explain(tmp_path / "a", "fc1.0:ffn")["because"])
    searched = fxprune.compile(model(), x[:2], flops=0.72, prune="attention,mlp", **options)
    assert {c.kind for c in searched.plan.elements.values()} == {"attention", "mlp"}
    again = fxprune.compile(model(), x[:2], pipeline=searched.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == searched.plan.choices
    with pytest.raises(fxprune.errors.OptionError, match="scores attention, layer, mlp alone"):
        fxprune.compile(model(), x[:2], flops=0.5, **options)
