"""The laws of a pass, enforced by the pipeline: order, honesty about change, facts that are never stale."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from support.laws import analysed
from torch import Tensor, nn

from fxprune.errors import InternalError, OptionError, PluginError
from fxprune.extend import Criterion, prunable
from fxprune.intake.capture import capture
from fxprune.ir.group import PruneGroup
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.pipeline import Analysis, Pass, Pipeline, Search, Transform, describe_results
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.ir.rebuild import copy_graph, rebuild
from fxprune.ir.verify import verify
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.slice_axes import SliceAxes


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(torch.relu(self.up(x))))


def program() -> Program:
    return capture(FeedForward(), (torch.randn(2, 8),))


def doubled(program: Program) -> Program:
    """A program whose graph computes something else."""
    module = copy_graph(program.exported)
    node = next(n for n in module.graph.nodes if n.op == "call_function" and "relu" in str(n.target))
    node.target = torch.ops.aten.gelu.default
    return program.but(exported=rebuild(program.exported, module))


@dataclass(frozen=True)
class Meddle(Analysis):
    def run(self, program: Program) -> Program:
        return doubled(program)


@dataclass(frozen=True)
class Forget(Transform):
    """Changes the graph and keeps the facts."""

    def run(self, program: Program) -> Program:
        return doubled(program)


@dataclass(frozen=True)
class Drop(Transform):
    """Leaves a weight that is smaller than the graph says."""

    def run(self, program: Program) -> Program:
        state = {**program.exported.state_dict, "up.weight": nn.Parameter(torch.zeros(31, 8))}
        exported = rebuild(program.exported, copy_graph(program.exported), state_dict=state)
        return program.without_facts(exported=exported)


@dataclass(frozen=True)
class Fail(Analysis):
    def run(self, program: Program) -> Program:
        return program.but(notes=(str(1 / 0),))


@dataclass(frozen=True)
class Lose(Analysis):
    def run(self, program: Program) -> Program:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class Presume(Analysis):
    """Reads a fact that it does not say it needs."""

    def run(self, program: Program) -> Program:
        return program.but(notes=(str(program.need("plan")),))


@dataclass(frozen=True)
class Misplan(Search):
    def run(self, program: Program) -> Program:
        return program.but(plan=CompressionPlan({"no such group": Choice("ffn", 4, (0,))}))


@dataclass(frozen=True)
class Look(Analysis):
    depth: int = 3
    wide: bool = False
    names: tuple[str, ...] = ()
    data: list[int] = field(default_factory=list, repr=False)
    needs: ClassVar[tuple[str, ...]] = ("axes",)

    def run(self, program: Program) -> Program:
        return program


def test_order_is_checked_when_the_pipeline_is_built() -> None:
    with pytest.raises(InternalError, match=r"'find-groups' needs axes: 'propagate-axes' must come before"):
        Pipeline((FindGroups(), PropagateAxes()))


def test_facts_do_not_outlive_a_transform() -> None:
    with pytest.raises(InternalError, match="needs axes after 'clean' changed the graph"):
        Pipeline((PropagateAxes(), Clean(), FindGroups()))


def test_what_nobody_gives_is_said_too() -> None:
    with pytest.raises(InternalError, match="needs axes, groups, plan: no pass of this pipeline gives it"):
        Pipeline((SliceAxes(),))
    Pipeline((SliceAxes(),), start=("axes", "groups", "plan"))


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of this file as if fxprune brought them."""
    for one in (Meddle, Forget, Drop, Fail, Lose):
        monkeypatch.setattr(one, "__module__", "fxprune.passes.made_up")


def test_an_analysis_that_changes_the_graph_is_caught(ours: None) -> None:
    with pytest.raises(InternalError, match="analysis 'meddle' changed the graph"):
        Pipeline((Meddle(),)).run(program())


def test_a_transform_that_keeps_stale_facts_is_caught(ours: None) -> None:
    facts = Pipeline((PropagateAxes(),)).run(program())
    with pytest.raises(InternalError, match=r"'forget' kept stale facts: \['axes'\]") as caught:
        Pipeline((Forget(),), start=("axes",)).run(facts)
    assert "a bug in fxprune: please open an issue in its tracker" in str(caught.value)
    assert caught.value.pipeline == "forget"


