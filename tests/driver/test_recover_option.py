"""``recover=`` and ``--recover``: opt-in, in the report, exact as ever, and refused where there is no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.errors import OptionError

SHAPE = (torch.randn(2, 1, 8, 8),)
Batches = list[Tensor]


@pytest.fixture
def batches(digit_data: Digits) -> Batches:
    return list(digit_data.train_images[:192].split(32))


def accuracy(artifact: fxprune.Artifact, data: Digits) -> float:
    with torch.no_grad():
        said = artifact.module.eval()(data.test_images).argmax(1)
    return float((said == data.test_labels).float().mean())


def test_recovery_helps_and_is_reported(trained: DigitsViT, digit_data: Digits, batches: Batches) -> None:
    plain, better = (
        fxprune.compile(trained, SHAPE, flops=0.4, importance="l2", data=batches, samples=128, recover=how)
        for how in ("none", "ridge")
    )
    assert "recovery" not in plain.report
    assert plain.plan.choices == better.plan.choices
    record = better.report["recovery"]
    assert record["method"] == record["asked"] == "ridge"
    assert record["samples"] == 128
    assert record["steps"]
    assert all(0 <= s["after"] <= s["before"] for s in record["steps"])
    assert json.loads(json.dumps(better.report))["recovery"] == json.loads(json.dumps(record))
    assert any(note.startswith("recovery 'ridge' on 128 samples") for note in better.report["notes"])
    assert better.report["data"]["samples"] == 128  # it was used, though the criterion needs none
    assert accuracy(better, digit_data) > accuracy(plain, digit_data)


def test_auto_reports_its_guard_and_the_callers_model_stays(trained: DigitsViT, batches: Batches) -> None:
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    record = fxprune.compile(trained, SHAPE, flops=0.5, data=batches, recover="auto").report["recovery"]
    assert {"none", "bias", "ridge", "refit"} <= set(record["guard"])
    assert record["guard"][record["chosen"]]["mixed"] >= record["guard"]["none"]["mixed"]
    assert record["held_out"] == 32
    assert all(torch.equal(t, before[name]) for name, t in trained.state_dict().items())


def test_trajectory_and_recovery_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: DigitsViT,
    batches: Batches,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained, "model.pt")
    torch.save({"x": torch.cat(batches)}, "data.pt")
    code = main(
        [
            "compile",
            "model.pt",
            "--input",
            "2x1x8x8",
            "--trust-pickle",
            "--flops",
            "0.5",
            "--data",
            "data.pt",
            "--importance",
            "trajectory",
            "--recover",
            "ridge",
            "--target",
            "onnx",
            "--out",
            "small",
            "--json",
        ]
    )
    out, err = capsys.readouterr()
    assert code == OK, err
    report = json.loads(out)["report"]
    assert report["importance"] == "trajectory"
    assert report["recovery"]["method"] == "ridge"
    assert report["recovery"] == json.loads(Path("small/report.json").read_text())["recovery"]
    assert fxprune.load("small")(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_mistakes_are_refused_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: DigitsViT
) -> None:
    with pytest.raises(OptionError, match="recovery needs data"):
        fxprune.compile(trained, SHAPE, flops=0.5, recover="ridge")
    with pytest.raises(OptionError, match="unknown recovery 'rigde'"):
        fxprune.compile(trained, SHAPE, flops=0.5, data=[torch.randn(4, 1, 8, 8)], recover="rigde")
    with pytest.raises(OptionError, match="recovery needs data"):
        fxprune.compile(trained, SHAPE, plan=fxprune.plan(trained, SHAPE, flops=0.5).need("plan"), recover="auto")
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "missing.pt", "--flops", "0.5", "--recover", "auto"]) == USER_ERROR
    assert "cure" in capsys.readouterr().err
