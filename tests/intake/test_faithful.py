"""The captured graph is held against the module itself, and the first difference stops the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import CaptureError
from fxprune.intake.capture import capture
from fxprune.intake.faithful import compare_on_data


class Block(nn.Module):
    def __init__(self, other_when_traced: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), other_when_traced

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if self.other and torch.compiler.is_compiling():
            hidden = hidden * 0.5
        return x + self.down(hidden)


def stack(bad: int | None, blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(i == bad) for i in range(blocks))).eval()


def test_a_capture_of_the_module_says_how_near_it_is_at_two_sizes() -> None:
    (link,) = capture(stack(None), (torch.randn(2, 8),)).proof
    assert link.compared == "the module and its captured graph"
    assert link.max_rel <= link.tolerance == 1e-4
    assert [dict(sizes) for sizes in link.tried] == [{"batch": 2}, {"batch": 3}]


def test_code_that_is_other_code_when_it_is_traced_stops_the_run_and_is_found() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(stack(1), (torch.randn(2, 8),))
    error = caught.value
    assert error.what == "the captured graph does not compute what the model computes"
    assert "'1.down' (Linear)" in error.where
    assert "relative error" in error.why
    assert "is traced" in error.cure


class LongerOtherwise(nn.Module):
    """Right for the example, another computation for a longer batch, and no condition that torch could see."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.mix(x)
        return self.mix(x) * (1 if x.shape[0] == 2 else 3)


def test_a_difference_at_another_size_than_the_examples_stops_the_run() -> None:
    with pytest.raises(CaptureError, match="does not compute what the model computes") as caught:
        capture(LongerOtherwise().eval(), (torch.randn(2, 4),))
    assert "batch=3" in caught.value.where


class OnSomeValues(nn.Module):
    """Other code while it is traced, that shows on inputs with large values only."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x if torch.compiler.is_compiling() else x.clamp(-50, 50))


def test_a_difference_on_the_users_data_stops_the_run() -> None:
    model = OnSomeValues().eval()
    program = capture(model, (torch.randn(2, 4),))
    links, notes = compare_on_data(model, program, (torch.randn(2, 4),), {})
    assert [link.max_rel for link in links] == [0.0]
    assert notes == []
    with pytest.raises(CaptureError, match="does not compute what the model computes") as caught:
        compare_on_data(model, program, (torch.randn(2, 4) * 1000,), {})
    assert "data" in caught.value.where


@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: nn.functional.dropout(x, 0.5, training=True)])
def test_a_model_that_draws_is_compared_with_the_same_draws(draw: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x) + draw(x)

    program = capture(Noisy().eval(), (torch.randn(2, 4),))
    assert program.proof[0].max_rel == 0.0
    assert program.notes == ()


def test_a_module_that_differs_from_itself_is_not_compared_and_the_note_says_so() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.calls = nn.Linear(4, 4), iter(range(10**6))

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x) * (1.0 + next(self.calls))

    program = capture(Counting().eval(), (torch.randn(2, 4),))
    assert any("could not be compared" in note and "two calls" in note for note in program.notes)


def test_inputs_that_the_model_refuses_when_they_are_drawn_are_told() -> None:
    """Ids that tie to something else: one slot per sample that a picture fills."""

    class Slots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and int((ids == 7).sum()) != len(ids):
                raise ValueError("every text has one slot")
            return self.up(self.table(ids))

    ids = torch.randint(8, 50, (2, 5))
    ids[:, 1] = 7
    program = capture(Slots().eval(), (ids,))
    assert dict(program.proof[0].tried[0]) == {"batch": 2, "sequence": 5}
    assert all("every text has one slot" in note for note in program.notes)


def test_half_precision_that_keeps_no_tolerance_itself_is_no_difference() -> None:
    """Outputs that cancel: in fp16 nothing of them is left but rounding, whoever computes them."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            large = self.mix(x) * 100
            parts = large.unflatten(1, (8, 8))
            one = parts.sum(1) if torch.compiler.is_compiling() else sum(parts[:, i] for i in range(8))
            return one - parts.flip(1).cumsum(1)[:, -1]

    torch.manual_seed(0)
    program = capture(Cancelling().half().eval(), (torch.randn(2, 64).half(),))
    assert program.proof[0].max_rel <= program.proof[0].tolerance
