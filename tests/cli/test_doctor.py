"""The environment, told as it is: what is there, what targets need, what is wrong."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import registry
from fxprune.backends.eager.backend import EagerBackend
from fxprune.cli import doctor
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.cli.help import page


@pytest.fixture(scope="module")
def examined() -> dict[str, Any]:
    return doctor.examine()


def test_what_is_installed_is_listed_with_its_version(examined: dict[str, Any]) -> None:
    for package in ("torch", "onnx", "onnxruntime", "numpy"):
        assert examined["packages"][package] == metadata.version(package)
    assert "CPUExecutionProvider" in examined["providers"]
    assert len(examined["gpus"]) == torch.cuda.device_count()
    assert examined["cores"] >= 1
    json.dumps(examined)


def test_every_target_says_what_it_needs(examined: dict[str, Any]) -> None:
    assert set(examined["targets"]) == set(registry.names("backend"))
    assert examined["targets"]["eager"] == {"ready": True, "needs": [], "granularity": 8}
    assert {n["what"] for n in examined["targets"]["onnx"]["needs"]} == {"onnx", "onnxscript", "onnxruntime"}
    assert examined["targets"]["onnx"]["ready"]
    triton = {n["what"]: n["there"] for n in examined["targets"]["triton"]["needs"]}
    assert triton["a CUDA GPU"] is torch.cuda.is_available()
    for one in examined["targets"].values():
        assert one["ready"] == all(n["there"] for n in one["needs"])
        assert all(n["cure"] for n in one["needs"])


def test_words_say_what_is_missing_and_the_cure(examined: dict[str, Any]) -> None:
    text = "\n".join(doctor.lines(examined))
    assert f"torch {metadata.version('torch')}" in text
    assert "target    eager: ready" in text
    broken = {**examined, "problems": ["the moon is full"], "gpus": [], "torch_cuda": "13.0", "providers": []}
    broken["targets"] = {"x": {"ready": False, "needs": [{"what": "y", "there": False, "cure": "pip install y"}]}}
    text = "\n".join(doctor.lines(broken))
    for words in ("problem   the moon is full", "for CUDA 13.0", "no onnxruntime", "y is missing (pip install y)"):
        assert words in text


def test_the_command_and_its_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--target", "eager", "--json"]) == OK
    out, err = capsys.readouterr()
    assert set(json.loads(out)["targets"]) == {"eager"}
    assert "target    eager: ready" in err
    monkeypatch.setattr(EagerBackend, "requires", ("no_such_module",))
    assert main(["doctor", "--target", "eager", "-q"]) == 4
    assert main(["doctor", "-q"]) == OK, "without a target nothing was asked for that could be missing"
    assert main(["doctor", "--target", "eagre"]) == USER_ERROR
    assert "did you mean 'eager'" in capsys.readouterr().err


def test_a_torch_outside_the_tested_range_is_named() -> None:
    assert list(doctor._torch_problems({"torch": "2.12.1"})) == [] or torch.version.cuda
    for version in ("2.10.0", "2.14.0", "3.0.0+cu140"):
        assert version in doctor._torch_problems({"torch": version})[0]


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", dies)
    told = doctor._torchvision({"torchvision": "0.28", "torch": "2.13"})
    assert "torchvision 0.28 was built for another torch than 2.13: operator torchvision::nms does not exist" in told
    assert doctor._torchvision({}) == ""


def test_a_plugin_target_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type("Mine", (registry.lookup("backend", "eager"),), {"requires": ("json", "no_such_module")})
    monkeypatch.setattr(registry, "lookup", lambda kind, name: cls)
    told = doctor._target("mine")
    assert [(n["what"], n["there"]) for n in told["needs"]] == [("json", True), ("no_such_module", False)]
    assert not told["ready"]


TOY = '''
from fxprune.backends.eager.backend import EagerBackend

class Toy(EagerBackend):
    """Writes what eager writes, under another name."""

    name = "toy"
    requires = (("no_such_module", "get one"), "json")
    packages = ("hypothesis",)
'''


def test_a_backend_is_its_folder_and_a_line_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy_backend.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.BACKENDS, "toy", "toy_backend:Toy")
    assert main(["doctor", "--target", "toy"]) == 4
    err = capsys.readouterr().err
    assert "target    toy: no_such_module is missing (get one)" in err
    assert f"hypothesis {metadata.version('hypothesis')}" in err
    for command in ("compile", "plan", "apply", "sweep", "lower"):
        assert main([command, "--help"]) == OK
        assert "eager, hf, inductor, onnx, toy, triton or trt" in " ".join(capsys.readouterr().out.split())
    assert "  toy        Writes what eager writes, under another name." in page("targets").splitlines()
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    made = fxprune.compile(model, torch.randn(2, 8), flops=0.5, target="toy", out=tmp_path / "small")
    assert (made.report["target"], made.report["parity"]["ok"]) == ("toy", True)
