"""Folders of sentence-transformers: loaded as the module from token ids to embeddings; nothing of them is run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.sentence_folders import WIDTH, sentence_folder, tokens
from torch import Tensor

from fxprune.data import load_data
from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.intake.pooling import MODES, Pooling, SentenceEncoder

pytest.importorskip("transformers")
TANH = {"out_features": 24, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
BY_HAND: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "cls": lambda row: row[0],
    "lasttoken": lambda row: row[-1],
    "max": lambda row: torch.stack(row).max(0).values,
    "mean": lambda row: sum(row, torch.zeros(())) / len(row),
    "mean_sqrt_len_tokens": lambda row: sum(row, torch.zeros(())) / math.sqrt(len(row)),
    "weightedmean": lambda row: sum((n * x for n, x in enumerate(row, 1)), torch.zeros(())) / sum(range(len(row) + 1)),
}


def test_by_hand_is_every_mode() -> None:
    assert set(BY_HAND) == set(MODES)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_is_what_is_written_by_hand(mode: str, left: bool) -> None:
    """Whatever stands in the padding, in front of the text or behind it."""
    hidden, mask = torch.randn(3, 7, 5), tokens()["attention_mask"]
    mask = mask.flip(1) if left else mask
    rows = [[hidden[b, t] for t in range(7) if mask[b, t]] for b in range(3)]
    want = torch.stack([BY_HAND[mode](row) for row in rows])
    torch.testing.assert_close(Pooling([mode], left)(hidden, mask), want)
    both = Pooling([mode, "mean"], left)(hidden, mask)
    torch.testing.assert_close(both, torch.cat([want, torch.stack([BY_HAND["mean"](row) for row in rows])], 1))


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_the_model_is_the_one_that_people_use(inside: str, tmp_path: Path) -> None:
    import transformers

    folder = sentence_folder(tmp_path / "m", ("cls", "mean"), [TANH], inside=inside)
    loaded = load(folder)
    assert isinstance(loaded.model, SentenceEncoder)
    assert not any("left out" in note for note in loaded.notes)
    assert loaded.input_names == ("input_ids", "attention_mask", "token_type_ids")
    given = tokens()
    with torch.no_grad():
        found = loaded.model(**given)["sentence_embedding"]
        hidden = transformers.BertModel.from_pretrained(folder / inside).eval()(**given).last_hidden_state
    state = load_file(folder / "2_Dense" / "model.safetensors")
    rows = [
        [x for x, m in zip(h, mask, strict=True) if m] for h, mask in zip(hidden, given["attention_mask"], strict=True)
    ]
    pooled = torch.stack([torch.cat([BY_HAND["cls"](row), BY_HAND["mean"](row)]) for row in rows])
    want = torch.tanh(pooled @ state["linear.weight"].T + state["linear.bias"])
    torch.testing.assert_close(found, want / want.norm(dim=1, keepdim=True))
    (tmp_path / "d.txt").write_text("a good film\n" + "very " * 40 + "bad\n")
    assert load_data(tmp_path / "d.txt", loaded).batches[0].kwargs["input_ids"].shape == (2, 16)


def test_switches_of_older_folders_and_no_activation(tmp_path: Path) -> None:
    folder = sentence_folder(
        tmp_path / "m", ("mean",), [{"out_features": 8, "bias": False}], normalize=False, side="left"
    )
    old = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    (folder / "2_Dense" / "config.json").write_text(
        json.dumps({"in_features": 2 * WIDTH, "out_features": 8, "bias": False})
    )
    state = load_file(folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "model.safetensors").unlink()
    weight = torch.cat([state["linear.weight"]] * 2, 1)
    torch.save({"linear.weight": weight}, folder / "2_Dense" / "pytorch_model.bin")
    model = load(folder).model
    assert isinstance(model, SentenceEncoder)
    pool, dense = model.stages.values()
    assert (pool.modes, pool.left) == (("mean", "lasttoken"), True)
    assert type(dense.activation) is torch.nn.Tanh
    assert torch.equal(dense.linear.weight, weight)


@pytest.mark.parametrize(
    ("place", "said", "why"),
    [
        ("2_Dense", {"activation_function": "os.system"}, "has the activation os.system"),
        ("2_Dense", {"activation_function": "torch.hub.load"}, "has the activation torch.hub.load"),
        ("2_Dense", {"activation_function": None}, "has the activation None"),
        ("2_Dense", {"module_input_name": "token_embeddings"}, "works on token_embeddings"),
        ("1_Pooling", {"pooling_mode": "attention"}, "its pooling is"),
        (".", {"transformer_task": "fill-mask"}, "transformer_task 'fill-mask'"),
    ],
)
def test_what_is_not_known_is_left_out_with_a_note(place: str, said: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m", dense=[TANH])
    path = folder / place / ("config.json" if place != "." else "sentence_bert_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    loaded = load(folder)
    assert type(loaded.model).__name__ == "BertModel"
    (note,) = (n for n in loaded.notes if "left out" in n)
    assert "Pooling, Dense" in note
    assert why in note


def test_no_class_of_the_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sentence_folder(tmp_path / "m", dense=[TANH])
    for name in ("planted.py", "2_Dense/planted.py"):
        (folder / name).write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.syspath_prepend(folder)
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*listed[:2], {**listed[2], "type": "planted.Dense"}]))
    (note,) = (n for n in load(folder).notes if "left out" in n)
    assert "Pooling, Dense" in note
    assert "planted" not in sys.modules
    (folder / "modules.json").write_text(json.dumps([*listed[:2], {**listed[2], "path": "../2_Dense"}]))
    assert type(load(folder).model).__name__ == "BertModel"


def test_of_an_encoder_with_a_decoder_the_encoder_is_taken(tmp_path: Path) -> None:
    import transformers

    folder = sentence_folder(tmp_path / "m", dense=[TANH], inside="0_Transformer")
    size = {"vocab_size": 99, "d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**size)).save_pretrained(folder / "0_Transformer")
    loaded = load(folder)
    assert isinstance(loaded.model, SentenceEncoder)
    assert type(loaded.model.transformer).__name__ == "T5EncoderModel"
    assert loaded.model(**loaded.kwargs)["sentence_embedding"].shape == (2, 24)


def test_damage_is_said(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m", dense=[TANH])
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LoadError, match="behind the transformer cannot be loaded"):
        load(folder)
    (folder / "2_Dense" / "config.json").write_text(json.dumps({**TANH, "in_features": "wide"}))
    with pytest.raises(LoadError, match="behind the transformer cannot be loaded"):
        load(folder)
