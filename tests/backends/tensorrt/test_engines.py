"""Engines of pruned models are built for SM 8.0, 8.6 and 8.9, and what no converter takes is named. Built, not run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo

from fxprune import registry
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.target.backend import lower_and_verify

WITHOUT_GPU = "the engines of a machine without a GPU; with one, engines are run (test_tensorrt)"
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("tensorrt_rtx") is None, reason=WITHOUT_GPU
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What tests of this run look at of ``engines.py``, made in one process of its own: torch_tensorrt must be told
    about a GPU there."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("torch-tensorrt-rtx is part of the test extra on Linux with x86-64")
    out = tmp_path_factory.mktemp("engines")
    script = Path(__file__).with_name("engines.py")
    mine = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    cases = {"bert", "odd", "tokens-not-spelt-out", *(i.callspec.params["name"] for i in mine)}
    run = subprocess.run(
        [sys.executable, str(script), str(out), *sorted(cases)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(out / "cache")},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "engines.json").read_text(encoding="utf-8"))
    for name, one in found.items():
        one["folder"] = out / name
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", "fp32"),
        *(
            pytest.param(name, dtype, marks=pytest.mark.drawn(0))
            for name, dtype in (("vit-heads-ffn-tokens", "fp16"), ("resnet", "bf16"), ("swin", "fp16"))
        ),
    ],
)
def test_an_engine_of_a_pruned_model_is_built(built: dict[str, Any], name: str, dtype: str) -> None:
    one = built[name]
    assert "error" not in one, one
    report = one["report"]
    assert {"model.engine", "model.engine.json", "model.pt2", "report.json"} <= set(one["files"])
    assert report["payload"] == "model.engine"
    engine = (one["folder"] / "model.engine").read_bytes()
    weights = report["cost"]["compressed"]["bytes"] / (1 if dtype == "fp32" else 2)
    assert len(engine) > 0.8 * weights
    assert report["pruned"]
    assert report["lowering"]["dtype"] == dtype
    assert report["lowering"]["via"] == "dynamo"
    assert report["parity"]["ok"]
    assert "the engine was built, not run" in report["parity"]["runtime"]
    assert "NVIDIA GPU" in report["unfinished"]["missing"][0]


def test_an_engine_says_what_goes_in_and_comes_out(built: dict[str, Any]) -> None:
    said = json.loads((built["bert"]["folder"] / "model.engine.json").read_text(encoding="utf-8"))
    assert [i["name"] for i in said["inputs"]] == ["input_ids", "attention_mask"]
    assert said["inputs"][0]["least"] == [1, 1]
    assert said["inputs"][0]["largest"] == [32, 32]  # the position table ends there
    assert said["outputs"] == ["logits"]
    assert "TensorRT" in said["built_by"]


def test_an_op_without_a_converter_is_named_with_its_source_line(built: dict[str, Any]) -> None:
    error = built["odd"]
    assert error["error"] == "LoweringError"
    assert "fxprune_engines.oddly" in error["what"]
    assert "node oddly" in error["where"]
    assert "engines.py:" in error["where"]
    assert "the guilty line" in error["where"]
    assert not (error["folder"] / "model.engine").exists()


def test_a_node_of_ours_without_a_converter_names_its_pass(built: dict[str, Any]) -> None:
    error = built["tokens-not-spelt-out"]
    assert "fxprune.merge_tokens" in error["what"]
    assert "made by merge-tokens" in error["where"]
    assert "token_models.py:" in error["where"]


def test_the_parser_builds_as_well(tmp_path: Path) -> None:
    """``via=onnx`` needs TensorRT alone, so it runs in this very process."""
    module, args, kwargs = zoo.build("gated_ffn", 0)
    target = registry.target("trt{via=onnx,capability=8.9,dtype=fp16,workspace=1GiB,optimization_level=2}")
    lowered, parity = lower_and_verify(target, capture(module, args, kwargs), tmp_path)
    assert {p.name for p in lowered.files} == {"model.engine", "model.engine.json", "model.onnx"}
    assert lowered.payload.stat().st_size > 1000
    assert parity.ok
    assert parity.tolerance == 2e-2
    assert lowered.runtime.startswith("onnxruntime")
    assert "was not run" in lowered.missing[0]


def test_an_unknown_compute_capability(tmp_path: Path) -> None:
    module, args, kwargs = zoo.build("gated_ffn", 0)
    with pytest.raises(OptionError, match=r"compute capability 9\.0") as caught:
        lower_and_verify(registry.target("trt{via=onnx,capability=9.0}"), capture(module, args, kwargs), tmp_path)
    assert "8.9" in caught.value.cure
