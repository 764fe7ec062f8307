"""A kind of thing to choose, in one file: found, scored, searched beside neurons, applied, replayed, explained."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reports import parsed, words
from support.token_models import TokenViT, scrambled
from torch import Tensor, nn

import fxprune
from fxprune import BudgetInfeasible, OptionError, PlanError, registry
from fxprune.artifact.explain import explain
from fxprune.cli.entry import OK, main
from fxprune.data.batch import Batch
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.group import Switch, Tie
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.analysis.start_round import StartRound
from fxprune.passes.search.ladder import ladder, value_of
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.workflows.sensitivity import sensitivity

PLUGIN = Path(__file__).parents[1] / "plugin"
KIND = PLUGIN / "fxprune_example" / "branch.py"
IDLE = "blocks.1"  # the block whose branch hardly does anything
QUIET: dict[str, Any] = {"on_event": lambda _: None}


class Block(nn.Module):
    """x + f(x)"""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        with torch.no_grad():
            self.down.weight.mul_(scale)
            self.down.bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, seed: int = 0, hidden: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(*(Block(16, hidden, scale) for scale in (1.0, 0.01, 1.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def data(count: int = 96) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package's kind, and nothing else of it."""
    point, others = metadata.EntryPoint("kind.branch", "fxprune_example.branch:BRANCH", "fxprune.plugins"), {}

    def points(**asked: Any) -> Any:
        return [point] if asked.get("group") == "fxprune.plugins" else others["real"](**asked)

    others["real"] = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", points)
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "fxprune_example"]:
        del sys.modules[name]


def compiled(model: nn.Module, **more: Any) -> fxprune.Artifact:
    options = {"flops": 0.5, "prune": "ffn,branch", "data": data(), "importance": "fisher", "align": 1, **more}
    return fxprune.compile(model.eval(), data()[:2], **QUIET, **options)


def without_branch(model: Net) -> Net:
    """The dense model with the idle branch masked by hand."""
    model.blocks[1].down.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    return model.eval()


def test_the_kind_is_one_short_file() -> None:
    assert len(KIND.read_text(encoding="utf-8").splitlines()) < 80


