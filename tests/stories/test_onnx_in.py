"""An ONNX file comes in, a smaller one goes out: classics by both exporters of PyTorch, and as from TensorFlow."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_files import Array, perceptron, run
from support.onnx_zoo import Detector, Encoder, Pictures, export, of_tensorflow, with_nms

import fxprune
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.intake.onnx.parity import COMPARED

IDS, MASK = (
    torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0)),
    torch.ones(2, 7, dtype=torch.int64),
)
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pictures(folder: Path, new: bool, wide: int = 0) -> Path:
    return export(Pictures(wide), (IMAGE,), folder / "cnn.onnx", ["image"], ["logits"], new)


def encoder(folder: Path, new: bool) -> Path:
    args = (IDS, MASK)
    return export(Encoder(), args, folder / "bert.onnx", ["input_ids", "attention_mask"], ["logits"], new, lengths=True)


def detector(folder: Path, new: bool) -> Path:
    return export(Detector(), (IMAGE,), folder / "yolo.onnx", ["images"], ["boxes", "scores"], new)


CLASSICS: dict[str, Any] = {
    "resnet": lambda f: pictures(f, False),
    "resnet, new exporter": lambda f: pictures(f, True),
    "mobilenet": lambda f: pictures(f, False, 48),
    "bert": lambda f: encoder(f, False),
    "bert, new exporter": lambda f: encoder(f, True),
    "yolo": lambda f: detector(f, False),
    "yolo with nms": lambda f: with_nms(detector(f, False), f / "nms.onnx"),
    "tensorflow": lambda f: of_tensorflow(f / "tf.onnx"),
}


def drawn(file: Path, samples: int = 3) -> dict[str, Array]:
    """Inputs of a file, with another batch than the example's where it is open."""
    import onnxruntime

    generator, found = np.random.default_rng(1), {}
    for one in onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).get_inputs():
        shape = [s if isinstance(s, int) else samples if i == 0 else 5 for i, s in enumerate(one.shape)]
        ids = "int64" in one.type
        found[one.name] = np.ones(shape, np.int64) if ids else generator.normal(size=shape).astype(np.float32)
    return found


@pytest.mark.parametrize("name", CLASSICS)
def test_a_classic_becomes_a_smaller_file_that_takes_and_gives_the_same(name: str, tmp_path: Path) -> None:
    source = CLASSICS[name](tmp_path)
    told = pytest.warns(fxprune.FxpruneWarning, match="are left out") if "nms" in name else contextlib.nullcontext()
    with told:
        artifact = fxprune.compile(source, flops=0.6, target="onnx", out=tmp_path / "small")
    report, small = artifact.report, tmp_path / "small" / "model.onnx"
    assert report["cost"]["compressed"]["flops"] <= 0.6 * report["cost"]["dense"]["flops"]
    assert report["proof"][0]["compared"] == COMPARED
    given = drawn(small)
    made = run(small, given)
    if name == "yolo with nms":
        assert list(made) == ["boxes", "scores"]
        return
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in run(source, given).items()}
    with torch.no_grad():
        again = artifact.module(*(torch.from_numpy(v) for v in given.values()))
    for key, value in again.items():
        np.testing.assert_allclose(made[key], value.numpy(), rtol=1e-3, atol=1e-4)


def test_every_command_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(perceptron(tmp_path / "net.onnx"))
    generator = np.random.default_rng(0)
    data = tmp_path / "d.npz"
    np.savez(data, x=generator.normal(size=(160, 16)).astype(np.float32), labels=generator.integers(0, 4, 160))
    out = str(tmp_path / "small")
    plan = str(tmp_path / "plan.json")
    assert main(["inspect", source, "--json"]) == OK
    assert "net.up:ffn" in capsys.readouterr().out
    assert main(["plan", source, "--flops", "0.6", "--data", str(data), "--out", plan]) == OK
    assert "net.up:ffn" in json.dumps(json.loads(Path(plan).read_text()))
    assert main(["apply", source, "--plan", plan, "--target", "onnx", "--out", str(tmp_path / "other")]) == OK
    assert main(["compile", source, "--flops", "0.6", "--data", str(data), "--target", "onnx", "--out", out]) == OK
    assert main(["bench", out, "--against", source, "--batch", "1", "--seconds", "0.1"]) == OK
    assert main(["sweep", source, "--flops", "0.8,0.6", "--data", str(data), "--out", str(tmp_path / "s")]) == OK
    delivery = str(tmp_path / "release")
    checks = ["--target", "onnx", "--verify", str(data), "--max-drop", "0.9"]
    assert main(["export", source, "--plan", plan, *checks, "--out", delivery]) == OK
    assert main(["verify", delivery, "--skip-latency"]) == OK


def test_a_smaller_file_with_its_weights_beside_it_can_come_in_again(tmp_path: Path) -> None:
    source = perceptron(tmp_path / "net.onnx", width=64)
    once = fxprune.compile(source, flops=0.6, target="onnx{external=true}", out=tmp_path / "once")
    assert (tmp_path / "once" / "model.onnx.data").stat().st_size > 1000
    twice = fxprune.compile(tmp_path / "once" / "model.onnx", flops=0.6, target="onnx", out=tmp_path / "twice")
    assert twice.report["cost"]["dense"] == once.report["cost"]["compressed"]


def test_what_cannot_be_is_an_error_of_the_users_with_a_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x)[0]

    path = export(Recurrent(), (torch.randn(2, 4, 8),), tmp_path / "r.onnx", ["x"], ["y"], False)
    assert main(["compile", str(path), "--flops", "0.6", "--out", str(tmp_path / "small")]) == USER_ERROR
    said = capsys.readouterr().err
    assert "recurrent layers cannot be pruned" in said
    assert "(LSTM)" in said
    assert "cure" in said
    assert "Traceback" not in said
