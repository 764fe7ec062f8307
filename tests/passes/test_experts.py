"""Experts of a mixture: one group per layer, cut as if those that are gone were never chosen."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import laws
from support.moe_models import FROZEN, MIXTURES, mixture
from torch import Tensor, nn

import fxprune
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.distance import Measure
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.reap import Reap
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.testing import relative_error, run_flat

QUIET: dict[str, Any] = {"on_event": lambda _: None}
WORDS = 60


def tokens(count: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def analysed(family: str) -> Program:
    return laws.analysed_of(mixture(family), (tokens(),))


def experts_of(program: Program) -> list[PruneGroup]:
    return [g for g in program.need("groups") if g.kind == Kind.EXPERT]


@pytest.mark.drawn(2)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_layer_has_one_group_of_all_that_an_expert_is(family: str) -> None:
    program = analysed(family)
    groups = experts_of(program)
    assert [g.name for g in groups] == [f"model.layers.{i}.mlp.experts:expert" for i in range(2)]
    for group in groups:
        assert (group.size, group.floor, group.granularity, group.frozen) == (4, 2, 1, "")
        of_four = {
            name
            for name, tensor in program.tensors.items()
            if name.startswith(group.name.partition(".mlp.")[0] + ".mlp.") and 4 in tensor.shape
        }
        assert {s.parameter for s in group.slots} == of_four, "router rows, biases and the weights of every product"


@pytest.mark.drawn(2)
@pytest.mark.parametrize("kinds", [(Kind.EXPERT,), (Kind.EXPERT, Kind.FFN, Kind.KV, Kind.HEAD)])
@pytest.mark.parametrize("family", MIXTURES)
def test_sliced_is_dense_with_what_went_at_minus_infinity(family: str, kinds: tuple[Kind, ...]) -> None:
    """At two batch sizes and lengths; the plan says the same as JSON."""
    program = analysed(family)
    plan = CompressionPlan.from_json(laws.random_plan(program, kinds, 0.5, seed=1).to_json())
    result = laws.sliced(program, plan)
    laws.sliced_equals_masked(program, plan, result)
    laws.saving_keeps_the_output(result)
    again = Pipeline((PropagateAxes(), FindGroups())).run(result)
    assert [g.size for g in experts_of(again)] == [2, 2]


def test_an_expert_that_nobody_is_sent_to_may_go() -> None:
    """And one that is, sends its rows to the next best."""
    model = mixture("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[1] = 0
        model.model.layers[0].mlp.gate.weight[2:] *= torch.tensor([[9.0], [-9.0]])
        model.model.layers[0].mlp.gate.weight[3] = model.model.layers[0].mlp.gate.weight[2] * -1
    program = laws.analysed_of(model, (tokens(),))
    name, x = experts_of(program)[0].name, tokens(4, 9)
    scores = Reap().scores(program, Calibration((Batch((x,)),), "x"), 0)[name]
    for gone in range(4):
        keep = tuple(i for i in range(4) if i != gone)
        result = laws.sliced(program, CompressionPlan({name: Choice("expert", 4, keep)}))
        same = relative_error(run_flat(result, [x]), run_flat(program, [x])) < 1e-5
        assert same == bool(scores[gone] == 0)


def test_relabelling_experts_changes_nothing() -> None:
    model, moved, order = mixture("mixtral"), mixture("mixtral"), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in moved.model.layers:
            layer.mlp.gate.weight.copy_(layer.mlp.gate.weight[order])
            for table in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                table.copy_(table[order])
    got = []
    for one in (model, moved):
        program = laws.analysed_of(one, (tokens(),))
        data = Calibration((Batch((tokens(6, 9),)),), "x")
        found = Reap().scores(program, data, 0)
        removals = Removals(program, data.batches, Measure(), 2**28)
        exact = removals("x", {g: torch.arange(4) for g in experts_of(program)})
        got.append({g.name: (found[g.name], exact[1][g.name]) for g in experts_of(program)})
    for name, first in got[0].items():
        for a, b in zip(first, got[1][name], strict=True):
            assert a.max() > 0
            torch.testing.assert_close(a[order], b, rtol=1e-3, atol=1e-6)


def test_reap_is_the_mean_length_of_what_an_expert_adds() -> None:
    model, x = mixture("mixtral"), tokens(3, 9)
    block, seen = model.model.layers[1].mlp, list[Tensor]()
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(x)
    handle.remove()
    rows, block = seen[0], block.requires_grad_(False)
    weights, chosen = (rows @ block.gate.weight.T).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    want = []
    for j in range(4):
        gate, up = (rows @ block.experts.gate_up_proj[j].T).chunk(2, -1)
        length = (nn.functional.silu(gate) * up @ block.experts.down_proj[j].T).norm(dim=-1)
        sent = chosen == j
        want.append(float((weights * length[:, None])[sent].mean()) if sent.any() else 0.0)
    program = laws.analysed_of(model, (tokens(),))
    found = Reap().scores(program, Calibration((Batch((x,)),), "x"), 0)["model.layers.1.mlp.experts:expert"]
    assert found.tolist() == pytest.approx(want, rel=1e-4)
    assert Reap(samples=2).scores(program, Calibration((Batch((x,)),), "x"), 0).keys() == {
        g.name for g in experts_of(program)
    }


@pytest.mark.drawn(1)
@pytest.mark.parametrize("importance", ["l2", "reap", "trajectory{samples=8,check=4}"])
def test_compiled_and_replayed(importance: str, tmp_path: Path) -> None:
    x = tokens(16, 9)
    options = {"data": x, "recover": "none", **QUIET}
    made = fxprune.compile(
        mixture("mixtral"), x[:2], params=0.75, prune="experts", importance=importance, out=tmp_path / "a", **options
    )
    assert {c.kind for c in made.plan.elements.values()} == {"expert"}
    assert made.report["cost"]["ratio"]["params"] <= 0.75
    assert made.report["masked"]["max_rel"] <= made.report["masked"]["tolerance"]
    again = fxprune.compile(mixture("mixtral"), x[:2], pipeline=made.report["pipeline"], data=x, **QUIET)
    assert again.plan.choices == made.plan.choices
    applied = fxprune.apply(mixture("mixtral"), tmp_path / "a" / "plan.json", x[:2], **QUIET)
    torch.testing.assert_close(applied.module(x), made.module(x), rtol=1e-4, atol=1e-5)


def test_experts_and_neurons_on_one_ledger_in_onnx(tmp_path: Path) -> None:
    x = tokens(16, 9)
    importance = "trajectory{samples=8,check=4}"
    made = fxprune.compile(
        mixture("qwen3-moe"),
        x[:2],
        params=0.7,
        prune="experts,ffn",
        importance=importance,
        data=x,
        target="onnx",
        out=tmp_path / "a",
        **QUIET,
    )
    assert made.report["cost"]["ratio"]["params"] <= 0.7
    assert made.report["parity"]["max_rel"] <= 1e-3


@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_criteria_that_only_mask_say_nothing_of_experts(criterion: str) -> None:
    x = tokens(8, 9)
    with pytest.raises(OptionError, match="says nothing of groups of kind 'expert'"):
        fxprune.compile(mixture("mixtral"), x[:2], params=0.8, prune="experts", importance=criterion, data=x, **QUIET)
    with pytest.raises(OptionError, match="'reap' scores expert alone"):
        fxprune.compile(mixture("mixtral"), x[:2], params=0.8, importance="reap", data=x, **QUIET)


def test_fewer_than_are_chosen_at_once_cannot_stay() -> None:
    program = analysed("mixtral")
    group = experts_of(program)[0]
    assert group.levels() == [2, 3, 4]
    assert group.lowest().levels() == [2, 3, 4]


@pytest.mark.parametrize(("family", "why"), FROZEN.items())
def test_a_choice_in_groups_is_left_alone(family: str, why: str) -> None:
    assert {g.frozen for g in experts_of(analysed(family))} == {why}


def test_layers_with_experts_go_entirely() -> None:
    for kind in (Kind.ATTENTION, Kind.MLP, Kind.LAYER):
        laws.layers_go_entirely(analysed("qwen2-moe"), kind)
