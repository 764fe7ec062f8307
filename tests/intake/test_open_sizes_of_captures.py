"""Which sizes a capture keeps open, and that each of the others is told with the line of the model that fixed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.intake.capture import capture
from fxprune.ir.program import Program
from fxprune.ir.signature import describe_inputs


def shapes(program: Program) -> list[list[Any]]:
    return [entry["shape"] for entry in describe_inputs(program)]


def run(program: Program, *args: Any, **kwargs: Any) -> Any:
    return program.exported.module()(*args, **kwargs)


class ClassToken(nn.Module):
    """The class token as everybody expands it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.token, self.mix = nn.Parameter(torch.zeros(1, 1, width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


class OnePictureAfterAnother(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        found = []
        for picture in pictures:
            found.append(self.stem(picture[None]))
        return torch.cat(found)


class OnePrompt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[0] != 1:
            raise ValueError("one prompt at a time")
        return self.up(self.table(input_ids[0])).unsqueeze(0)


class Choices(nn.Module):
    """Several candidates per sample, as multiple choice has them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.score = nn.Embedding(50, 8), nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.view(-1, ids.shape[-1])
        return self.score(self.table(flat).mean(1)).view(-1, ids.shape[1])


class Decoder(nn.Module):
    """One step of attention over the past."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, ids: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        q, k, v = (p(x).view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = functional.scaled_dot_product_attention(q, keys, values)
        return x + self.out(seen.transpose(1, 2).reshape(x.shape)), keys


class Grid(nn.Module):
    """A table of positions fixes the number of patches, which no single line states: 4 x 2 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.zeros(1, 8, 8))

    def forward(self, sound: Tensor) -> Tensor:
        patches = self.patch(sound[:, None]).flatten(2).transpose(1, 2)
        return patches + self.places


def test_a_batch_that_python_counts_stays_open() -> None:
    program = capture(ClassToken().eval(), (torch.randn(8, 5, 8),))
    assert program.notes == ()
    assert shapes(program) == [["batch", "x_1", 8]]
    for batch in (1, 3, 17):
        assert run(program, torch.randn(batch, 5, 8)).shape == (batch, 6, 8)


def test_a_loop_over_pictures_takes_the_batch_that_was_given_and_its_line_is_named() -> None:
    model = OnePictureAfterAnother().eval()
    one, two = capture(model, (torch.randn(1, 3, 8, 8),)), capture(model, (torch.randn(2, 3, 8, 8),))
    for program, batch in ((one, 1), (two, 2)):
        assert shapes(program) == [[batch, 3, 8, 8]]
        (note,) = program.notes
        assert note.startswith(f"batch size fixed at {batch}: ")
        assert "`for picture in pictures:`" in note


def test_a_model_of_one_sample_is_captured_with_one_and_says_why() -> None:
    program = capture(OnePrompt().eval(), (), {"input_ids": torch.randint(0, 50, (1, 12))})
    (note,) = program.notes
    assert note.startswith("batch size fixed at 1: of two samples the model says: ValueError: one prompt at a time")
    assert "`raise ValueError" in note
    assert shapes(program) == [[1, "sequence"]]
    assert run(program, input_ids=torch.randint(0, 50, (1, 7))).shape == (1, 7, 8)


def test_choices_and_their_lengths_stay_open() -> None:
    model = Choices().eval()
    program = capture(model, (torch.randint(0, 50, (2, 4, 9)),))
    assert program.notes == ()
    assert shapes(program) == [["batch", "ids_1", "sequence"]]
    other = torch.randint(0, 50, (3, 2, 5))
    assert torch.allclose(run(program, other), model(other))


def test_the_length_of_a_sound_stays_open() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 8, 9, 4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    program = capture(model, (torch.randn(2, 1, 400),))
    assert shapes(program) == [["batch", 1, "input_2"]]
    sound = torch.randn(3, 1, 555)
    assert torch.allclose(run(program, sound), model(sound), atol=1e-6)


def test_the_past_stays_open_and_its_heads_are_no_lengths() -> None:
    model = Decoder().eval()
    program = capture(model, (torch.randint(0, 50, (2, 3)), (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))))
    assert program.notes == ()
    assert shapes(program)[1] == ["batch", 4, "past_0_2", 8]
    ids, past = torch.randint(0, 50, (3, 1)), (torch.randn(3, 4, 20, 8), torch.randn(3, 4, 20, 8))
    assert torch.allclose(run(program, ids, past)[0], model(ids, past)[0], atol=1e-6)


def test_a_picture_that_is_joined_with_what_is_made_of_it_is_no_past() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.stem(x)], 1)

    program = capture(Skip().eval(), (torch.randn(2, 3, 8, 8),))
    assert shapes(program) == [["batch", 3, 8, 8]]
    assert program.notes == ()


def test_sizes_that_only_the_example_can_have_are_closed_with_the_line() -> None:
    program = capture(Grid().eval(), (torch.randn(2, 16, 8),))
    assert shapes(program) == [["batch", 16, 8]]
    assert [note.split(":")[0] for note in program.notes] == [
        "size of dimension 1 of 'sound' fixed at 16",
        "size of dimension 2 of 'sound' fixed at 8",
    ]
    assert all("`return patches + self.places`" in note for note in program.notes)


def test_a_length_of_one_is_told() -> None:
    program = capture(nn.Embedding(9, 4), (torch.zeros(2, 1, dtype=torch.long),))
    assert program.notes == (
        "sequence length fixed at 1: torch takes a size of 1 for a constant; give a longer example",
    )


def test_a_branch_on_a_size_is_told_with_a_size_that_is_refused() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x) if x.shape[0] <= 3 else self.mix(x) * 2

    program = capture(Careful().eval(), (torch.randn(2, 4),))
    (note,) = program.notes
    assert note.startswith("a batch of 4 is refused, though the model takes it")
    assert "if x.shape[0] <= 3" in note
    with pytest.raises(AssertionError):
        run(program, torch.randn(4, 4))


def test_a_size_that_the_model_refuses_too_is_not_told() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(9, 4), nn.Parameter(torch.zeros(1, 6, 4))

        def forward(self, ids: Tensor) -> Tensor:
            assert ids.shape[1] <= 6, "too long"
            return self.table(ids) + self.places[:, : ids.shape[1]]

    program = capture(Bounded().eval(), (torch.randint(0, 9, (2, 4)),))
    assert program.notes == ()
    assert run(program, torch.randint(0, 9, (2, 6))).shape == (2, 6, 4)
