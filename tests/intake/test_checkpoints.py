"""Checkpoints as trainers write them: which weights are taken, and that nothing else in them is made."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.intake.pickles import read_weights
from fxprune.ir.group import Kind
from fxprune.process.libraries import survive_torchvision


@pytest.fixture(scope="module")
def timm_state() -> dict[str, torch.Tensor]:
    """Weights of timm's test_vit with five classes."""
    survive_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    return timm.create_model("test_vit", num_classes=5).state_dict()  # type: ignore[no-any-return]


def test_averaged_weights_are_taken_and_it_is_said(timm_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    averaged = {k: v * 0.5 for k, v in timm_state.items()}
    for key, holds in (
        ("state_dict_ema", {"state_dict": timm_state, "state_dict_ema": averaged, "epoch": 3}),
        (
            "model_ema",
            {"model": timm_state, "optimizer": {}, "model_ema": {f"module.{k}": v for k, v in averaged.items()}},
        ),
        ("ema.state_dict", {"state_dict": timm_state, "ema": {"state_dict": averaged, "decay": 0.99}}),
    ):
        torch.save(holds, tmp_path / "w.pth")
        loaded = load("timm:test_vit", checkpoint=tmp_path / "w.pth")
        assert isinstance(loaded.model, nn.Module)
        own = loaded.model.state_dict()
        assert all(torch.equal(own[k], v) for k, v in averaged.items()), key
        assert len(loaded.notes) == 1
        assert f"{key} taken" in loaded.notes[0]


def test_a_checkpoint_whose_average_is_empty_gives_the_others(
    timm_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": timm_state, "ema": None}, tmp_path / "w.pt")
    loaded = load("timm:test_vit", checkpoint=tmp_path / "w.pt")
    assert isinstance(loaded.model, nn.Module)
    assert torch.equal(loaded.model.state_dict()["pos_embed"], timm_state["pos_embed"])
    assert not loaded.notes


class Options(dict[str, Any]):
    """What trainers keep their options in; a class that is gone when the checkpoint is read elsewhere."""


class Steps(list[int]):
    """The same for lists."""


class Trained(nn.Module):
    """A module of a class that the reader does not have."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model("test_vit", num_classes=5)
        self.model.load_state_dict(state)


def test_checkpoints_of_trainers_give_their_tensors_and_nothing_else_is_made(
    timm_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    options = Options(lr=0.1)
    options.frozen = True  # type: ignore[attr-defined]
    extras = {
        "args": argparse.Namespace(lr=0.1, out=Path("a/b"), words=collections.defaultdict(list, {"a": [1]})),
        "best": np.float64(81.3),
        "curve": np.arange(4.0),
        "options": options,
        "steps": Steps([1, 2]),
        "when": dt.date(2026, 1, 2),
        "kind": Kind.FFN,
    }
    for held in (timm_state, Trained(timm_state)):
        torch.save({"model": held, **extras}, tmp_path / "w.pth.tar")
        loaded = load("timm:test_vit", checkpoint=tmp_path / "w.pth.tar")
        assert isinstance(loaded.model, nn.Module)
        own = loaded.model.state_dict()
        assert all(torch.equal(own[k], v) for k, v in timm_state.items())
    found = read_weights(tmp_path / "w.pth.tar")
    assert type(found["args"]).__module__.startswith("fxprune")
    assert found["args"].state["lr"] == 0.1
    assert type(found["model"]) is not Trained


def test_a_checkpoint_that_is_trusted_may_run_its_code(
    timm_state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": timm_state, "hook": Runs()}, tmp_path / "w.pt")
    with pytest.raises(LoadError, match="refused") as caught:
        load("timm:test_vit", checkpoint=tmp_path / "w.pt")
    assert "trust_pickle=True" in caught.value.cure
    assert not (tmp_path / "ran").exists()
    load("timm:test_vit", checkpoint=tmp_path / "w.pt", trust_pickle=True)
    assert (tmp_path / "ran").exists()


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)
