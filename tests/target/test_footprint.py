"""The memory estimate, counted by hand on graphs small enough for that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.intake.capture import capture
from fxprune.target.footprint import activations, footprint


def test_a_chain_holds_two_neighbours_at_a_time() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    found = footprint(capture(model, (torch.randn(3, 8),), name="chain"))
    # x and the first product (8 + 16), that and its ReLU (16 + 16), ReLU and the output (16 + 4); 4 bytes each
    assert found == {"weights": 4 * (8 * 16 + 16 + 16 * 4 + 4), "activations": 4 * 32}


def test_a_skip_holds_its_input_and_views_hold_nothing() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x.reshape(-1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 8)).relu().sigmoid()
            return x + y

    # x stays until the sum; beside it two more at a time
    assert activations(capture(Skip().eval(), (torch.randn(5, 8),), name="skip")) == 4 * 3 * 8


def test_shared_weights_count_once_and_the_batch_not_at_all() -> None:
    one = nn.Linear(8, 8)
    model = nn.Sequential(one, nn.ReLU(), one).eval()
    few, many = (footprint(capture(model, (torch.randn(n, 8),), name="shared")) for n in (2, 64))
    assert few == many
    assert few["weights"] == 4 * (64 + 8)
