"""Recovery of depthwise convolutions, and of convolutions whose bias is the mean of a batch norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.laws import random_plan
from torch import Tensor, nn
from torch.fx import Node

from fxprune.data import Batch, Calibration
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.depthwise import ChannelMoments, is_depthwise, sample_rows
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.testing import run_flat


def convolution(program: Program) -> Node:
    return next(n for n in program.graph.nodes if is_depthwise(n))


@pytest.mark.parametrize(
    ("kernel", "options", "size"),
    [
        (3, {"padding": 1}, 32),
        (5, {"padding": 2, "stride": 2}, 33),
        (3, {"padding": 2, "dilation": 2}, 20),
        ((1, 3), {"padding": (0, 1), "stride": (2, 1)}, 64),
        (3, {}, 3),
        (1, {"stride": 2}, 33),
    ],
)
@pytest.mark.parametrize("batch", [1, 40])
def test_sample_rows_are_what_the_convolution_reads(
    kernel: Any, options: dict[str, Any], size: int, batch: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, groups=6, bias=False, **options).double().eval()
    x = torch.randn(batch, 6, size, size, dtype=torch.float64)
    node = convolution(capture(layer, (x[:2],) if batch > 1 else (x,)))
    out = layer(x)
    c, (r,) = sample_rows(node, layer.weight.shape[2:], x, [out], 4096)
    torch.testing.assert_close(torch.einsum("nck,ck->nc", c, layer.weight.flatten(1)), r)
    assert 0 < len(r) <= out.numel() // 6


def test_a_channel_is_solved_as_least_squares() -> None:
    torch.manual_seed(1)
    c, r = torch.randn(200, 3, 4, dtype=torch.float64) + 1, torch.randn(200, 3, dtype=torch.float64)
    moments = ChannelMoments(3, 4)
    for part in range(0, 200, 50):
        moments.add(c[part : part + 50], r[part : part + 50])
    system = moments.finish(centred=True)
    assert system is not None
    change = system.ridge(0.0)
    bias = system.bias(change)
    for channel in range(3):
        rows = torch.cat([c[:, channel], torch.ones(200, 1, dtype=torch.float64)], 1)
        wanted = torch.linalg.lstsq(rows, r[:, channel, None]).solution[:, 0]
        torch.testing.assert_close(torch.cat([change[channel], bias[channel, None]]), wanted)
    left = (r - torch.einsum("nck,ck->nc", c, change) - bias).square().sum(1).mean()
    assert system.error(change, bias) == pytest.approx(float(left))
    assert system.error() == pytest.approx(float(r.square().sum(1).mean()))
    assert float(system.ridge(1e9).norm()) < 1e-6  # no evidence, no change


class Inverted(nn.Module):
    """Two inverted bottlenecks with batch norms, as compact networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 48, 1, bias=False),
                nn.BatchNorm2d(48),
                nn.ReLU6(),
                nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False),
                nn.BatchNorm2d(48),
                nn.ReLU6(),
                nn.Conv2d(48, 16, 1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def cut() -> tuple[Program, Calibration]:
    torch.manual_seed(2)
    model = Inverted()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 12, 12))  # running statistics of its own
    data = Calibration(tuple(Batch((torch.randn(16, 3, 12, 12),)) for _ in range(4)), "normal")
    program = capture(model.eval(), (data.batches[0].args[0][:2],))
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(program)
    return program.but(plan=random_plan(program, (Kind.CHANNEL,), 0.6, 3)), data


def outputs(program: Program, data: Calibration) -> Tensor:
    return torch.cat([run_flat(program, [batch.args[0]])[0] for batch in data.batches])


def test_refit_solves_depthwise_convolutions_and_moves_the_means_of_batch_norms(
    cut: tuple[Program, Calibration],
) -> None:
    program, data = cut
    fitted, record = Recover(method="refit", data=data, rel=0.01, refit_rel=0.01).apply(program)
    assert record is not None
    solved = {step.parameter for step in record.steps}
    assert "blocks.1.3.weight" in solved
    assert not any("grouped" in why for why in record.skipped.values())
    assert all(step.after <= step.before * (1 + 1e-6) for step in record.steps)
    small, plain = (SliceAxes().run(p) for p in (fitted, program))
    want = outputs(program, data)
    one, two = ((outputs(p, data) - want).square().mean() for p in (small, plain))
    assert one < 0.5 * two
    shift = (outputs(small, data) - want).mean(0).norm() / (outputs(plain, data) - want).mean(0).norm()
    assert shift < 0.1  # no convolution has a bias; the means of their norms moved


def test_running_means_of_what_is_not_recovered_stay(cut: tuple[Program, Calibration]) -> None:
    program, data = cut
    fitted, _ = Recover(method="bias", data=data).apply(program)
    moved = {n for n, t in program.tensors.items() if not torch.equal(t, fitted.tensors[n])}
    assert moved
    assert all(name.endswith(("running_mean", ".bias")) for name in moved)
