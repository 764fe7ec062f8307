"""Recovery on batches that are padded to different lengths, and on calls that hold two kinds of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.intake.capture import capture
from fxprune.passes.transform.recovery.outputs import divergence, floating, join_rows, rows


class Spans(nn.Module):
    """Question answering: a score per position for where the answer starts, and one for where it ends."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.e, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 128), nn.Linear(128, 32)
        self.out = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.e(input_ids)
        x = x + self.b(torch.relu(self.a(x)))
        start, end = self.out(x).unbind(-1)
        lowest = torch.full_like(start, float("-inf"))
        start, end = (torch.where(attention_mask.bool(), t, lowest) for t in (start, end))
        return {"start_logits": start, "end_logits": end} if self.named else (start, x)


def text(length: int, batch: int = 8) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(3, 50, (batch, length)), "attention_mask": mask}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("recover", ["auto", "tune{steps=3}"])
def test_scores_by_position_of_batches_of_different_lengths(named: bool, recover: str) -> None:
    data = [text(length) for length in (8, 9, 11, 8)]
    artifact = fxprune.compile(Spans(named).eval(), text(8), flops=0.7, data=data, recover=recover)
    last = artifact.report["agreement"]["steps"][-1]
    assert 0 <= last["kl"] < 0.1
    assert last["cosine"] > 0.9
    assert artifact.module(**text(5, 3))["start_logits" if named else 0].shape == (3, 5)


class Tower(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.i, self.a, self.b = nn.Linear(width, 32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        return nn.functional.normalize(x + self.b(torch.relu(self.a(x))), dim=-1)


class Dual(nn.Module):
    """Texts and pictures, as many of each as there are; logits of every text for every picture."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Tower(16), Tower(24)

    def forward(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        t, v = self.text(text), self.image(image)
        return {"logits_per_text": t @ v.T, "text_embeds": t, "image_embeds": v}


def pairs(texts: int, pictures: int) -> dict[str, Tensor]:
    return {"text": torch.randn(texts, 16), "image": torch.randn(pictures, 24)}


@pytest.mark.parametrize("counts", [((5, 2),) * 3, ((2, 5), (3, 2), (2, 2)), ((4, 4),) * 3])
def test_two_kinds_of_samples_in_one_call(counts: tuple[tuple[int, int], ...]) -> None:
    data = [pairs(*count) for count in counts]
    artifact = fxprune.compile(Dual().eval(), pairs(5, 2), flops=0.7, data=data)
    last = artifact.report["agreement"]["steps"][-1]
    assert last["cosine"] > 0.9
    assert artifact.module(**pairs(1, 3))["logits_per_text"].shape == (1, 3)


def test_an_output_belongs_to_the_input_whose_batch_it_has() -> None:
    program = capture(Dual().eval(), (), pairs(5, 2))
    for texts, pictures in ((5, 2), (2, 2), (1, 7)):
        outputs = list(program.exported.module()(**pairs(texts, pictures)).values())
        found = floating(program, outputs, texts)
        assert [len(o.value) for o in found] == [texts, pictures], "never the map of pairs"


def test_rows_of_different_lengths_are_filled_with_zeros() -> None:
    mask = torch.tensor([[True, True, False]])
    row = rows(torch.tensor([[1.0, 2.0, float("-inf")]]), mask)
    assert row.tolist() == [[1, 2, 0]]
    assert join_rows([row, torch.ones(2, 4)]).tolist() == [[1, 2, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_a_class_that_is_masked_out_has_no_share_in_the_divergence() -> None:
    low = float("-inf")
    a, b = torch.tensor([[1.0, 2.0, low]]), torch.tensor([[1.5, 2.0, low]])
    assert torch.allclose(divergence(a, b), divergence(a[:, :2], b[:, :2]))
