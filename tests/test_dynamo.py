"""``torch.compile(model, backend="fxprune")``: real names, one plan, nothing scored twice, the model left as it was."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import dynamo, dynamo_session
from fxprune.demo import Digits, DigitsViT
from fxprune.dynamo_graph import qualified_name
from fxprune.errors import BudgetInfeasible, LoadError, NothingToPrune, OptionError, PlanError
from fxprune.events import FxpruneWarning

EAGER: dict[str, Any] = {"inner": "eager"}
L2: dict[str, Any] = {"flops": 0.5, "importance": "l2", **EAGER}
pytestmark = pytest.mark.filterwarnings("ignore:no data was given")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mlp(nn.Module):
    """Buffers, a plain tensor attribute, and an output that reads both. [batch, 8] -> [batch, 4]"""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.shift = torch.tensor([0.5, 0.0, -0.5, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale + self.shift


class Plain(nn.Module):
    """Nothing that reads the training flag. [batch, 8] -> [batch, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tied(nn.Module):
    """Ids to logits with the embedding as classifier. [batch, n] -> [batch, n, 20]"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.ffn = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.ffn(x))


class Broken(nn.Module):
    """Two feed-forward parts with a graph break between them, inside a submodule's frame. [batch, 8] -> [batch, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.first = Breaking()
        self.second = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.across = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.across[0](x + self.ffn(x))
        torch._dynamo.graph_break()
        return self.across[1](x)


def run(model: nn.Module, *args: Any, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """(compiled model, output of its first call), without gradients."""
    compiled = torch.compile(model, backend="fxprune", options=options, **more)
    with torch.no_grad():
        return compiled, compiled(*args)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_the_backend_is_registered_under_its_name() -> None:
    assert "fxprune" in torch._dynamo.list_backends()


def test_every_size_runs_by_one_plan_and_one_set_of_weights(trained: DigitsViT, digit_data: Digits) -> None:
    before = copy.deepcopy(trained.state_dict())
    scored: list[int] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        scored.append(1)
        for part in torch.arange(64).split(24):
            yield digit_data.train_images[part], digit_data.train_labels[part]

    class Loader:
        __iter__ = staticmethod(loader)

    images = digit_data.test_images
    compiled, _ = run(trained, images[:16], options={"flops": 0.5, "data": Loader(), **EAGER})
    plan = dynamo.plan_of(compiled)
    outputs = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is made again
        for batch in (16, 5, 33, 1, 16):
            outputs[batch] = compiled(images[:batch])
    assert scored == [1]
    assert dynamo.plan_of(compiled).choices == plan.choices
    first, *others = dynamo.report_of(compiled)
    assert (first["status"], first["reused"], first["open"]) == ("pruned", False, [[]])
    assert others
    assert all(r["status"] == "pruned" and r["reused"] for r in others)
    for report in (first, *others):
        assert report["cost"]["ratio"]["flops"] <= 0.5
    close(outputs[16][:5], outputs[5])  # the recovered weights came along as well
    close(outputs[33][:16], outputs[16])
    close(outputs[16][:1], outputs[1])
    with torch.no_grad():
        assert not torch.allclose(outputs[16], trained(images[:16]), atol=1e-3)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad for p in trained.parameters())


def test_a_given_plan_is_applied_under_the_names_that_fxprune_plan_gives(trained: DigitsViT, tmp_path: Path) -> None:
    x, path = torch.randn(6, 1, 8, 8), tmp_path / "plan.json"
    plan = fxprune.plan(trained, x, flops=0.5, out=path).need("plan")
    want = fxprune.compile(trained, x, plan=plan).module
    for given in (plan, path):
        torch._dynamo.reset()
        compiled, got = run(trained, x, options={"plan": given, **EAGER})
        with torch.no_grad():
            assert torch.equal(got, want(x))
            assert torch.equal(compiled(x[:3]), want(x[:3]))
        assert dynamo.plan_of(compiled).choices == plan.choices


def test_a_plan_made_here_applies_elsewhere(trained: DigitsViT) -> None:
    x = torch.randn(4, 1, 8, 8)
    compiled, got = run(trained, x, options=dict(L2))
    plan = fxprune.CompressionPlan.from_json(dynamo.plan_of(compiled).to_json())
    assert plan.choices == fxprune.plan(trained, x, flops=0.5, importance="l2").need("plan").choices
    with torch.no_grad():
        assert torch.equal(fxprune.apply(trained, plan, x).module(x), got)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own imports
def test_inductor_is_the_default_and_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 8)
    assert dynamo.Options.of({"flops": 0.5}).inner == "inductor"
    compiled, got = run(model, x, options={"flops": 0.5, "importance": "l2"}, dynamic=True)
    with torch.no_grad():
        want = fxprune.apply(model, dynamo.plan_of(compiled), x).module
        close(got, want(x))
        close(compiled(torch.ones(7, 8)), want(torch.ones(7, 8)))
    assert len(dynamo.report_of(compiled)) == 1  # an open graph serves every batch


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_buffers_and_plain_tensors_are_the_models_own(inner: str) -> None:
    model = Mlp().eval()
    with torch.no_grad():
        model.body[1].running_mean.normal_()
        model.body[1].running_var.uniform_(0.5, 1.5)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
    compiled, got = run(model, x, options={**L2, "inner": inner})
    want = fxprune.compile(model, x, plan=dynamo.plan_of(compiled)).module
    with torch.no_grad():
        close(got, want(x))
        close(compiled(torch.ones(9, 8)), want(torch.ones(9, 8)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(model(x), got)  # the model itself still computes what it did


def test_tied_parameters_stay_tied_and_sequences_stay_open() -> None:
    model, ids = Tied().eval(), torch.randint(0, 20, (3, 6))
    compiled, got = run(model, ids, options=dict(L2), dynamic=True)
    want = fxprune.compile(model, ids, plan=dynamo.plan_of(compiled)).module
    other = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        assert torch.equal(got, want(ids))
        close(compiled(other), want(other))
    assert dynamo.report_of(compiled)[0]["open"] == [[0, 1]]


def test_each_part_of_a_broken_model_is_pruned_or_reported() -> None:
    model, x = Broken().eval(), torch.randn(4, 8)
    data = [torch.randn(16, 8) for _ in range(2)]
    compiled = torch.compile(model, backend="fxprune", options={"flops": 0.6, "data": data, "recover": "none",
                                                                **EAGER})
    with torch.no_grad(), pytest.warns(FxpruneWarning) as told:
        got = compiled(x)
    text = "\n".join(str(w.message) for w in told)
    assert "lies behind a graph break" in text
    reports = dynamo.report_of(compiled)
    assert [r["status"] for r in reports].count("pruned") == 2
    whole = [r for r in reports if r["status"] == "whole"]
    assert whole
    assert all(r["why"] and r["why"] in text for r in whole)
    plan = dynamo.plan_of(compiled)
    assert set(plan.choices) == {"first.ffn.0:ffn", "second.0:ffn"}  # as the whole model calls them
    with torch.no_grad():
        close(got, fxprune.apply(model, plan, x).module(x))
        close(compiled(torch.ones(7, 8)), fxprune.apply(model, plan, x).module(torch.ones(7, 8)))


def test_a_plan_of_the_whole_model_reaches_every_part_and_says_what_a_break_keeps() -> None:
    model, x = Broken().eval(), torch.randn(4, 8)
    plan = fxprune.plan(model, x, flops=0.5, importance="l2").need("plan")
    assert len(plan.choices["first.across.0:ffn"].keep) < 16
    compiled = torch.compile(model, backend="fxprune", options={"plan": plan, **EAGER})
    with torch.no_grad(), pytest.warns(FxpruneWarning, match="first.across.0:ffn.*stays whole") as told:
        got = compiled(x)
    assert told
    left = {n: c for n, c in plan.choices.items() if n != "first.across.0:ffn"}
    with torch.no_grad():
        close(got, fxprune.apply(model, fxprune.CompressionPlan(left), x).module(x))


def test_a_function_is_named_from_dynamos_sources() -> None:
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 8)
    compiled = torch.compile(lambda v: model(v) + 1, backend="fxprune", options=dict(L2))
    with torch.no_grad():
        got = compiled(x)
    plan = fxprune.plan(model, x, flops=0.5, importance="l2").need("plan")
    with torch.no_grad():
        close(got, fxprune.apply(model, plan, x).module(x) + 1)
    assert qualified_name("L['self']._modules['a']._modules['0']._buffers['mean']") == "a.0.mean"


def test_a_model_compiled_in_place_is_known_as_well() -> None:
    model, x = Plain(), torch.randn(4, 8)
    plan = fxprune.plan(model, x, flops=0.5, importance="l2").need("plan")
    want = fxprune.apply(model, plan, x).module
    model.compile(backend="fxprune", options=dict(L2))
    with torch.no_grad(), pytest.raises(OptionError, match="training mode"):
        model(x)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), want(x))
    assert dynamo.plan_of(model).choices == plan.choices