BREAKS = {
    "meddle": "analysis 'meddle' changed the graph",
    "forget": "transform 'forget' kept stale facts",
    "drop": "after 'drop': up.weight has shape",
    "fail": "ZeroDivisionError: division by zero",
    "lose": "it gave a NoneType, not a Program",
    "presume": "the fact 'plan' is not there yet",
    "misplan": "after 'misplan': .*no such group",
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_a_pass_of_a_plugin_breaks_is_the_plugins(name: str) -> None:
    """The passes of this file come from no module of fxprune, as a plugin's do."""
    one = next(cls for cls in (Meddle, Forget, Drop, Fail, Lose, Presume, Misplan) if cls.slug() == name)()
    facts = Pipeline((Clean(), PropagateAxes(), FindGroups())).run(program())
    with pytest.raises(PluginError, match=BREAKS[name]) as caught:
        Pipeline((one,), start=("axes", "groups")).run(facts)
    error = caught.value
    assert f"the pass '{name}' of a plugin" in error.what
    assert f"{__name__}:{type(one).__name__}" in error.where
    assert "no bug of fxprune: report it to the authors of test_pipeline" in error.cure
    assert error.exit_code == 2
    assert "a bug in fxprune" not in str(error)


def test_what_a_plugin_says_is_wrong_with_the_request_is_left_as_it_is() -> None:
    @dataclass(frozen=True)
    class Refuse(Analysis):
        def run(self, program: Program) -> Program:
            raise OptionError("not like this", cure="otherwise")

    with pytest.raises(OptionError, match="not like this"):
        Pipeline((Refuse(),)).run(program())


class Half(Criterion):
    """Scores for every second element alone."""

    name = "half"
    unit = "places"

    def scores(self, program: Program, data: object, seed: int) -> dict[str, Tensor]:
        return {g.name: torch.ones(g.size // 2) for g in prunable(program)}


def test_a_criterion_of_a_plugin_is_told_from_the_pass_that_runs_it() -> None:
    with pytest.raises(PluginError, match="do not fit its group") as caught:
        Pipeline((Clean(), PropagateAxes(), FindGroups(), ScoreGroups(criterion=Half()))).run(program())
    assert "'score-groups' with what a plugin brought broke an invariant" in caught.value.what
    assert f"{__name__}:Half" in caught.value.where


def test_a_pass_states_its_name_or_has_that_of_its_class() -> None:
    @dataclass(frozen=True)
    class Anything(Look):
        name: ClassVar[str] = "look-closely"

    assert str(Anything(depth=4)) == "look-closely{depth=4}"
    assert Look.slug() == "look"


def test_change_is_measured() -> None:
    pipeline = Pipeline((Clean(), PropagateAxes(), FindGroups()))
    _, results = pipeline.apply(program())
    clean, axes, groups = results
    assert (clean.removed, clean.edited > 0, clean.changed) == (1, True, True)
    assert not axes.changed
    assert not groups.changed
    assert [r["name"] for r in describe_results(results)] == ["clean", "propagate-axes", "find-groups"]


def test_resized_tensors_are_counted() -> None:
    facts = Pipeline((Clean(), PropagateAxes(), FindGroups())).run(program())
    plan = CompressionPlan({"up:ffn": Choice("ffn", 32, tuple(range(16)))})
    pipeline = Pipeline((SliceAxes(),), start=("axes", "groups", "plan"))
    _, (result,) = pipeline.apply(facts.but(plan=plan))
    assert result.resized == 3  # up.weight, up.bias, down.weight


def test_a_pipeline_prints_itself() -> None:
    passes: tuple[Pass, ...] = (PropagateAxes(), FindGroups(align=16, freeze=("a", "b")), Look(wide=True, data=[1]))
    assert str(Pipeline(passes)) == "propagate-axes,find-groups{align=16,freeze=[a b]},look{wide=true}"


def test_pipelines_nest() -> None:
    inner = Pipeline((PropagateAxes(),))
    assert Pipeline((inner,)).run(program()).axes is not None


def test_the_callback_sees_every_pass_before_it_runs() -> None:
    seen: list[str] = []
    Pipeline((PropagateAxes(), FindGroups()), on_pass=lambda p, _: seen.append(p.slug())).run(program())
    assert seen == ["propagate-axes", "find-groups"]


def test_the_caller_keeps_his_program() -> None:
    given = program()
    text = str(given.graph)
    Pipeline((Clean(), PropagateAxes(), FindGroups())).run(given)
    assert str(given.graph) == text
    assert given.axes is None


# ---------------------------------------------------------------- verify


def test_a_wrong_shape_is_caught() -> None:
    given = program()
    state = {**given.exported.state_dict, "up.weight": nn.Parameter(torch.zeros(31, 8))}
    broken = given.but(exported=rebuild(given.exported, copy_graph(given.exported), state_dict=state))
    with pytest.raises(InternalError, match=r"up.weight has shape \(31, 8\), the graph says \(32, 8\)"):
        verify(broken)


def test_groups_must_fit_their_tensors() -> None:
    facts = analysed("gated_ffn")
    group: PruneGroup = next(g for g in facts.need("groups") if g.prunable)
    slot = replace(group.slots[0], position=7)
    with pytest.raises(InternalError, match="which is not there"):
        verify(facts.but(groups=(group.but(slots=(slot,)),)), graph_changed=False)
    with pytest.raises(InternalError, match="share a name"):
        verify(facts.but(groups=(group, group)), graph_changed=False)


def test_scores_must_fit_their_group() -> None:
    facts = analysed("gated_ffn")
    group = next(g for g in facts.need("groups") if g.prunable)
    wrong = {group.name: ImportanceScores(group.name, torch.ones(group.size + 1), "l2", "weight norm")}
    with pytest.raises(InternalError, match="do not fit"):
        verify(facts.but(scores=wrong), graph_changed=False)


@pytest.mark.parametrize("values", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, float("nan")]), torch.ones(2, 2)])
def test_scores_are_finite_non_negative_vectors(values: Tensor) -> None:
    with pytest.raises(InternalError):
        ImportanceScores("a:ffn", values, "l2", "weight norm")
