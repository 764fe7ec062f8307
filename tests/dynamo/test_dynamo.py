"""``torch.compile(model, backend="fxprune")``: real names, one plan, nothing scored twice, the model left as it was."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.dynamo_models import EAGER, L2, Broken, Mlp, Plain, Tied, close, run
from support.dynamo_models import _fresh as _fresh
from torch import Tensor, nn

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.dynamo import part, session
from fxprune.dynamo.graph import qualify_name
from fxprune.errors import LoadError, OptionError
from fxprune.process.events import FxpruneWarning

pytestmark = pytest.mark.filterwarnings("ignore:no data was given")


def test_the_backend_is_registered_under_its_name() -> None:
    assert "fxprune" in torch._dynamo.list_backends()


def test_every_size_runs_by_one_plan_and_one_set_of_weights(trained: DigitsViT, digit_data: Digits) -> None:
    before = copy.deepcopy(trained.state_dict())
    scored: list[int] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        scored.append(1)
        for rows in torch.arange(64).split(24):
            yield digit_data.train_images[rows], digit_data.train_labels[rows]

    class Loader:
        __iter__ = staticmethod(loader)

    images = digit_data.test_images
    compiled, _ = run(trained, images[:16], options={"flops": 0.5, "data": Loader(), **EAGER})
    plan = part.plan_of(compiled)
    outputs = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is made again
        for batch in (16, 5, 33, 1, 16):
            outputs[batch] = compiled(images[:batch])
    assert scored == [1]
    assert part.plan_of(compiled).choices == plan.choices
    first, *others = part.report_of(compiled)
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
        assert part.plan_of(compiled).choices == plan.choices


def test_a_plan_made_here_applies_elsewhere(trained: DigitsViT) -> None:
    x = torch.randn(4, 1, 8, 8)
    compiled, got = run(trained, x, options=dict(L2))
    plan = fxprune.CompressionPlan.from_json(part.plan_of(compiled).to_json())
    assert plan.choices == fxprune.plan(trained, x, flops=0.5, importance="l2").need("plan").choices
    with torch.no_grad():
        assert torch.equal(fxprune.apply(trained, plan, x).module(x), got)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own imports
def test_inductor_is_the_default_and_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 8)
    assert part.Options.of({"flops": 0.5}).inner == "inductor"
    compiled, got = run(model, x, options={"flops": 0.5, "importance": "l2"}, dynamic=True)
    with torch.no_grad():
        want = fxprune.apply(model, part.plan_of(compiled), x).module
        close(got, want(x))
        close(compiled(torch.ones(7, 8)), want(torch.ones(7, 8)))
    assert len(part.report_of(compiled)) == 1  # an open graph serves every batch


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_buffers_and_plain_tensors_are_the_models_own(inner: str) -> None:
    model = Mlp().eval()
    with torch.no_grad():
        model.body[1].running_mean.normal_()
        model.body[1].running_var.uniform_(0.5, 1.5)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(4, 8)
    compiled, got = run(model, x, options={**L2, "inner": inner})
    want = fxprune.compile(model, x, plan=part.plan_of(compiled)).module
    with torch.no_grad():
        close(got, want(x))
        close(compiled(torch.ones(9, 8)), want(torch.ones(9, 8)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(model(x), got)  # the model itself still computes what it did


def test_tied_parameters_stay_tied_and_sequences_stay_open() -> None:
    model, ids = Tied().eval(), torch.randint(0, 20, (3, 6))
    compiled, got = run(model, ids, options=dict(L2), dynamic=True)
    want = fxprune.compile(model, ids, plan=part.plan_of(compiled)).module
    other = torch.randint(0, 20, (2, 9))
    with torch.no_grad():
        assert torch.equal(got, want(ids))
        close(compiled(other), want(other))
    assert part.report_of(compiled)[0]["open"] == [[0, 1]]


def test_each_part_of_a_broken_model_is_pruned_or_reported() -> None:
    model, x = Broken().eval(), torch.randn(4, 8)
    data = [torch.randn(16, 8) for _ in range(2)]
    compiled = torch.compile(model, backend="fxprune", options={"flops": 0.6, "data": data, "recover": "none", **EAGER})
    with torch.no_grad(), pytest.warns(FxpruneWarning) as told:
        got = compiled(x)
    text = "\n".join(str(w.message) for w in told)
    assert "lies behind a graph break" in text
    reports = part.report_of(compiled)
    assert [r["status"] for r in reports].count("pruned") == 2
    whole = [r for r in reports if r["status"] == "whole"]
    assert whole
    assert all(r["why"] and r["why"] in text for r in whole)
    plan = part.plan_of(compiled)
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
    assert qualify_name("L['self']._modules['a']._modules['0']._buffers['mean']") == "a.0.mean"


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
    assert part.plan_of(model).choices == plan.choices


def test_given_data_it_decides_and_recovers_as_fxprune_compile_does() -> None:
    model, x = Tied().eval(), torch.randint(0, 20, (4, 6))
    data = [torch.randint(0, 20, (16, 6)) for _ in range(3)]
    compiled, got = run(model, x, options={"flops": 0.6, "data": data, "recover": "ridge", **EAGER}, dynamic=True)
    whole = fxprune.compile(model, x, flops=0.6, data=data, recover="ridge")
    assert part.plan_of(compiled).choices == whole.plan.choices
    with torch.no_grad():
        torch.testing.assert_close(got, whole.module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_forgotten")
def test_what_was_decided_is_forgotten_with_the_model() -> None:
    model = Mlp().eval()
    run(model, torch.randn(4, 8), options=dict(L2))
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    kept, _ = run(Mlp().eval(), torch.randn(4, 8), options=dict(L2))
    assert [s.root() for s in session._sessions] == [kept._orig_mod]


def test_the_first_call_calibrates_on_its_own_inputs_and_says_so() -> None:
    model = Mlp().eval()
    with pytest.warns(FxpruneWarning, match="scored on the 6 samples of the first call"):
        compiled, _ = run(model, torch.randn(6, 8), options={"flops": 0.5, **EAGER})
    assert part.plan_of(compiled).about["data"] == "the inputs of the first call"


def test_data_of_other_sizes_than_a_fixed_graph_are_refused_or_told() -> None:
    model, data = Tied().eval(), [torch.randint(0, 20, (8, 11))]
    with pytest.warns(FxpruneWarning, match="dynamic=True"):
        run(model, torch.randint(0, 20, (3, 6)), options={"flops": 0.5, "data": data, "recover": "none", **EAGER})
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(
            model,
            torch.randint(0, 20, (3, 6)),
            dynamic=True,
            options={"flops": 0.5, "data": data, "recover": "none", **EAGER},
        )
    with pytest.raises(LoadError, match="wrong shape"):
        run(Mlp().eval(), torch.randn(3, 8), options={"flops": 0.5, "data": [torch.randn(4, 9)], **EAGER})
