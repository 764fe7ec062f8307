"""2:4 for torch's kernels: what can go, what stays and why. The kernels themselves need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.ir.sparsity import two_of_four
from fxprune.target.semi_structured import to_semi_structured, why_not


def pairs(n: int, k: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    weight = torch.randn(n, k)
    return (weight * two_of_four(weight.abs())).to(dtype)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.randn(32, 64).half(), "two zeros"),
        (pairs(32, 64, torch.float32), "not float32"),
        (pairs(32, 32), "no multiple of 32x64"),
    ],
)
def test_why_a_weight_stays_dense(weight: torch.Tensor, why: str) -> None:
    assert why in why_not(weight)


def test_weights_stay_as_they_are_without_a_gpu_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).half()
    with torch.no_grad():
        model[0].weight.copy_(pairs(32, 64))
    before = model[0].weight
    assert to_semi_structured(model) == {"0.weight": "this machine has no GPU"}
    assert model[0].weight is before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, why in (((7, 5), "compute capability 7.5"), ((8, 0), "not on the GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert why in to_semi_structured(model)["0.weight"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_outputs_stay() -> None:
    model = nn.Linear(128, 128).half().cuda()
    with torch.no_grad():
        model.weight.copy_(pairs(128, 128))
        x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
        want = model(x)
        assert to_semi_structured(model) == {}
        torch.testing.assert_close(model(x), want, rtol=1e-2, atol=1e-2)
