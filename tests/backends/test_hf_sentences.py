"""Sentence encoders come home: pooling, projection and normalisation with the transformer that became smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sentence_folders import WIDTH, sentence_folder, tokens

import fxprune
from fxprune.backends.hf import fresh, prove
from fxprune.backends.hf.load import load_whole
from fxprune.errors import VerifyError
from fxprune.intake.load import load
from fxprune.intake.pooling import SentenceEncoder

pytest.importorskip("transformers")
TANH = {"out_features": 24, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
TEXTS = ["a good film", "bad", "the very very bad film"]


@pytest.mark.parametrize(("layout", "inside"), [("uniform", ""), ("free", "0_Transformer")])
def test_the_folder_encodes_as_the_pruned_graph(layout: str, inside: str, tmp_path: Path) -> None:
    """In a process of its own without fxprune; small files byte for byte, weights where they lay."""
    dense = sentence_folder(tmp_path / "dense", ("mean", "cls"), [TANH], inside=inside)
    out = tmp_path / "small"
    made = fxprune.compile(str(dense), flops=0.7, target=f"hf{{layout={layout}}}", out=out, seconds=0)
    assert made.report["outputs"] == ["sentence_embedding"]
    assert made.report["lowering"]["fresh_process"]["max_rel"] <= prove.LIMIT
    assert made.report["payload"] == (Path(inside) / "model.safetensors").as_posix()
    small, was = out / inside / "model.safetensors", dense / inside / "model.safetensors"
    assert small.stat().st_size < was.stat().st_size
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        f"{inside}/tokenizer.json".lstrip("/"),
    ):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    with torch.no_grad():
        want = made.module(**tokens())["sentence_embedding"]
        torch.testing.assert_close(load_whole(out)(**tokens())["sentence_embedding"], want, rtol=0, atol=1e-6)
    assert type(fxprune.load_hf(out)).__name__ == "BertModel"
    run = made.backend.load(out / made.report["payload"])
    torch.testing.assert_close(run(list(tokens().values()))[0], want, rtol=0, atol=1e-6)
    (out / "model.pt2").unlink()
    if layout == "uniform":  # it is a folder as any other
        with torch.no_grad():
            torch.testing.assert_close(load(out).model(**tokens())["sentence_embedding"], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["uniform", "free"])
def test_sentence_transformers_loads_the_folder(layout: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    dense, out = sentence_folder(tmp_path / "dense", ("max", "mean"), [TANH]), tmp_path / "small"
    made = fxprune.compile(str(dense), flops=0.7, target=f"hf{{layout={layout}}}", out=out, seconds=0)
    assert made.report["lowering"]["fresh_process"]["encode"] == "equal"
    encoder = library.SentenceTransformer(str(out), trust_remote_code=layout == "free")
    given = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = made.module(**{one["name"]: given[one["name"]] for one in made.report["inputs"]})["sentence_embedding"]
    torch.testing.assert_close(torch.tensor(encoder.encode(TEXTS)), want, rtol=0, atol=1e-5)
    whole = library.SentenceTransformer(str(dense))
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in whole.parameters())


def test_widths_behind_the_transformer_are_those_of_the_folder(tmp_path: Path) -> None:
    """The layer between two projections may be cut where every layer has widths of its own."""
    dense = [{**TANH, "out_features": 64}, {**TANH, "out_features": 16}]
    folder, out = sentence_folder(tmp_path / "dense", dense=dense), tmp_path / "small"
    fxprune.compile(str(folder), params=0.8, target="hf{layout=free}", out=out, seconds=0, prune="ffn,channel")
    first, second = (json.loads((out / f"{n}_Dense" / "config.json").read_text()) for n in (2, 3))
    assert first["in_features"] == WIDTH
    assert first["out_features"] == second["in_features"] < 64
    assert second["out_features"] == 16


def test_a_folder_that_encodes_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: Any) -> Any:
        return {"generate": "no", "encode": "differs: by 1.0e-01, relative"}, outputs

    outputs: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(prove, "_run_fresh", found)
    monkeypatch.setattr(prove, "relative_error", lambda *_: 0.0)
    monkeypatch.setattr(prove, "LIMIT", float("inf"))
    with pytest.raises(VerifyError, match="other embeddings"):
        fxprune.compile(
            str(sentence_folder(tmp_path / "dense")), flops=0.7, target="hf", out=tmp_path / "small", seconds=0
        )
    assert not (tmp_path / "small").exists()


def test_what_the_library_makes_of_a_folder_is_compared(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    assert library
    folder = sentence_folder(tmp_path / "m", ("mean",))
    model, inputs = load_whole(folder), tokens()
    assert isinstance(model, SentenceEncoder)
    assert fresh.encode(str(folder), "", model, inputs) == "equal"
    assert fresh.encode("", "", model, inputs).startswith("not compared")
    assert fresh.encode("", str(folder), model, inputs).startswith("differs: it loads the dense folder")
    model.stages["pooling_1"].modes = ("cls",)
    assert fresh.encode(str(folder), "", model, inputs).startswith("differs: by")
