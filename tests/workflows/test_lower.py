"""``fxprune lower``, targets with options, and what a machine without the tools leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_models import TokenViT, scrambled
from torch import nn

import fxprune
from fxprune.artifact.artifact import Artifact
from fxprune.cli.entry import main
from fxprune.errors import LoadError, MissingDevice, OptionError
from fxprune.process.events import FxpruneWarning
from fxprune.workflows.bench import bench

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager artefact of a pruned model."""
    out = tmp_path_factory.mktemp("lower") / "small"
    torch.manual_seed(0)
    fxprune.compile(perceptron(), torch.randn(2, 8), params=0.6, importance="l2", align=1, out=out)
    return out


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "small"))


def report_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "report.json").read_text(encoding="utf-8")))


def test_an_artefact_gets_another_target_in_place(small: Path) -> None:
    before = report_of(small)
    program = (small / "model.pt2").read_bytes()
    assert main(["lower", str(small), "--target", "onnx{opset=20,threads=1}", "-q"]) == 0
    after = report_of(small)
    assert (after["target"], after["target_options"]) == ("onnx", {"opset": 20, "threads": 1})
    assert (after["payload"], after["unfinished"]) == ("model.onnx", None)
    assert after["parity"]["runtime"].startswith("onnxruntime")
    for part in ("pruned", "cost", "pipeline"):
        assert before[part] == after[part]
    assert (small / "model.pt2").read_bytes() == program
    assert Artifact.read(small).backend.text == "onnx{opset=20,threads=1}"


@needs_no_gpu
def test_without_the_tools_the_exit_code_is_4_and_the_message_says_how_to_go_on(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other" / "engine"
    assert main(["lower", str(small), "--target", "trt{dtype=fp16}", "--out", str(out), "--json"]) == 4
    said = capsys.readouterr()
    report = json.loads(said.out)["report"]
    assert "an NVIDIA GPU" in " ".join(report["unfinished"]["missing"])
    assert report["unfinished"]["finish"] == "fxprune lower engine --target 'trt{dtype=fp16}'"
    for text in ("missing", "an NVIDIA GPU", "fxprune lower engine --target", "trtexec --onnx=model.onnx"):
        assert text in said.err.replace("\n", " ")
    assert {p.name for p in out.iterdir()} == {"model.onnx", "model.pt2", "plan.json", "report.html", "report.json"}
    assert report_of(small)["target"] == "eager"
    with pytest.raises(MissingDevice, match="nothing to time") as caught:
        bench(out, batches=(1,), seconds=0.05)
    assert caught.value.cure == report["unfinished"]["finish"]
    # the same artefact, finished elsewhere: by default for the target it was made for
    with pytest.warns(FxpruneWarning, match="not finished: (an NVIDIA GPU|torch-tensorrt)"):
        again = fxprune.lower(out)
    assert again.report["target_options"] == {"dtype": "fp16"}
    assert fxprune.lower(out, target="eager").report["unfinished"] is None
    assert {p.name for p in out.iterdir()} == {"model.pt2", "plan.json", "report.html", "report.json"}


@needs_no_gpu
def test_compile_ends_with_4_as_well(tmp_path: Path) -> None:
    torch.save(perceptron(), tmp_path / "model.pt")
    code = main(
        [
            "compile",
            str(tmp_path / "model.pt"),
            "--input",
            "2x8",
            "--params",
            "0.6",
            "-q",
            "--target",
            "inductor{device=cuda}",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 4
    assert report_of(tmp_path / "out")["payload"] == "model.pt2"
    assert fxprune.load(tmp_path / "out")(torch.randn(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("target", ["triton", "eager"])
def test_targets_that_are_programs(small: Path, target: str) -> None:
    report = fxprune.lower(small, target=target).report
    assert report["target"] == target
    assert report["parity"]["max_abs"] == 0


def test_the_picture_of_merged_tokens_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = tmp_path / "small"
    model = scrambled(TokenViT(depth=2))
    fxprune.compile(model, torch.randn(2, 3, 32, 32), importance="l2", tokens="tome:r=3", out=out)
    picture = (out / "tokens.png").read_bytes()
    fxprune.lower(out, target="triton")
    assert (out / "tokens.png").read_bytes() == picture
    assert "tokens.png" in report_of(out)["files"]


def test_what_cannot_be_lowered_leaves_the_artefact_alone(small: Path) -> None:
    before = {p.name: p.read_bytes() for p in small.iterdir()}
    for target, said in (
        ("onxx", "unknown target 'onxx'"),
        ("onnx{opset=23}", "opset 23"),
        ("trt{shapes=length:1:2:3}", "no open size 'length'"),
    ):
        with pytest.raises(OptionError, match=said):
            fxprune.lower(small, target=target)
    with pytest.raises(OptionError, match="the artefact itself"):
        fxprune.lower(small, target="eager", out=small)
    assert {p.name: p.read_bytes() for p in small.iterdir()} == before


@pytest.mark.parametrize("options", [{"opset": 17}, {"opsett": 18}, {"opset": "many"}, {"threads": [1]}, ["opset"]])
def test_damaged_options_in_a_report_are_a_load_error(small: Path, options: Any) -> None:
    report = {**report_of(small), "target": "onnx", "target_options": options}
    (small / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(LoadError):
        Artifact.read(small)
