"""A torchvision that does not import is survived, and the network is not used."""

from __future__ import annotations

import json
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import Loaded, load
from fxprune.process.libraries import offline, survive_torchvision


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(144, 2)))


def failure(source: Any, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(source, **options)
    assert caught.value.exit_code == 2
    return caught.value


def timm_or_skip() -> Any:
    survive_torchvision()
    return pytest.importorskip("timm")


BROKEN = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
from . import inner
works = True
"""


def test_a_torchvision_built_for_another_torch_is_survived(tmp_path: Path) -> None:
    """In a process of its own: schemas cannot be taken back."""
    import subprocess

    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN)
    (package / "inner.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + (
        "from fxprune.process.libraries import survive_torchvision\n"
        "assert survive_torchvision() and survive_torchvision()\n"
        "import torchvision; assert torchvision.works\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_working_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", module)
    assert survive_torchvision()
    assert sys.modules["torchvision"] is module


def test_a_torchvision_broken_otherwise_is_reported_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text("raise OSError('libcudart.so is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not survive_torchvision()


def test_offline_holds_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    constants = pytest.importorskip("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    with offline():
        assert constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert before == constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


def test_no_source_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    timm_or_skip()
    load("timm:test_vit")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    failure(tmp_path)
    failure("bert-base-uncased")


def test_loaded_inputs_follow_the_names() -> None:
    loaded = Loaded(tiny(), "x", (1,), {"b": 2}, input_names=("a", "b"))
    assert loaded.inputs == {"a": 1, "b": 2}
