"""The caller's module, containers and tensors are bit for bit what they were, whatever was called with them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import first_calls
from support.fingerprints import fingerprint
from torch import Tensor, nn

import fxprune
from fxprune.errors import CaptureError
from fxprune.intake.capture import capture
from fxprune.intake.untouched import untouched

CALLS: dict[str, Callable[..., Any]] = {
    "inspect": fxprune.inspect,
    "plan": lambda model, x: fxprune.plan(model, x, flops=0.7, seed=1),
    "compile": lambda model, x: fxprune.compile(model, x, flops=0.7),
    "compile with data": lambda model, x: fxprune.compile(model, x, flops=0.7, data=[x] * 2, importance="taylor"),
}


@pytest.mark.drawn(18)
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("place", first_calls.PLACES, ids=lambda c: c.__name__)
def test_what_a_module_keeps_at_its_first_call_is_not_kept_for_it(
    place: type[first_calls.KeepsATable], call: str
) -> None:
    model, x = place(), torch.randn(3, first_calls.WIDTH)
    model.b.eval()  # flags are put back one by one
    before = fingerprint(model, x, first_calls.TABLES, first_calls.TABLE, vars(place).get("kept"))
    CALLS[call](model, x)
    assert fingerprint(model, x, first_calls.TABLES, first_calls.TABLE, vars(place).get("kept")) == before
    result = model(x.clone())
    assert type(result) is Tensor, "no fake tensor stays behind in a cache that has no name here"
    assert result.isfinite().all()


def test_a_forward_that_writes_into_its_dict() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 128), nn.Linear(128, 32)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            x = self.e(features["input_ids"])
            x = x + self.b(torch.relu(self.a(x)))
            mask = features["attention_mask"].unsqueeze(-1).float()
            features.update({"tokens": x, "sentence": (x * mask).sum(1) / mask.sum(1)})
            return features

    def make(batch: int, length: int) -> dict[str, Tensor]:
        ones = torch.ones(batch, length, dtype=torch.long)
        return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": ones}

    given, model = make(2, 8), Features()
    before = fingerprint(given, model)
    artifact = fxprune.compile(model, (given,), flops=0.7)
    assert fingerprint(given, model) == before
    assert artifact.module(make(3, 5))["sentence"].shape == (3, 32)


def test_a_table_by_length_stays_a_table_by_length() -> None:
    class ByLength(first_calls.KeepsATable):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(50, first_calls.WIDTH)
            self.length, self.kept = -1, torch.empty(0)

        def forward(self, ids: Tensor) -> Tensor:
            if self.length != ids.shape[1]:
                self.length = ids.shape[1]
                self.kept = torch.outer(
                    torch.arange(self.length).float(), torch.linspace(0, 1, first_calls.WIDTH)
                ).cos()
            x = self.e(ids) + self.kept
            return x + self.b(torch.relu(self.a(x)))

    model = ByLength().eval()
    program = capture(model, (torch.randint(0, 50, (2, 8)),))
    assert program.notes == ()
    ids = torch.randint(0, 50, (3, 5))
    assert torch.allclose(program.exported.module()(ids), model(ids), atol=1e-6)


def test_weights_that_eval_merges_are_the_programs_own() -> None:
    model, x = first_calls.MergesWhenEvaluated(), torch.randn(3, first_calls.WIDTH)
    want = model(x)
    program = capture(model, (x,))
    assert torch.allclose(program.exported.module()(x), want, atol=1e-4)
    assert program.exported.state_dict["b.weight"] is model.b.weight, "what was not merged is shared"


def test_what_a_program_writes_into_is_its_own_and_begins_anew() -> None:
    class Average(first_calls.CountsItsCalls):
        def forward(self, x: Tensor) -> Tensor:
            self.calls.mul_(0.5).add_(x.mean())
            return self.b(torch.relu(self.a(x))) + self.calls

    model, x = Average(), torch.randn(3, first_calls.WIDTH)
    before = fingerprint(model)
    artifact = fxprune.compile(model, x, flops=0.7)
    assert fingerprint(model) == before
    assert artifact.report["masked"]["max_rel"] < 1e-4


def test_layers_made_at_the_first_call_are_refused() -> None:
    class MakesALayer(first_calls.KeepsATable):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "late"):
                self.late = nn.Linear(first_calls.WIDTH, first_calls.WIDTH)
            return self.b(torch.relu(self.a(self.late(x))))

    model, x = MakesALayer(), torch.randn(3, first_calls.WIDTH)
    with pytest.raises(CaptureError) as caught:
        capture(model, (x,))
    assert "late.weight" in caught.value.where
    assert "call it once" in caught.value.cure
    assert not hasattr(model, "late")
    model(x)
    capture(model, (x,))


def test_an_object_that_is_no_tensor_is_refused_by_name() -> None:
    class Draws(first_calls.KeepsATable):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def table(self, width: int) -> Tensor:
            return torch.rand(width, generator=self.generator)

    model = Draws()
    state = model.generator.get_state()
    with pytest.raises(CaptureError, match="no tensor") as caught:
        capture(model, (torch.randn(3, first_calls.WIDTH),))
    assert "Generator" in caught.value.why
    assert torch.equal(model.generator.get_state(), state)


def test_parameters_that_are_swapped_or_trained_are_put_back() -> None:
    layer, shared = nn.Linear(4, 4), {"a": [1]}
    layer.shared = shared  # type: ignore[assignment]
    before = fingerprint(layer)
    with untouched(layer):
        layer.weight.data = torch.zeros(4, 4)
        layer.bias.requires_grad_(False)
        layer.weight.grad = torch.ones(4, 4)
        with torch.no_grad():
            layer.bias.add_(1)
        layer.shared = {}  # type: ignore[assignment]
        shared["a"].append(2)
        torch.randn(3)
    assert fingerprint(layer) == before


def test_caches_of_functions_are_looked_for_once_and_new_ones_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    find = gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *of: looks.append(of) or find(*of))

    def changed_in(cache: Any) -> int:
        with untouched():
            cache(1)
        return cache.cache_info().currsize

    one = functools.lru_cache(lambda x: x)
    assert changed_in(one) == 0
    before = len(looks)
    assert changed_in(one) == 0
    assert len(looks) == before, "no cache was made since: the process was not searched again"
    two = functools.lru_cache(lambda x: x)
    assert changed_in(two) == changed_in(one) == 0
    del one
    three = functools.lru_cache(lambda x: x)  # as many as before, another one
    assert changed_in(three) == changed_in(two) == 0
