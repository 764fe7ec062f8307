"""Means and norms over hidden axes divide by the dense count: cutting them is exact, and their neurons are neurons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import laws
from torch import Tensor, nn

import fxprune
from fxprune.ir.group import Kind
from fxprune.testing import relative_error

WIDTH, HIDDEN = 16, 64


class Grn(nn.Module):
    """Global response normalisation (ConvNeXt V2): a mean over the channels divides each one's length."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(HIDDEN)), nn.Parameter(torch.rand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(dim=1, keepdim=True)
        return self.gamma * (x * length / (length.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class Gate(nn.Module):
    """Spatial gating (gMLP): one half of the neurons, normed and mixed over the places, gates the other."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix = norm, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        gate = self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2)
        return torch.cat([u * gate, u], -1)


class Block(nn.Module):
    """[batch, 6, WIDTH]; a feed-forward around what is tested."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.inner, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, HIDDEN),
            inner,
            nn.Linear(HIDDEN, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(F.gelu(self.up(self.norm(x)))))


def shifted(norm: nn.Module) -> nn.Module:
    """A norm of which no parameter is neutral."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    return norm


INNER = {
    "response normalisation": lambda: Grn(),
    "layer norm": lambda: shifted(nn.LayerNorm(HIDDEN)),
    "layer norm without affine": lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
    "RMS norm": lambda: shifted(nn.RMSNorm(HIDDEN)),
    "RMS norm with eps": lambda: nn.RMSNorm(HIDDEN, eps=1e-5),
    "gate": lambda: Gate(shifted(nn.LayerNorm(HIDDEN // 2))),
}


def model_of(inner: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, WIDTH), Block(INNER[inner]()), Block(INNER[inner]()), nn.Linear(WIDTH, 3)).eval()


@pytest.mark.parametrize("inner", INNER)
def test_hidden_axes_under_a_mean_are_neurons_and_sliced_equals_masked(inner: str) -> None:
    program = laws.analysed_of(model_of(inner), (torch.randn(2, 6, 8),))
    found = {g.name: g for g in program.need("groups") if not g.frozen}
    neurons = [g for g in found.values() if g.kind is Kind.FFN]
    assert len(neurons) >= 2
    assert all(g.exact for g in neurons)
    assert not any(g.exact for g in found.values() if g.kind is Kind.WIDTH), "the stream's own norms average what stays"
    for seed in (0, 1):
        plan = laws.random_plan(program, (Kind.FFN,), 0.4, seed)
        laws.sliced_equals_masked(program, plan, laws.sliced(program, plan))
    plan = laws.random_plan(program, (Kind.FFN, Kind.WIDTH), 0.3, 2)
    laws.sliced_equals_masked(program, plan, laws.sliced(program, plan))


@pytest.mark.parametrize("inner", INNER)
def test_by_default_the_module_masked_by_hand_is_what_is_written(inner: str, tmp_path: Path) -> None:
    """Zeros in the rows of the eager module's own weights, and no knowledge of ours."""
    model, x = model_of(inner), torch.randn(3, 6, 8)
    target = "onnx" if inner == "layer norm" else "eager"
    small = fxprune.compile(model, x, flops=0.6, target=target, out=tmp_path / "small")
    ready = 0
    for name, choice in small.plan.choices.items():
        if len(choice.keep) == choice.size:
            continue
        assert choice.kind == "ffn", "the stream is whole"
        block = model[int(name[0])]
        if choice.size != HIDDEN:
            return  # halves of a gate: the law above has them
        gone = sorted(set(range(HIDDEN)) - set(choice.keep))
        with torch.no_grad():
            block.up.weight[gone], block.up.bias[gone] = 0, 0
            block.down.weight[:, gone] = 0
        ready += 1
    assert ready
    with torch.no_grad():
        assert relative_error([small.module(x)], [model(x)]) < 1e-5


def test_a_mean_far_from_zero_keeps_its_digits() -> None:
    """The variance is summed around the mean: the difference of two large squares would lose it."""
    model = model_of("layer norm").double()
    with torch.no_grad():
        for block in (model[1], model[2]):
            block.up.bias.add_(1e4)
    program = laws.analysed_of(model.float(), (torch.randn(2, 6, 8),))
    plan = laws.random_plan(program, (Kind.FFN,), 0.4, 0)
    laws.sliced_equals_masked(program, plan, laws.sliced(program, plan))
