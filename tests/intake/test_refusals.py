"""Files that no trust would bring in say the true reason: classes of a script, absent packages, quantised modules."""

from __future__ import annotations

import argparse
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.process.libraries import survive_torchvision


def save_as(module: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network whose class is pickled as ``module``.Net, and is gone when the file is read."""
    Net = type("Net", (nn.Sequential,), {"__module__": module})
    with monkeypatch.context() as here:
        if module not in sys.modules:
            here.setitem(sys.modules, module, types.ModuleType(module))
        here.setattr(sys.modules[module], "Net", Net, raising=False)
        torch.save(Net(nn.Conv2d(3, 4, 3), nn.ReLU()), path)
    return path


def refused(path: Path, trust: bool) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(path, trust_pickle=trust)
    return caught.value


@pytest.mark.parametrize("trust", [False, True])
def test_a_class_of_the_script_that_saved_it_is_named_with_the_ways_out(
    trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(save_as("__main__", tmp_path / "m.pt", monkeypatch), trust)
    assert "class Net of the script" in error.what
    assert "the file is whole" in error.why
    assert "Conv2d" not in str(error), "classes that are allowed are no reason"
    assert "torch.export.save" in error.cure
    assert "trust" not in error.cure


def test_a_class_of_an_absent_module_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_as("somebodys_nets", tmp_path / "m.pt", monkeypatch)
    without = refused(path, False)
    assert without.why == "not allowed: somebodys_nets.Net"
    assert "trust" in without.cure
    trusted = refused(path, True)
    assert "somebodys_nets.Net, which is not here" in trusted.what
    assert "No module named 'somebodys_nets'" in trusted.why
    assert "PYTHONPATH" in trusted.cure


def test_a_class_that_its_module_no_longer_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "somebodys_nets", types.ModuleType("somebodys_nets"))
    error = refused(save_as("somebodys_nets", tmp_path / "m.pt", monkeypatch), True)
    assert "somebodys_nets has no Net" in error.why


def test_quantised_modules_are_refused_as_such(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these will go
        inner = torch.ao.nn.quantized.dynamic.Linear(8, 4)
        model = nn.Sequential(nn.Linear(8, 8), inner)
        torch.save(model, tmp_path / "m.pt")
        with pytest.raises(LoadError, match="quantised modules cannot be pruned") as caught:
            load(model, input="2x8")
        assert caught.value.where.endswith(": 1")
        for trust in (False, True):
            assert "quantised" in refused(tmp_path / "m.pt", trust).what


def test_backbones_of_timm_load_without_trust(tmp_path: Path) -> None:
    """Features of several stages; what describes them is a record of timm's own."""
    survive_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", features_only=True).eval()
    torch.save(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", input="1x3x64x64")
    for ours, theirs in zip(loaded.model(*loaded.args), model(*loaded.args), strict=True):
        assert torch.equal(ours, theirs)


def test_a_module_beside_what_its_trainer_was_asked_loads_without_trust(tmp_path: Path) -> None:
    """``{"model": module, "args": Namespace}``: options are no code."""
    model, asked = nn.Sequential(nn.Linear(4, 4)), argparse.Namespace(lr=0.1, sizes=[1, 2])
    torch.save({"model": model, "epoch": 3, "args": asked}, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", input="1x4")
    x = torch.randn(2, 4)
    assert isinstance(loaded.model, nn.Module)
    assert torch.equal(loaded.model(x), model(x))
