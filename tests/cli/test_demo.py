"""``fxprune demo``, shortened to a few epochs, as a user runs it; and that its test images stay unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import fxprune
from fxprune.cli.demo import Digits, DigitsViT, digits


def test_the_demo_runs_and_its_numbers_are_those_of_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxprune", "demo", "--epochs", "3", "--out", "demo", "--json", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    dense, small, out = result["dense"], result["compressed"], tmp_path / "demo"
    assert result == json.loads((out / "demo.json").read_text())
    assert 0.45 < small["flops"] / dense["flops"] <= 0.5
    assert small["params"] < 0.6 * dense["params"]
    assert small["file_bytes"] == (out / "compressed" / "model.onnx").stat().st_size < 0.6 * dense["file_bytes"]
    assert max(small["onnx_max_abs"], dense["onnx_max_abs"]) < 1e-3
    for word in ("test accuracy", "GMACs", "ONNX file", "batch 32", "largest |eager - ONNX|", "demo/compressed"):
        assert word in run.stderr

    data = digits(seed=0)
    for name, side in (("dense", dense), ("compressed", small)):
        session = onnxruntime.InferenceSession(str(out / name / "model.onnx"), providers=["CPUExecutionProvider"])
        logits = session.run(None, {session.get_inputs()[0].name: data.test_images.numpy()})[0]
        assert np.mean(logits.argmax(1) == data.test_labels.numpy()) == side["accuracy"]
    assert dense["accuracy"] > 0.5  # three epochs are few, but more than nothing
    with torch.no_grad():
        assert fxprune.load(out / "compressed")(data.test_images[:3]).shape == (3, 10)

    seen = {image.tobytes() for image in np.load(out / "calibration.npz")["images"]}
    train = {image.numpy().tobytes() for image in data.train_images}
    assert seen <= train


def test_the_test_split_is_apart_and_in_proportion(digit_data: Digits) -> None:
    assert len(digit_data.test_labels) == 450
    assert len(digit_data.train_labels) == 1347
    shares = torch.bincount(digit_data.test_labels) / len(digit_data.test_labels)
    assert ((shares - 0.1).abs() < 0.01).all()
    assert torch.equal(digits(seed=0).test_images, digit_data.test_images)
    assert not torch.equal(digits(seed=1).test_images, digit_data.test_images)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_digits_and_their_split_are_scikit_learns(seed: int) -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    theirs, ours = load_digits(), digits(seed)
    images = torch.from_numpy(theirs.images / 8 - 1).float().unsqueeze(1)
    labels = torch.from_numpy(theirs.target)
    train, test = train_test_split(range(1797), test_size=0.25, stratify=theirs.target, random_state=seed)
    assert torch.equal(ours.train_images, images[train])
    assert torch.equal(ours.train_labels, labels[train])
    assert torch.equal(ours.test_images, images[test])
    assert torch.equal(ours.test_labels, labels[test])


def test_the_vit_takes_any_batch() -> None:
    model = DigitsViT(dim=16, depth=1, heads=2, hidden=32).eval()
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
