"""A pickled module loads when it holds known modules, and nothing in a hostile file runs."""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.intake.pickles import load_pickle
from fxprune.intake.rehearsal import rehearse


def write_archive(path: Path, program: bytes, extra: dict[str, bytes] | None = None) -> Path:
    """An archive as torch.save writes it, around a pickle program of our own making."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **(extra or {})}.items():
            archive.writestr(f"m/{name}", data)
    return path


class Call:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.args

    def __call__(self) -> None:  # pickle wants what it writes as a function to be callable
        raise AssertionError("never called")


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.GELU(), flat=nn.Flatten(), fc=nn.Linear(144, 2)))


def test_pickled_module_loads_in_evaluation_form_with_its_weights(tmp_path: Path) -> None:
    model = tiny()
    torch.save(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", input="1x3x8x8")
    assert isinstance(loaded.model, nn.Sequential)
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.model(x), model.eval()(x))
    assert loaded.name == "model"
    assert loaded.args[0].shape == (1, 3, 8, 8)


def test_modules_with_functions_and_partials_inside_load(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True), 1)
    encoder.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    torch.save(encoder, tmp_path / "m.pt")
    model = load(tmp_path / "m.pt").model
    assert isinstance(model, nn.TransformerEncoder)
    assert model.norm_layer(4).eps == 1e-6


def test_timm_module_loads(tmp_path: Path) -> None:
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    torch.save(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert type(loaded.model) is type(model)
    assert loaded.args[0].shape == (2, 3, 32, 32), "the size it was built for, not that of the pretrained weights"
    assert loaded.image is not None
    assert loaded.image.mean == (0.5, 0.5, 0.5)


def test_data_parallel_and_wrapped_modules_are_unwrapped(tmp_path: Path) -> None:
    torch.save({"model": tiny(), "epoch": 3}, tmp_path / "a.pt")
    torch.save(nn.DataParallel(tiny()), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        assert isinstance(load(tmp_path / name, input="1x3x8x8").model, nn.Sequential)


CANARY = "canary"


def hostile() -> dict[str, Any]:
    """Files that would make a folder called ``canary`` if anything in them ran."""
    make = f"mkdir {CANARY}"
    module = tiny()
    hidden = tiny()
    hidden.extra = Call(os.system, make)  # type: ignore[assignment]
    return {
        "os.system": Call(os.system, make),
        "inside a module": hidden,
        "eval": Call(eval, f"__import__('os').mkdir('{CANARY}')"),
        "exec": Call(exec, f"import os; os.mkdir('{CANARY}')"),
        "getattr": Call(getattr, module, "forward"),
        "nested getattr": Call(Call(getattr, Call(getattr, nn.Linear, "__init__"), "__globals__"), "torch"),
        "partial of a partial": Call(Call(functools.partial, os.mkdir, CANARY)),
        "partial": Call(functools.partial, os.mkdir, CANARY),
        "torch.load": Call(torch.load, "other.pt"),
        "torch.hub": Call(torch.hub.load, "owner/repo", "model"),
        "importlib": Call(__import__("importlib").import_module, "antigravity"),
        "a constructor": Call(nn.Linear, 4, 4),
        "a module called": Call(nn.Sequential),
        "rebuild calls a constructor": Call(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (4, 4), {}),
        "a graph module": torch.fx.symbolic_trace(nn.ReLU()),
    }


@pytest.mark.parametrize("name", sorted(hostile()))
def test_hostile_pickles_are_refused_and_do_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = pickle.dumps(hostile_part(hostile()[name]), protocol=2)
    write_archive(tmp_path / "evil.pt", program)
    with pytest.raises(LoadError, match="refused") as caught:
        load(tmp_path / "evil.pt")
    assert not (tmp_path / CANARY).exists()
    assert "trust_pickle=True" in caught.value.cure


def hostile_part(thing: Any) -> Any:
    """Tensors cannot go through plain pickle; what matters is the call beside them."""
    if isinstance(thing, nn.Sequential):
        return [thing.extra]
    return thing


def test_a_hostile_object_among_real_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tiny().state_dict(), "hook": Call(os.mkdir, CANARY)}, tmp_path / "evil.pt")
    with pytest.raises(LoadError, match="refused"):
        load("timm:resnet18", checkpoint=tmp_path / "evil.pt")
    assert not (tmp_path / CANARY).exists()


def test_the_refusal_lists_the_names(tmp_path: Path) -> None:
    torch.save([Call(os.getcwd), Call(os.path.join, "a", "b")], tmp_path / "m.pt")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m.pt")
    assert f"{os.getcwd.__module__}.getcwd" in caught.value.why
    assert f"{os.path.join.__module__}.join" in caught.value.why


def test_trusting_the_pickle_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Call(os.mkdir, CANARY), tmp_path / "m.pt")
    with pytest.raises(LoadError, match="holds no model"):
        load(tmp_path / "m.pt", trust_pickle=True)
    assert (tmp_path / CANARY).is_dir()


@pytest.mark.parametrize(
    "package", ["timm_evil.models.x", "torchx.nn.modules.linear", "timm.evil", "transformers_x.models"]
)
def test_nothing_is_imported_for_a_file_that_names_strangers(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even packages whose name begins like a known one, lying on the path."""
    folder = tmp_path.joinpath(*package.split(".")[:-1])
    folder.mkdir(parents=True)
    for part in (folder, *folder.parents):
        if part == tmp_path:
            break
        (part / "__init__.py").write_text(f"import os; os.mkdir(r'{tmp_path / CANARY}')")
    (folder / f"{package.split('.')[-1]}.py").write_text(f"import os; os.mkdir(r'{tmp_path / CANARY}')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    program = b"\x80\x02c" + package.encode() + b"\nEvil\n)\x81}b."
    with pytest.raises(LoadError, match="refused") as caught:
        load(write_archive(tmp_path / "m.pt", program))
    assert f"{package}.Evil" in caught.value.why
    assert not (tmp_path / CANARY).exists()
    assert not [name for name in set(sys.modules) - before if name.startswith(package.partition(".")[0])]


