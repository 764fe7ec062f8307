"""The eager backend: what runs is what was read back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fxprune.intake.capture import capture
from fxprune.registry import backend
from fxprune.target.backend import lower_and_verify


class Two(nn.Module):
    """Two outputs, one of them integers, and inputs of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.out(self.embed(ids)) * scale[:, None, None]
        return y, y.argmax(-1)


def test_the_payload_runs_exactly_as_the_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Two(), (torch.randint(0, 11, (2, 5)), torch.rand(2)))
    lowered, parity = lower_and_verify(backend("eager"), program, tmp_path)
    assert lowered.payload == tmp_path / "model.pt2"
    assert lowered.files == (lowered.payload,)
    assert parity.max_abs == 0
    assert parity.ok
    assert len(parity.tried) >= 3
    assert any(sizes.get("sequence") not in (None, 5) for sizes in parity.tried)
    flat = [torch.randint(0, 11, (4, 7)), torch.rand(4)]
    again = backend("eager").load(lowered.payload)(flat)
    for got, want in zip(again, Two.forward(_module(program), *flat), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def _module(program):  # type: ignore[no-untyped-def]
    model = Two()
    model.load_state_dict(program.exported.state_dict)
    return model.requires_grad_(False)