def test_given_data_it_decides_and_recovers_as_fxprune_compile_does() -> None:
    model, x = Tied().eval(), torch.randint(0, 20, (4, 6))
    data = [torch.randint(0, 20, (16, 6)) for _ in range(3)]
    compiled, got = run(model, x, options={"flops": 0.6, "data": data, "recover": "ridge", **EAGER}, dynamic=True)
    whole = fxprune.compile(model, x, flops=0.6, data=data, recover="ridge")
    assert dynamo.plan_of(compiled).choices == whole.plan.choices
    with torch.no_grad():
        torch.testing.assert_close(got, whole.module(x), rtol=1e-5, atol=1e-5)


def test_what_was_decided_is_forgotten_with_the_model() -> None:
    model = Mlp().eval()
    run(model, torch.randn(4, 8), options=dict(L2))
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    kept, _ = run(Mlp().eval(), torch.randn(4, 8), options=dict(L2))
    assert [s.root() for s in dynamo_session._sessions] == [kept._orig_mod]


def test_the_first_call_calibrates_on_its_own_inputs_and_says_so() -> None:
    model = Mlp().eval()
    with pytest.warns(FxpruneWarning, match="scored on the 6 samples of the first call"):
        compiled, _ = run(model, torch.randn(6, 8), options={"flops": 0.5, **EAGER})
    assert dynamo.plan_of(compiled).about["data"] == "the inputs of the first call"


