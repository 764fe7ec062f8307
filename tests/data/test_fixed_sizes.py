"""Data for a graph whose sizes could not stay open: cut to them, and told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.data.batch import Batch, Calibration
from fxprune.data.fixed_sizes import fit_sizes, fixed_batch_size, generate_for, open_dimensions
from fxprune.errors import LoadError
from fxprune.intake.capture import capture
from fxprune.intake.load import load
from fxprune.ir.program import Program


class PairsOfEight(nn.Module):
    """Its batch is in its code, so no way of reading it keeps that open."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(8, 6)
        return x + self.down(torch.relu(self.up(x)))


class SevenWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.table(ids).view(ids.shape[0], 7, 4) * mask[..., None]


def of_eight() -> Program:
    return capture(PairsOfEight().eval(), (torch.randn(8, 6),))


def data(*sizes: int, labels: bool = False) -> Calibration:
    counter = iter(range(10**6))

    def batch(size: int) -> Batch:
        numbers = torch.tensor([next(counter) for _ in range(size)])
        return Batch((numbers[:, None].expand(size, 6).float(),), {}, numbers if labels else None)

    return Calibration(tuple(map(batch, sizes)), "numbers")


def test_samples_are_put_together_in_batches_of_the_fixed_size_with_their_labels() -> None:
    program = of_eight()
    assert fixed_batch_size(program) == 8
    fitted, notes = fit_sizes(program, data(20, 5, 3, labels=True))
    assert [b.size for b in fitted.batches] == [8, 8, 8]
    seen = [int(n) for b in fitted.batches for n in b.args[0][:, 0]]
    assert seen == list(range(24))
    assert [int(n) for b in fitted.batches for n in b.labels] == seen
    assert notes == ["the data is cut to batches of 8, the size that is fixed: 24 of 28 samples"]


def test_data_that_fits_is_the_same_object() -> None:
    whole = data(8, 8)
    fitted, notes = fit_sizes(of_eight(), whole)
    assert fitted is whole
    assert notes == []


def test_data_that_fills_no_batch_is_refused() -> None:
    with pytest.raises(LoadError, match="does not fill the one batch") as caught:
        fit_sizes(of_eight(), data(5))
    assert caught.value.why == "the graph takes batches of 8 samples"


def test_longer_samples_are_cut_to_a_fixed_length_and_shorter_ones_left_out() -> None:
    def pair(size: int, length: int) -> Batch:
        return Batch((), {"ids": torch.arange(length).expand(size, length), "mask": torch.ones(size, length)})

    model = SevenWords().eval()
    program = capture(model, (), {"ids": torch.randint(0, 50, (2, 7)), "mask": torch.ones(2, 7)})
    assert open_dimensions(program) == {"ids": {0}, "mask": {0}}
    fitted, notes = fit_sizes(program, Calibration((pair(3, 9), pair(2, 5), pair(4, 7)), "ids"))
    assert [(b.size, b.kwargs["ids"].shape[1], b.kwargs["mask"].shape[1]) for b in fitted.batches] == [
        (3, 7, 7),
        (4, 7, 7),
    ]
    assert notes == ["the data is cut to the length that is fixed: 7 of 9 samples are long enough"]


def test_made_up_inputs_come_in_batches_of_the_fixed_size() -> None:
    model = PairsOfEight().eval()
    made = generate_for(of_eight(), load(model, input=(torch.randn(8, 6),)), 30, seed=0)
    assert [b.size for b in made.batches] == [8, 8, 8]


def test_a_run_cuts_the_data_and_says_so_with_the_line() -> None:
    result = fxprune.compile(
        PairsOfEight().eval(),
        torch.randn(8, 6),
        flops=0.6,
        data=[torch.randn(20, 6)],
        seconds=0,
        on_event=lambda _: None,
    )
    notes = result.report["notes"]
    assert any(n.startswith("batch size fixed at 8: ") and "`x = x.view(8, 6)`" in n for n in notes)
    assert "the data is cut to batches of 8, the size that is fixed: 16 of 20 samples" in notes
    assert result.report["data"]["samples"] == 16
    assert result.module(torch.randn(8, 6)).shape == (8, 6)