def test_found_scored_searched_applied_and_reported(tmp_path: Path) -> None:
    made = compiled(Net(), out=tmp_path / "small")
    kinds = {name: (c.kind, c.keep) for name, c in made.plan.choices.items()}
    assert kinds.pop(f"{IDLE}.down:branch") == ("branch", ())
    assert {kind for kind, _ in kinds.values()} == {"ffn"}, "neurons went as well, under the same budget"
    assert f"{IDLE}.up:ffn" not in made.plan.choices, "nothing is left to choose inside"
    assert made.report["cost"]["ratio"]["flops"] <= 0.5
    assert not [name for name in made.module.state_dict() if name.startswith(IDLE)]
    nodes = [n for n in made.program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(nodes) == 2
    assert made.report["masked"]["max_rel"] <= made.report["masked"]["tolerance"]
    entries = {g["group"]: g for g in made.report["groups"]}
    branch = entries[f"{IDLE}.down:branch"]
    assert (branch["size"], branch["kept"], branch["criterion"]) == (1, 0, "fisher")
    assert branch["macs"] == 2 * 16 * 32
    assert branch["params"] == 2 * 16 + 2 * 16 * 32 + 32 + 16
    assert entries["blocks.0.down:branch"]["kept"] == 1
    page = words(parsed((tmp_path / "small" / "report.html").read_text()))
    assert f"{IDLE}.down:branch" in page
    assert "branch: 2 of 3 stay in 3 groups" in page


def test_sliced_equals_masked_by_hand() -> None:
    made = compiled(Net(), prune="branch", recover="none", flops=0.7)
    assert list(made.plan.choices) == [f"{IDLE}.down:branch"]
    torch.testing.assert_close(made.module(data()), without_branch(Net())(data()), rtol=1e-5, atol=1e-6)


def test_recovery_makes_up_for_it() -> None:
    """What comes behind is fitted to what the dense model does, as behind tokens that merged."""
    plain, fitted = (compiled(Net(), recover=how, members="scores") for how in ("none", "refit"))
    assert plain.plan.choices == fitted.plan.choices
    dense = Net().eval()(data()).detach()
    error = [float((one.module(data()).detach() - dense).square().mean()) for one in (plain, fitted)]
    assert error[1] < error[0]


def test_the_plan_is_saved_and_fits_other_checkpoints(tmp_path: Path) -> None:
    made = compiled(Net(), out=tmp_path / "small")
    plan = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert plan["choices"][f"{IDLE}.down:branch"] == {"kind": "branch", "size": 1, "keep": []}
    again = fxprune.apply(Net(1).eval(), tmp_path / "small" / "plan.json", data()[:2], out=tmp_path / "other", **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["masked"]["max_rel"] <= again.report["masked"]["tolerance"]
    assert {k: v.shape for k, v in again.module.state_dict().items()} == {
        k: v.shape for k, v in made.module.state_dict().items()
    }
    text = again.report["pipeline"]
    same = fxprune.compile(Net(1).eval(), data()[:2], pipeline=text, plan=tmp_path / "other" / "plan.json", **QUIET)
    assert same.report["pipeline"] == text
    torch.testing.assert_close(same.module(data()), again.module(data()), rtol=0, atol=0)


@pytest.mark.parametrize("recover", ["none", "ridge"])
def test_the_pipeline_of_its_report_replays(recover: str) -> None:
    made = compiled(Net(), recover=recover)
    assert "find-branches" in made.report["pipeline"]
    assert "drop-branches,propagate-axes,find-groups{align=1},find-branches,slice-axes" in made.report["pipeline"]
    again = fxprune.compile(Net().eval(), data()[:2], pipeline=made.report["pipeline"], data=data(), **QUIET)
    assert again.report["pipeline"] == made.report["pipeline"]
    assert again.plan.choices == made.plan.choices
    torch.testing.assert_close(again.module(data()), made.module(data()), rtol=0, atol=0)
    bare = made.report["pipeline"].replace(",drop-branches,propagate-axes,find-groups{align=1},find-branches", "")
    short = fxprune.compile(Net().eval(), data()[:2], pipeline=bare, data=data(), **QUIET)
    assert short.report["pipeline"] == made.report["pipeline"], "what always runs need not be stated"


def test_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(Net(), out=tmp_path / "small")
    told = explain(tmp_path / "small", f"{IDLE}.down:branch")
    assert (told["kept"], told["removed"]) == (0, [0])
    assert told["because"][0] == "it went as a whole: it costs 1.024 kMACs and 1,104 parameters in the dense model"
    assert any("what its elements are worth together" in line for line in told["because"])
    assert any(line.startswith("threshold: ") for line in told["because"])
    assert main(["explain", str(tmp_path / "small"), "blocks.0.down:branch"]) == OK
    assert "it stays as a whole" in capsys.readouterr().err


def analysed(model: nn.Module, criterion: str = "l2") -> Program:
    find = registry.kind("branch").find()
    passes = (PropagateAxes(), FindGroups(align=1), find, ScoreGroups(criterion))
    return Pipeline(passes).run(capture(model.eval(), (data()[:2],)))


def test_a_line_in_the_registry_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    by_plugin = compiled(Net())
    monkeypatch.setattr(metadata, "entry_points", lambda **asked: [])
    with pytest.raises(OptionError, match="unknown kind of group 'branch'"):
        compiled(Net())
    line = "fxprune_example.branch:FindBranches fxprune_example.branch:DropBranches"
    monkeypatch.setitem(registry.KINDS, "branch", line)
    by_line = compiled(Net())
    assert by_line.plan.choices == by_plugin.plan.choices
    assert by_line.report["pipeline"] == by_plugin.report["pipeline"]


def test_sensitivity_is_that_of_the_real_cut() -> None:
    program, batches = analysed(Net()), [Batch((data(),))]
    found = sensitivity(program, batches, ["branch", "ffn"], (0.5,))
    levels = {g["group"]: g["levels"][0] for g in found["groups"]}
    dense, masked = (one(data()).detach().softmax(1) for one in (Net().eval(), without_branch(Net())))
    divergence = float((dense * (dense.log() - masked.log())).sum(1).mean())
    assert levels[f"{IDLE}.down:branch"]["damage"] == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    assert levels[f"{IDLE}.down:branch"]["kept"] == 0
    assert levels[f"{IDLE}.down:branch"]["flops_saved"] == 2 * 16 * 32
    assert levels["blocks.0.down:branch"]["damage"] > levels[f"{IDLE}.down:branch"]["damage"]
    assert {k["kind"] for k in found["kinds"]} == {"branch", "ffn"}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_no_search_finds_more_than_all_of_them(share: float, criterion: str) -> None:
    program = analysed(Net(hidden=6), criterion)
    dense = CostModel(program)().flops
    values = {}
    for method in ("auto", "exhaustive"):
        search = SearchPlan(Budget("flops", share), kinds=("ffn", "branch"), method=method)
        plan = search.run(program).need("plan")
        assert CostModel(program)(plan.sizes(program.need("groups"))).flops <= share * dense
        values[method] = worth(program, plan)
    assert values["auto"] <= values["exhaustive"] + 1e-9


def worth(program: Program, plan: CompressionPlan) -> float:
    """The objective of the search, of a plan."""
    ledger = CostModel(program).ledger("flops", {})
    live = [g for g in program.need("groups") if g.prunable and str(g.kind) in ("ffn", "branch")]
    ladders = [ladder(g, program.need("scores")[g.name], float(-ledger.changes(g.sizes(0)))) for g in live]
    return value_of(ladders, [one.counts.index(len(plan.kept(g))) for one, g in zip(ladders, live, strict=True)])


def test_the_cost_is_what_is_left_of_the_graph() -> None:
    """Bilinear: with the branch gone its neurons cost nothing, whatever stays of them."""
    program = analysed(Net())
    model, groups = CostModel(program), program.group_by_name
    part, neurons = groups[f"{IDLE}.down:branch"], groups[f"{IDLE}.up:ffn"]
    assert isinstance(part, Switch)
    whole = model().flops
    assert whole - model({part.axis: 0}).flops == 2 * 16 * 32
    assert model({part.axis: 0, neurons.axis: 5}) == model({part.axis: 0})
    assert whole - model({neurons.axis: 5}).flops == 2 * 16 * (32 - 5)
    assert not model.separable("flops", [part.axis, neurons.axis])


def test_a_part_is_worth_its_elements_together() -> None:
    scores = analysed(Net()).need("scores")
    part, neurons = scores[f"{IDLE}.down:branch"], scores[f"{IDLE}.up:ffn"]
    assert float(part.values) == pytest.approx(float(neurons.values.sum()))
    drop = 1.0 + float((neurons.values.sum() / neurons.values.max()).log())
    assert part.curve.tolist() == pytest.approx([0.0, drop])


@pytest.mark.parametrize(
    ("more", "says"),
    [({"rounds": 2}, "in one round"), ({"flops": None, "latency": 0.5}, "not by time"), ({"prune": "branch"}, "")],
)
def test_what_it_does_not_go_with(more: dict[str, Any], says: str) -> None:
    if not says:
        made = compiled(Net(), flops=0.7, **more)
        assert made.plan.kinds == ("branch",)
        return
    with pytest.raises(OptionError, match=says):
        compiled(Net(), **more)


def test_a_plan_without_its_plugin_is_an_error_at_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(Net(), out=tmp_path / "small")
    monkeypatch.setattr(metadata, "entry_points", lambda **asked: [])
    with pytest.raises(PlanError, match="unknown kind of group 'branch'") as caught:
        fxprune.apply(Net().eval(), tmp_path / "small" / "plan.json", data()[:2], **QUIET)
    lines = (tmp_path / "small" / "plan.json").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if ":branch" in text)
    assert f"plan.json:{line}: group '{IDLE}.down:branch'" in caught.value.where


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_beside_tokens(share: float) -> None:
    """Of what the budget takes away tokens take a share, which may be none."""
    torch.manual_seed(0)
    model, x = scrambled(TokenViT(depth=2)), torch.randn(8, 3, 32, 32)
    made = fxprune.compile(
        model,
        x[:2],
        flops=0.85,
        prune="ffn,branch,tokens",
        tokens=f"tome{{schedule=constant,share={share}}}",
        data=x,
        **QUIET,
    )
    assert ("token" in made.plan.kinds) == (share > 0)
    assert {"ffn", "branch"} & set(made.plan.kinds)
    assert made.report["cost"]["ratio"]["flops"] <= 0.85
    again = fxprune.compile(model, x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    assert again.report["pipeline"] == made.report["pipeline"]


# ------------------------------------------------------------ ties: groups that share a count


def test_tied_groups_keep_as_many_each_its_own_best() -> None:
    program = analysed(Net())
    groups = [g for g in program.need("groups") if g.kind == "ffn"]
    tie = Tie.of("hidden_size:ffn", groups)
    program = program.but(groups=(*program.need("groups"), tie), scores=None)
    program = ScoreGroups("l2").run(program)
    found = SearchPlan(Budget("flops", 0.5), kinds=("ffn",)).run(program).need("plan")
    assert set(found.choices) == {g.name for g in groups}, "the plan names the groups, not the tie"
    counts = {len(c.keep) for c in found.elements.values()}
    assert len(counts) == 1
    for group in groups:
        best = program.need("scores")[group.name].ranking()[: counts.copy().pop()]
        assert found.elements[group.name].keep == tuple(sorted(best))
    model = CostModel(program)
    spent = model(found.sizes(program.need("groups"))).flops
    assert spent <= 0.5 * model().flops < model({g.axis: counts.copy().pop() + 1 for g in groups}).flops
    with pytest.raises(BudgetInfeasible) as refused:
        SearchPlan(Budget("flops", 0.01), kinds=("ffn",)).run(program)
    assert "of kind ffn, which was not chosen" not in str(refused.value), "what a tie holds was chosen with it"
    with pytest.raises(ValueError, match="share no count"):
        Tie.of("odd", [groups[0], groups[1].but(size=5)])


def test_a_tie_outlives_a_round_of_pruning() -> None:
    program = analysed(Net())
    tie = Tie.of("hidden_size:ffn", [g for g in program.need("groups") if g.kind == "ffn"])
    program = ScoreGroups("l2").run(program.but(groups=(*program.need("groups"), tie), scores=None))
    program = SearchPlan(Budget("flops", 0.7), kinds=("ffn",)).run(program)
    kept = {len(c.keep) for c in program.need("plan").elements.values()}
    small = SliceAxes().run(StartRound().run(program)).without_facts()
    again = FindGroups(inherit=True).run(PropagateAxes().run(small))
    (left,) = [g for g in again.need("groups") if isinstance(g, Tie)]
    assert {left.size} == {g.size for g in left.tied} == kept
    assert left.members == tie.members


def test_a_kind_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "odd", "fxprune_example.branch:branches fxprune_example.branch:DropBranches")
    with pytest.raises(OptionError, match="'odd' is not a kind"):
        registry.kind("odd")
    assert importlib.import_module("fxprune_example.branch").FindBranches is registry.lookup("pass", "find-branches")