def test_data_of_other_sizes_than_a_fixed_graph_are_refused_or_told() -> None:
    model, data = Tied().eval(), [torch.randint(0, 20, (8, 11))]
    with pytest.warns(FxpruneWarning, match="dynamic=True"):
        run(model, torch.randint(0, 20, (3, 6)), options={"flops": 0.5, "data": data, "recover": "none", **EAGER})
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, torch.randint(0, 20, (3, 6)), dynamic=True,
            options={"flops": 0.5, "data": data, "recover": "none", **EAGER})
    with pytest.raises(LoadError, match="wrong shape"):
        run(Mlp().eval(), torch.randn(3, 8), options={"flops": 0.5, "data": [torch.randn(4, 9)], **EAGER})


# ------------------------------------------------------------ what is refused


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
        close(got, fxprune.apply(model, dynamo.plan_of(fresh), x).module(x))


class Branching(nn.Module):
    """One graph per flag: with another head, or with the features that the feed-forward part works on."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.more = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, more: bool = False, features: bool = False) -> Any:
        if features:
            return self.one[1](self.one[0](x))
        y = self.one(x)
        return self.more(y) if more else y


def test_another_branch_keeps_the_plan_and_decides_nothing_again() -> None:
    model, x = Branching().eval(), torch.randn(4, 8)
    compiled, got = run(model, x, options=dict(L2))
    plan = dynamo.plan_of(compiled)
    assert set(plan.choices) == {"one.0:ffn"}
    with torch.no_grad():
        close(compiled(x, more=True), model.more(got))  # what was not decided at first stays whole
        with pytest.warns(FxpruneWarning, match="'one.0:ffn' stays whole"):
            close(compiled(x, features=True), model(x, features=True))
    assert dynamo.plan_of(compiled).choices == plan.choices
    assert [(r["status"], r["reused"]) for r in dynamo.report_of(compiled)] == [
        ("pruned", False), ("pruned", True), ("whole", True)]


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
            assert torch.equal(got, fxprune.apply(model, dynamo.plan_of(compiled), x).module(x))
            assert torch.equal(compiled(x), got)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.ffn(x) + self.calls


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
    "another architecture": ({"plan": fxprune.CompressionPlan(
        {"elsewhere.0:ffn": fxprune.Choice("ffn", 8, (1, 2))})}, PlanError, "does not have"),
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
        dynamo.plan_of(Mlp())
