"""Models from every kind of source, with example inputs that fit; and what is said when something is wrong."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.process.libraries import survive_torchvision


def tiny() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), flat=nn.Flatten(), fc=nn.Linear(144, 2)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.table(ids).mean(1) * scale


def failure(source: Any, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(source, **options)
    assert caught.value.exit_code == 2
    return caught.value


# --- modules and example inputs ----------------------------------------------------------------------------------


def test_a_module_is_taken_as_it_is() -> None:
    model = tiny().train()
    loaded = load(model, input="1x3x8x8")
    assert loaded.model is model
    assert model.training, "the caller's module is not changed"
    assert (loaded.name, loaded.input_names) == ("Sequential", ("input",))


@pytest.mark.parametrize(
    ("text", "shapes", "dtypes"),
    [("1x3x8x8", [(1, 3, 8, 8)], [torch.float32]), ("4x3x8x8:float16", [(4, 3, 8, 8)], [torch.float16])],
)
def test_input_text_gives_shapes_types_and_the_batch_that_it_names(
    text: str, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]
) -> None:
    model = tiny() if "float16" not in text else tiny().half()
    loaded = load(model, input=text)
    assert [tuple(t.shape) for t in loaded.args] == shapes
    assert [t.dtype for t in loaded.args] == dtypes


def test_several_inputs_by_position_and_by_name() -> None:
    loaded = load(TwoInputs(), input="1x5:int64,1x4")
    assert [t.shape for t in loaded.args] == [(1, 5), (1, 4)]
    assert int(loaded.args[0].max()) < 11, "ids stay inside the table"
    assert int(loaded.args[0].max()) > 1, "and use it"
    named = load(TwoInputs(), input="scale=1x4,ids=1x5:int64")
    assert named.inputs.keys() == {"ids", "scale"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3xx4", "not understood"),
        ("", "not understood"),
        ("1x3:int-8", "not understood"),
        ("1x3:float99", "type is unknown"),
        ("0x3", "makes no sense"),
        ("99999x99999x99999", "makes no sense"),
        ("nope=1x3", "no input 'nope'"),
        ("1x3x9x9", "does not accept"),
        ("1x3x8x8,1x2", "does not accept"),
    ],
)
def test_bad_input_text_says_what_is_wrong(text: str, says: str) -> None:
    assert says in failure(tiny(), input=text).what


def test_wrong_shapes_name_what_the_model_takes() -> None:
    error = failure(tiny(), input="1x3x9x9")
    assert "[2, 3, 8, 8]" in error.why
    assert "on these it says: " in error.why, "and what the model has to say"


class Picky(nn.Module):
    """What it runs on is real: a fake kernel that knows less than the real one, as of grouped products in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            raise RuntimeError("Expected inputs of BF16 type")
        if len(x) > 4:
            raise RuntimeError("too many samples")
        return x + 1


def test_a_model_that_runs_is_not_refused_for_what_fake_tensors_cannot() -> None:
    assert load(Picky(), input="2x3").args[0].shape == (2, 3)
    error = failure(Picky(), input="5x3")
    assert error.what == "the model does not accept these inputs"
    assert error.why == "it says: RuntimeError: too many samples"


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_example_inputs_from_a_file(suffix: str, tmp_path: Path) -> None:
    ids, scale = torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 4)
    path = tmp_path / f"inputs{suffix}"
    if suffix == ".npz":
        np.savez(path, ids=ids.numpy(), scale=scale.numpy())
    elif suffix == ".pt":
        torch.save({"ids": ids, "scale": scale}, path)
    else:
        save_file({"ids": ids, "scale": scale}, path)
    loaded = load(TwoInputs(), input=str(path))
    assert torch.equal(loaded.kwargs["ids"], ids)
    assert load(TwoInputs(), input=path).kwargs.keys() == {"ids", "scale"}


def test_tensors_given_in_python_are_example_inputs() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert load(tiny(), input=x).args[0] is x
    assert load(TwoInputs(), input=(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 4))).input_names == (
        "ids",
        "scale",
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 2)), (2, 5)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 3)), (2, 1, 28, 28)),
        (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4)), (2, 16)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 8, 16)),
    ],
)
def test_a_model_without_description_is_tried_by_its_first_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    loaded = load(model)
    assert tuple(loaded.args[0].shape) == shape
    model(*loaded.args)


def test_a_model_that_says_nothing_asks_for_input() -> None:
    error = failure(TwoInputs())
    assert "example_inputs=" in error.cure
    assert "ids, scale" in error.why
    assert load(TwoInputs(), need_inputs=False).args == ()


# --- timm ---------------------------------------------------------------------------------------------------------


def timm_or_skip() -> Any:
    survive_torchvision()
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def timm_state() -> dict[str, torch.Tensor]:
    timm = timm_or_skip()
    torch.manual_seed(1)
    return timm.create_model("test_vit", num_classes=5).state_dict()


