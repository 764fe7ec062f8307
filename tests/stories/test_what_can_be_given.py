"""Every row of README's table of what can be given is opened, and every kind of data that it names is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.onnx_files import perceptron
from support.sentence_folders import sentence_folder
from torch import nn

import fxprune
from fxprune.data import load_data
from fxprune.intake.load import load
from fxprune.process.libraries import survive_torchvision

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## What you can give it")[2]
ROWS = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", README.partition("Inputs are")[0], re.M)[1:]]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).eval()


def pickled(folder: Path) -> dict[str, Any]:
    torch.save(network(), folder / "model.pt")
    return {"source": folder / "model.pt", "input": "1x3x16x16"}


def exported(folder: Path) -> dict[str, Any]:
    torch.export.save(torch.export.export(network(), (torch.randn(2, 3, 16, 16),)), folder / "model.pt2")
    return {"source": folder / "model.pt2"}


def onnx_file(folder: Path) -> dict[str, Any]:
    return {"source": perceptron(folder / "model.onnx")}


def hugging_face(folder: Path) -> dict[str, Any]:
    survive_torchvision()
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, **size)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return {"source": folder}


def sentences(folder: Path) -> dict[str, Any]:
    pytest.importorskip("transformers")
    return {"source": sentence_folder(folder / "encoder")}


def timm_name(folder: Path) -> dict[str, Any]:
    survive_torchvision()
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), folder / "weights.safetensors")
    options = {"checkpoint": folder / "weights.safetensors", "model_args": "img_size=64,num_classes=0"}
    return {"source": "timm:test_vit", **options}


def module(folder: Path) -> dict[str, Any]:
    return {"source": nn.DataParallel(network()), "input": torch.randn(2, 3, 16, 16)}


OPENED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "`model.pt` from `torch.save(model)`": pickled,
    "`model.pt2` from `torch.export.save`": exported,
    "`model.onnx`": onnx_file,
    "a Hugging Face folder": hugging_face,
    "a sentence-transformers folder": sentences,
    "`timm:vit_base_patch16_224`": timm_name,
    "an `nn.Module`": module,
}


def test_the_table_is_the_one_that_is_opened() -> None:
    assert [row[0] for row in ROWS if not row[0].startswith("---")] == list(OPENED)


@pytest.mark.parametrize("row", OPENED)
def test_every_row_is_opened_and_computes(row: str, tmp_path: Path) -> None:
    made = OPENED[row](tmp_path)
    loaded = load(made.pop("source"), **made)
    assert loaded.args or loaded.kwargs
    model = loaded.model if isinstance(loaded.model, nn.Module) else loaded.model.module()
    assert model(*loaded.args, **loaded.kwargs) is not None


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32), "labels": np.arange(4)}


def npz(folder: Path) -> Any:
    np.savez(folder / "d.npz", **arrays(folder))
    return folder / "d.npz"


def pt(folder: Path) -> Any:
    torch.save({k: torch.from_numpy(v) for k, v in arrays(folder).items()}, folder / "d.pt")
    return folder / "d.pt"


def safetensors(folder: Path) -> Any:
    save_file({k: torch.from_numpy(v) for k, v in arrays(folder).items()}, folder / "d.safetensors")
    return folder / "d.safetensors"


def images(folder: Path) -> Any:
    for kind in "ab":
        (folder / "images" / kind).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (i * 90, 60, 30)).save(folder / "images" / kind / f"{i}.png")
    return folder / "images"


def function(folder: Path) -> Any:
    (folder / "batches_of_mine.py").write_text(
        "import torch\ndef make():\n    yield torch.randn(4, 3, 16, 16), torch.arange(4)\n"
    )
    return "python:batches_of_mine:make"


DATA: dict[str, Callable[[Path], Any]] = {
    ".npz": npz,
    ".pt": pt,
    ".safetensors": safetensors,
    "folder of images": images,
    "python:module:function": function,
}
TEXTS = {
    ".csv": "text,label\na good film,1\nbad,0\n",
    ".jsonl": '{"text": "a good film", "label": 1}\n{"text": "bad", "label": 0}\n',
    ".txt": "a good film\nbad\n",
}


def test_the_sentence_names_the_kinds_that_are_read() -> None:
    said = " ".join(README.split()).partition("Calibration data")[2].partition("labels are optional")[0]
    assert all(kind in said for kind in [*DATA, *TEXTS])
    assert set(re.findall(r"`(\.\w+)`", said)) == {kind for kind in [*DATA, *TEXTS] if kind[0] == "."}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data(DATA[kind](tmp_path), load(network(), input="2x3x16x16"))
    sys.modules.pop("batches_of_mine", None)
    assert data.samples == 4
    assert data.labelled


def test_every_kind_of_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    loaded = load(**{"source": hugging_face(tmp_path / "bert")["source"]})
    for suffix, text in TEXTS.items():
        (tmp_path / f"d{suffix}").write_text(text)
        assert load_data(tmp_path / f"d{suffix}", loaded).samples == 2


def test_inputs_of_every_kind_of_the_page_are_taken(tmp_path: Path) -> None:
    """Shapes, a file, tensors, arrays; by position, by name, in one dict."""
    x = torch.randn(2, 3, 16, 16)
    np.savez(tmp_path / "x.npz", input=x.numpy())
    for given in ("2x3x16x16", str(tmp_path / "x.npz"), x, x.numpy(), (x,), {"input": x}):
        assert fxprune.inspect(network(), given).name == "Sequential"
    assert load(nn.Embedding(9, 4), input="1x128:int64").args[0].dtype == torch.int64
