"""What the torch.compile backend does not do, and how it says so: training, gradients, writes, changed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.dynamo_models import EAGER, L2, Branching, Counting, Mlp, close, run
from support.dynamo_models import _fresh as _fresh
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.dynamo import part
from fxprune.dynamo.graph import trains
from fxprune.errors import BudgetInfeasible, NothingToPrune, OptionError, PlanError
from fxprune.process.events import FxpruneWarning

pytestmark = pytest.mark.filterwarnings("ignore:no data was given")


def test_training_mode_is_refused_or_passes_through() -> None:
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)), torch.randn(4, 8)
    compiled = torch.compile(model, backend="fxprune", options=dict(L2))
    with pytest.raises(OptionError, match=r"training mode[\s\S]*model.eval\(\) first"):
        compiled(x)
    model.eval()
    with torch.no_grad():
        small = compiled(x)
    model.train()
    with pytest.raises(OptionError, match="training mode"):
        compiled(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), small)
    both = torch.compile(model, backend="fxprune", options={**L2, "fallback": True})
    model.train()
    with pytest.warns(FxpruneWarning, match="dense model runs: .*training mode"):
        both(x).square().mean().backward()
    assert model[0].weight.grad is not None


def test_a_plain_model_switched_to_training_after_the_first_call_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 8)
    compiled, _ = run(model, x, options=dict(L2))
    model.train()  # nothing in it reads the flag, so dynamo does not compile again
    with torch.no_grad(), pytest.raises(OptionError, match="training mode"):
        compiled(x)


def test_inputs_that_require_gradients_are_refused_or_pass_through() -> None:
    model, x = Mlp().eval(), torch.randn(4, 8, requires_grad=True)
    compiled = torch.compile(model, backend="fxprune", options=dict(L2))
    with pytest.raises(OptionError, match=r"no gradients[\s\S]*torch.no_grad\(\)"):
        compiled(x)
    with torch.no_grad():
        assert not compiled(x).requires_grad
    both = torch.compile(model, backend="fxprune", options={**L2, "fallback": True})
    with pytest.warns(FxpruneWarning, match="dense model runs"):
        both(x).sum().backward()
    assert x.grad is not None


def test_gradients_switched_on_without_being_asked_for_are_no_error() -> None:
    model, x = Mlp().eval(), torch.randn(4, 8)
    compiled = torch.compile(model, backend="fxprune", options=dict(L2))
    assert not compiled(x).requires_grad
    with torch.inference_mode():
        close(compiled(torch.ones(4, 8)), compiled(torch.ones(4, 8)))


def test_changed_weights_are_noticed() -> None:
    model, x = Mlp().eval(), torch.randn(4, 8)
    compiled, _ = run(model, x, options=dict(L2))
    with torch.no_grad():
        model.body[0].weight.mul_(2)
        with pytest.raises(OptionError, match=r"weights of the model changed[\s\S]*torch.compile again"):
            compiled(x)
    torch._dynamo.reset()
    fresh, got = run(model, x, options=dict(L2))
    with torch.no_grad():
        close(got, fxprune.apply(model, part.plan_of(fresh), x).module(x))


def test_another_branch_keeps_the_plan_and_decides_nothing_again() -> None:
    model, x = Branching().eval(), torch.randn(4, 8)
    compiled, got = run(model, x, options=dict(L2))
    plan = part.plan_of(compiled)
    assert set(plan.choices) == {"one.0:ffn"}
    with torch.no_grad():
        close(compiled(x, more=True), model.more(got))  # what was not decided at first stays whole
        with pytest.warns(FxpruneWarning, match="'one.0:ffn' stays whole"):
            close(compiled(x, features=True), model(x, features=True))
    assert part.plan_of(compiled).choices == plan.choices
    assert [(r["status"], r["reused"]) for r in part.report_of(compiled)] == [
        ("pruned", False),
        ("pruned", True),
        ("whole", True),
    ]


def test_a_branch_that_needs_whole_what_recovery_presumed_cut_stays_dense() -> None:
    model, x = Branching().eval(), torch.randn(4, 8)
    options = {"flops": 0.5, "data": [torch.randn(32, 8)], "recover": "ridge", **EAGER}
    compiled, _ = run(model, x, options=options)
    with torch.no_grad(), pytest.warns(FxpruneWarning, match="needs whole what the plan cuts"):
        close(compiled(x, features=True), model(x, features=True))


def test_two_models_of_one_class_and_one_options_dict_are_two() -> None:
    one, two, x = Mlp().eval(), Mlp().eval(), torch.randn(4, 8)
    options = dict(L2)
    (first, a), (second, b) = run(one, x, options=options), run(two, x, options=options)
    for model, compiled, got in ((one, first, a), (two, second, b)):
        with torch.no_grad():
            assert torch.equal(got, fxprune.apply(model, part.plan_of(compiled), x).module(x))
            assert torch.equal(compiled(x), got)


def test_a_model_that_writes_to_its_buffers_is_refused_or_passes_through() -> None:
    model, x = Counting().eval(), torch.randn(4, 8)
    compiled = torch.compile(model, backend="fxprune", options=dict(L2))
    with torch.no_grad(), pytest.raises(NothingToPrune, match="calls"):
        compiled(x)
    both = torch.compile(model, backend="fxprune", options={**L2, "fallback": True})
    for _ in range(2):
        with torch.no_grad(), pytest.warns(FxpruneWarning, match="dense model runs"):
            both(x)
    assert int(model.calls) == 2


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown option": ({"flop": 0.5}, OptionError, "did you mean 'flops'"),
    "no budget": ({}, OptionError, "exactly one budget"),
    "two budgets": ({"flops": 0.5, "params": 0.5}, OptionError, "exactly one budget"),
    "plan and budget": ({"flops": 0.5, "plan": fxprune.CompressionPlan()}, OptionError, "not both"),
    "unknown inner": ({"flops": 0.5, "inner": "inducto"}, OptionError, "did you mean 'inductor'"),
    "unknown criterion": ({"flops": 0.5, "importance": "l3"}, OptionError, "unknown criterion"),
    "out of reach": ({"flops": 1e-6, "importance": "l2"}, BudgetInfeasible, "reach"),
    "another architecture": (
        {"plan": fxprune.CompressionPlan({"elsewhere.0:ffn": fxprune.Choice("ffn", 8, (1, 2))})},
        PlanError,
        "does not have",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_of_fxprune(name: str) -> None:
    options, kind, says = WRONG[name]
    compiled = torch.compile(Mlp().eval(), backend="fxprune", options=options)
    with torch.no_grad(), pytest.raises(kind, match=says):
        compiled(torch.randn(4, 8))


def test_nothing_to_prune_is_an_error_and_never_a_silent_copy() -> None:
    with pytest.raises(NothingToPrune):
        run(nn.Linear(8, 8).eval(), torch.randn(4, 8), options=dict(L2))
    with pytest.raises(OptionError, match="no mode"):
        run(Mlp().eval(), torch.randn(4, 8), options=None, mode="max-autotune")
    with pytest.raises(OptionError, match="was not compiled"):
        part.plan_of(Mlp())


class Calls(nn.Module):
    """One function of torch, told by its module's mode."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.training)


