"""PermuteChannels: the same function, more magnitude in two of every four."""

from __future__ import annotations

import pytest
import torch
from support import blocks, recovering, tiled

from fxprune.errors import OptionError
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import two_of_four
from fxprune.passes.transform.permute_channels import PermuteChannels, exchange_channels
from fxprune.testing import relative_error, run_flat


def kept(weight: torch.Tensor) -> float:
    return float((weight.abs() * two_of_four(weight.abs())).sum())


def permuted(program: Program, **options: int) -> Program:
    return Pipeline((PermuteChannels(**options),), start=("axes", "groups")).run(program)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("model", [blocks.GatedFeedForward, lambda: tiled.Classifier(12, 32), blocks.TransposedWeights])
def test_outputs_stay_and_two_of_four_keeps_more(model) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    given = tiled.data(1) if "lambda" in repr(model) else recovering.floats(2, 5, 24, batches=1)
    program = recovering.analysed(model(), given)
    after = permuted(program)
    inputs = recovering.flat(program, given.batches[0])
    assert relative_error(run_flat(after, inputs), run_flat(program, inputs)) < 1e-5
    names = [n for n in ("down.weight", "w_2") if n in program.tensors]
    assert names
    for name in names:
        one, two = (p.tensors[name].detach() for p in (program, after))
        sides = (one.T, two.T) if name == "w_2" else (one, two)
        assert kept(sides[1]) > kept(sides[0]) * 1.005
        assert sides[0].sort(1).values.allclose(sides[1].sort(1).values), "columns moved, nothing else"
    again = permuted(program)
    assert all(torch.equal(t, again.tensors[n]) for n, t in after.tensors.items())


def test_exchanges_never_lose_and_find_the_obvious_order() -> None:
    weight = torch.zeros(6, 8)
    weight[:, :4] = 1 + torch.rand(6, 4)  # four strong columns side by side: two of them would go
    order = exchange_channels(weight, 10, 0)
    assert sorted(order.tolist()) == list(range(8))
    assert kept(weight[:, order]) == pytest.approx(float(weight.sum()), rel=1e-6)
    torch.manual_seed(1)
    for rounds in (1, 5, 20):
        wide = torch.randn(16, 40)
        assert kept(wide[:, exchange_channels(wide.abs(), rounds, 0)]) >= kept(wide)


def test_a_model_without_neurons_stays_as_it_is() -> None:
    given = recovering.floats(2, 5, 24, batches=1)
    program = recovering.analysed(blocks.WrittenAttention("matmul"), given)
    assert permuted(program) is program
    with pytest.raises(OptionError, match="at least one round"):
        PermuteChannels(rounds=0)
