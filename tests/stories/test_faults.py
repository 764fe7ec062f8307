"""What goes wrong in the middle of a run: an error that says so, and what lay at the destination stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.errors import FxpruneError


@pytest.fixture
def old(tmp_path: Path, trained: DigitsViT, digit_data: Digits) -> dict[str, bytes]:
    """An artefact that was there before."""
    fxprune.compile(trained, digit_data.test_images[:2], flops=0.8, importance="l2", out=tmp_path / "out")
    return files(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Overflowing(nn.Module):
    """A model whose hidden values are not finite for bright pictures."""

    def __init__(self, model: DigitsViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(x)
        return hidden * torch.where(x.amax((1, 2, 3)) > 50, torch.inf, 1.0)[:, None]


@pytest.mark.drawn(2)
@pytest.mark.parametrize("importance", ["fisher", "taylor", "trajectory{probes=1,samples=8}", "obs", "activation"])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(
    importance: str, trained: DigitsViT, digit_data: Digits, tmp_path: Path, old: dict[str, bytes]
) -> None:
    images = digit_data.train_images[:16].clone()
    images[5] = torch.nan
    with pytest.raises(FxpruneError, match=r"finite|NaN|nan") as caught:
        fxprune.compile(
            trained,
            digit_data.test_images[:2],
            flops=0.6,
            data=list(images.split(8)),
            recover="ridge",
            importance=importance,
            out=tmp_path / "out",
            on_event=lambda _: None,
        )
    assert caught.value.cure
    assert files(tmp_path) == old


def test_a_model_that_overflows_on_the_data_is_not_recovered_to_nonsense(
    trained: DigitsViT, digit_data: Digits, tmp_path: Path, old: dict[str, bytes]
) -> None:
    images = digit_data.train_images[:16].clone()
    images[5] = 100.0
    with pytest.raises(FxpruneError, match="an activation is not a number"):
        fxprune.compile(
            Overflowing(trained).eval(),
            digit_data.test_images[:2],
            flops=0.6,
            importance="fisher",
            data=list(images.split(8)),
            out=tmp_path / "out",
            on_event=lambda _: None,
        )
    assert files(tmp_path) == old


def test_a_loader_that_fails_in_the_middle(
    trained: DigitsViT, digit_data: Digits, tmp_path: Path, old: dict[str, bytes]
) -> None:
    def batches() -> Iterator[Any]:
        yield digit_data.train_images[:8]
        raise ConnectionResetError("the data server went away")

    with pytest.raises(FxpruneError, match="the data server went away") as caught:
        fxprune.compile(trained, digit_data.test_images[:2], flops=0.6, data=batches(), out=tmp_path / "out")
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert files(tmp_path) == old