@pytest.mark.parametrize(
    ("model", "in_training", "in_evaluation"),
    [
        (nn.BatchNorm1d(8), True, False),
        (nn.InstanceNorm1d(8), False, False),  # the same in both
        (nn.InstanceNorm1d(8, track_running_stats=True), True, False),
        (nn.Dropout(0.5), True, False),
        (nn.RReLU(), True, False),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), True, False),
        (Calls(lambda x, training: nn.functional.dropout(x)), True, True),  # draws by default, whatever the mode
        (Calls(lambda x, training: torch.dropout(x, 0.5, training)), True, False),
        (
            Calls(lambda x, training: nn.functional.scaled_dot_product_attention(x, x, x, None, 0.1 * training)),
            True,
            False,
        ),
    ],
)
def test_training_form_is_read_from_signatures_by_name(
    model: nn.Module, in_training: bool, in_evaluation: bool
) -> None:
    for mode, expected in ((True, in_training), (False, in_evaluation)):
        found: list[str] = []

        def listen(gm: GraphModule, inputs: Any, found: list[str] = found) -> GraphModule:
            found.append(trains(gm))
            return gm

        torch._dynamo.reset()
        torch.compile(model.train(mode), backend=listen)(torch.randn(4, 8, 16))
        assert len(found) == 1
        assert bool(found[0]) == expected


def test_multi_head_attention_in_evaluation_form_is_pruned() -> None:
    class Block(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(y)

    options = {"flops": 0.6, "data": [torch.randn(8, 16, 32)], "inner": "eager"}
    compiled = torch.compile(Block().eval(), backend="fxprune", options=options)
    with torch.no_grad():
        assert compiled(torch.randn(8, 16, 32)).shape == (8, 16, 32)
        assert compiled(torch.randn(20, 16, 32)).shape == (20, 16, 32)
