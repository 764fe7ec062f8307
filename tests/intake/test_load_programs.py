"""Exported programs: they bring their inputs, and no code that runs when they are read."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.process.libraries import survive_torchvision


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(144, 2)))


def failure(source: Any, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(source, **options)
    assert caught.value.exit_code == 2
    return caught.value


def export(path: Path) -> torch.export.ExportedProgram:
    program = torch.export.export(tiny().eval(), (torch.randn(2, 3, 8, 8),))
    torch.export.save(program, path)
    return program


def test_a_pt2_brings_its_inputs(tmp_path: Path) -> None:
    program = export(tmp_path / "net.pt2")
    loaded = load(tmp_path / "net.pt2")
    assert isinstance(loaded.model, torch.export.ExportedProgram)
    assert loaded.args[0].shape == (2, 3, 8, 8)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.model.module()(x), program.module()(x))
    assert load(program).input_names == ("input",)


def test_a_program_without_example_inputs_gets_new_ones(tmp_path: Path) -> None:
    program = export(tmp_path / "net.pt2")
    program._example_inputs = None
    assert load(program).args[0].shape == (2, 3, 8, 8)


def test_an_artefact_folder_is_loaded_by_its_program(tmp_path: Path) -> None:
    export(tmp_path / "model.pt2")
    (tmp_path / "plan.json").write_text("{}")
    assert load(tmp_path).name == tmp_path.name


def rewrite(source: Path, target: Path, entry: str, change: Callable[[bytes], bytes]) -> None:
    """Copy an archive with one entry changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith(entry) else old.read(name))


def test_a_pt2_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "canary"),)

    export(tmp_path / "good.pt2")
    rewrite(tmp_path / "good.pt2", tmp_path / "evil.pt2", "sample_inputs/model.pt", lambda _: pickle.dumps(Evil()))
    error = failure(tmp_path / "evil.pt2")
    assert "could run code" in error.what
    assert not (tmp_path / "canary").exists()


def test_a_pt2_whose_structure_imports_a_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text(f"import os; os.mkdir(r'{tmp_path / 'canary'}')")
    monkeypatch.syspath_prepend(str(tmp_path))
    factory = {"default_factory_module": "planted", "default_factory_name": "x", "dict_context": []}
    default = json.dumps([1, {"type": "collections.defaultdict", "context": json.dumps(factory), "children_spec": []}])
    member = json.dumps({"__enum__": True, "fqn": "planted:X", "name": "A"})
    enumeration = json.dumps([1, {"type": "builtins.dict", "context": member, "children_spec": []}])
    export(tmp_path / "good.pt2")
    for spec in (default, enumeration, default.replace("default_factory", "default\\u005ffactory")):

        def change(data: bytes, spec: str = spec) -> bytes:
            program = json.loads(data)
            program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec
            return json.dumps(program).encode()

        rewrite(tmp_path / "good.pt2", tmp_path / "evil.pt2", "models/model.json", change)
        assert "could run code" in failure(tmp_path / "evil.pt2").what
        assert not (tmp_path / "canary").exists()


def test_a_pickled_torchvision_model_loads(tmp_path: Path) -> None:
    """Also where the installed torchvision was built for another torch."""
    if not survive_torchvision():
        pytest.skip("torchvision is not installed")
    from torchvision.models import VisionTransformer

    torch.save(VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=3), tmp_path / "tv.pt")
    loaded = load(tmp_path / "tv.pt")
    assert type(loaded.model) is VisionTransformer
    assert loaded.args[0].shape == (2, 3, 32, 32), "its own image_size"
    assert loaded.image is not None
    assert loaded.image.assumed