def test_timm_by_name_takes_size_and_normalisation_from_its_cfg() -> None:
    timm_or_skip()
    loaded = load("timm:test_vit")
    assert loaded.args[0].shape == (2, 3, 160, 160)
    assert loaded.image is not None
    assert loaded.image.size == (3, 160, 160)
    assert not loaded.image.assumed
    assert any("random" in note for note in loaded.notes), "nobody may take random weights for pretrained ones"
    again = load("timm:test_vit")
    assert isinstance(loaded.model, nn.Module)
    assert isinstance(again.model, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.drawn(2)
@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped.pth", "module.pt"])
def test_timm_checkpoints_in_all_forms(form: str, timm_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(timm_state, path)
    elif form == "pt":
        torch.save(timm_state, path)
    elif form == "wrapped.pth":
        prefixed = {f"module.{k}": v for k, v in timm_state.items()}
        torch.save({"state_dict": prefixed, "epoch": 3, "arch": "test_vit"}, path)
    else:
        import timm

        model = timm.create_model("test_vit", num_classes=5)
        model.load_state_dict(timm_state)
        torch.save(model, path)
    loaded = load("timm:test_vit", checkpoint=path)
    assert isinstance(loaded.model, nn.Module)
    own = loaded.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in timm_state.items()), "five classes, as in the checkpoint"
    assert not loaded.notes


def test_a_checkpoint_that_does_not_fit_lists_the_differences(
    timm_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = dict(timm_state)
    del state["pos_embed"]
    state["extra.weight"] = torch.zeros(3)
    state["norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    error = failure("timm:test_vit", checkpoint=tmp_path / "w.pt")
    for name in ("missing pos_embed", "left over extra.weight", "norm.weight: checkpoint 3"):
        assert name in error.why


def test_unknown_timm_names_get_the_nearest() -> None:
    timm_or_skip()
    assert "vit_tiny_patch16_224" in failure("timm:vit_tini_patch16_224").cure
    for name in ("", "hf-hub:timm/test_vit.r160_in1k", "local-dir:/tmp", "../x"):
        assert "timm has no model" in failure(f"timm:{name}").what


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_weights_alone_ask_for_the_architecture(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pt")
    torch.save({"model": tiny().state_dict(), "epoch": 1}, tmp_path / "w.pth")
    save_file(dict(tiny().state_dict()), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.pth", "w.safetensors"):
        error = failure(tmp_path / name)
        assert "weights alone" in error.what
        assert "timm:NAME with checkpoint=" in error.cure
    assert "state dict has no architecture" in failure(tiny().state_dict()).cure


def test_nan_weights_are_named() -> None:
    model = tiny()
    with torch.no_grad():
        model.conv.weight[0] = float("nan")  # type: ignore[union-attr, operator]
    error = failure(model, input="1x3x8x8")
    assert "conv.weight" in error.where
    assert "fc.weight" not in error.where
    model = nn.BatchNorm1d(3)
    assert model.running_mean is not None
    model.running_mean[0] = float("nan")
    assert "running_mean" in failure(model).where
    masked = nn.Linear(2, 2)
    masked.register_buffer("mask", torch.full((2,), float("-inf")))
    assert load(masked).args[0].shape == (2, 2), "a mask of -inf is no mistake"


def test_modules_without_weights_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert "meta" in failure(model).why


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.pt", b"", "empty"),
        ("garbage.pt", b"hello world, this is no model", "no file that torch.save wrote"),
        ("pickle.pt", b"\x80\x02garbage", "cannot load"),
        ("zip.pt", b"PK\x03\x04garbage", "cannot be read"),
        ("garbage.pt2", b"PK\x03\x04garbage", ""),
        ("model.onnx", b"\x08\x07", "ONNX"),
        ("model.h5", b"\x89HDF", "no kind of model file"),
        ("w.safetensors", b"\xff" * 16, "weights alone"),
    ],
)
def test_files_that_are_no_models(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    error = failure(tmp_path / name)
    assert says in error.what
    assert str(tmp_path / name) in error.where


def test_missing_files_and_wrong_folders(tmp_path: Path) -> None:
    assert "no such file" in failure(tmp_path / "gone.pt").what
    assert "timm:resnet18" in failure("resnet18").cure
    assert "neither config.json" in failure(tmp_path).why
    assert "no such file" in failure("timm:test_vit", checkpoint=tmp_path / "gone.pt").what
    assert "no path" in failure("a\0b.pt").what


def test_a_checkpoint_wants_a_timm_name(tmp_path: Path) -> None:
    assert "needs an architecture" in failure(tiny(), checkpoint=tmp_path / "w.pt").what
    assert "no model" in failure(42).what
    torch.save([1, 2, 3], tmp_path / "list.pt")
    assert "holds a list" in failure(tmp_path / "list.pt").why