def test_a_package_beside_the_model_is_not_taken_for_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "torchvision" / "models"
    home.mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").write_text(f"import os; os.mkdir(r'{tmp_path / CANARY}')")
    (home / "__init__.py").write_text("")
    (home / "evil.py").write_text(f"import os; os.mkdir(r'{tmp_path / CANARY}')\nfrom torch.nn import Linear")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    program = b"\x80\x02ctorchvision.models.evil\nNet\n)\x81}b."
    with pytest.raises(LoadError, match="refused"):
        load(write_archive(tmp_path / "m.pt", program))
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load",
        "torch.nn.modules.linear.math",
        "torch.nn.modules.module._load_state_dict",
        "torch.nn.init.normal_",
        "transformers.pipeline",
        "transformers.models.bert.modeling_bert.logger",
        "transformers.models.bert.tokenization_bert.BertTokenizer",
        "timm.models.create_model",
        "timm.layers.create_norm.get_norm_layer",
        "builtins.getattr",
        "torch.jit._script.RecursiveScriptModule",
        "torch.fx.graph_module.GraphModule",
        "torch.serialization.load",
    ],
)
def test_functions_and_objects_of_known_packages_are_refused(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    program = b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n."
    with pytest.raises(LoadError, match="refused") as caught:
        load_pickle(write_archive(tmp_path / "m.pt", program), modules=True)
    assert name.removeprefix("builtins.") in caught.value.why


def test_state_that_replaces_methods_or_adds_hooks_is_refused(tmp_path: Path) -> None:
    replaced, hooked = nn.Linear(2, 2), nn.Linear(2, 2)
    replaced.forward = torch.nn.functional.relu  # type: ignore[method-assign]
    hooked._forward_hooks[0] = torch.nn.functional.relu  # type: ignore[assignment]
    for model in (replaced, hooked):
        torch.save(nn.Sequential(model), tmp_path / "m.pt")
        with pytest.raises(LoadError, match="hooks or replaces methods") as caught:
            load(tmp_path / "m.pt", input="1x2")
        assert "'0'" in caught.value.where


def test_new_objects_with_arguments_and_other_protocols_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="refused"):
        rehearse(b"\x80\x02ctorch.nn.modules.linear\nLinear\nK\x04K\x04\x86\x81.")
    torch.save(tiny(), tmp_path / "m.pt", pickle_protocol=4)
    with pytest.raises(LoadError, match="protocol 2"):
        load(tmp_path / "m.pt")


def test_rehearsal_says_what_a_pickle_would_do_without_doing_it() -> None:
    seen = rehearse(pickle.dumps(OrderedDict(a=Call(os.system, "x")), protocol=2))
    assert f"{os.system.__module__}.system" in seen.called
    assert seen.root == "collections.OrderedDict"


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * (64 * 1024**2))
    with pytest.raises(LoadError, match="claims to hold more"):
        load(tmp_path / "m.pt")


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; users still have such files
        torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)).save(tmp_path / "m.pt")
    with pytest.raises(LoadError, match="TorchScript") as caught:
        load(tmp_path / "m.pt")
    assert "nn.Module" in caught.value.cure


def test_formats_before_torch_1_6_give_weights_only(tmp_path: Path) -> None:
    from fxprune.intake.tensors import read_checkpoint

    state = tiny().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth").tensors.keys() == state.keys()
    torch.save(Call(os.mkdir, CANARY), tmp_path / "evil.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(LoadError):
        load(tmp_path / "evil.pth")
    assert not Path(CANARY).exists()


def test_the_allow_list_is_gone_after_loading(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "m.pt")
    load(tmp_path / "m.pt", input="1x3x8x8")
    left = [g[1] for g in torch.serialization.get_safe_globals() if isinstance(g, tuple)]
    assert not [name for name in left if name.startswith("torch.nn.modules")]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_damaged_not_crashes(kept: float, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(tiny(), buffer)
    data = buffer.getvalue()
    (tmp_path / "m.pt").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in caught.value.where
