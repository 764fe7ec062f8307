"""Hugging Face folders: the right class, its own input sizes, no code and no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import LoadError
from fxprune.intake.load import load
from fxprune.process.libraries import survive_torchvision

survive_torchvision()
transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def build(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save(build("BertForSequenceClassification", num_labels=3, **TEXT), tmp_path / "bert")


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("name", "config", "shapes"),
    [
        ("BertForSequenceClassification", TEXT, {"input_ids": (2, 32), "attention_mask": (2, 32)}),
        (
            "RobertaModel",
            {**TEXT, "max_position_embeddings": 20, "pad_token_id": 1},
            {"input_ids": (2, 18), "attention_mask": (2, 18)},
        ),
        (
            "GPT2LMHeadModel",
            {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 99, "n_positions": 16, "bos_token_id": 1,
             "eos_token_id": 1},
            {"input_ids": (2, 16), "attention_mask": (2, 16)},
        ),
        ("ViTForImageClassification", VISION, {"pixel_values": (2, 3, 32, 32)}),
        (
            "VideoMAEForVideoClassification",
            {**VISION, "num_frames": 4, "tubelet_size": 2},
            {"pixel_values": (2, 4, 3, 32, 32)},
        ),
        (
            "CLIPModel",
            {"text_config": {**TEXT, "max_position_embeddings": 16, "eos_token_id": 5}, "vision_config": VISION},
            {"input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 3, 32, 32)},
        ),
        (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 99},
            {"input_ids": (2, 32), "attention_mask": (2, 32), "decoder_input_ids": (2, 8)},
        ),
        (
            "WhisperModel",
            {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
             "max_source_positions": 50, "max_target_positions": 20, "num_mel_bins": 16, "pad_token_id": 1,
             "decoder_start_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
            {"input_features": (2, 16, 100), "decoder_input_ids": (2, 8)},
        ),
    ],
)  # fmt: skip
def test_folders_give_the_class_its_weights_and_its_input_sizes(
    name: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    model = build(name, **config).eval()
    loaded = load(save(model, tmp_path / "hf"))
    assert type(loaded.model) is type(model)
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == shapes
    assert loaded.input_names == tuple(shapes)
    assert not loaded.model.training
    assert all(p.requires_grad for p in loaded.model.parameters())
    with torch.no_grad():
        ours, theirs = loaded.model(**loaded.kwargs), model(**loaded.kwargs)
    assert torch.equal(ours[0], theirs[0])
    assert not getattr(loaded.model.config, "use_cache", False)


def test_positional_input_text_is_given_its_name_and_mask(bert: Path) -> None:
    loaded = load(bert, input="1x7:int64")
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == {"input_ids": (1, 7), "attention_mask": (1, 7)}
    assert any("attention_mask" in note for note in loaded.notes)
    assert bool(loaded.kwargs["attention_mask"].all())
    with pytest.raises(LoadError, match="does not accept"):
        load(bert, input="1x3x8x8")


def test_preprocessing_comes_from_the_folder(tmp_path: Path) -> None:
    folder = save(build("ViTForImageClassification", **VISION), tmp_path / "vit")
    described = {
        "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    image = load(folder).image
    assert image is not None
    assert (image.mean, image.std, image.interpolation, image.crop) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "bicubic",
        0.8,
    )
    assert not image.assumed


def test_a_config_without_picture_size_takes_the_preprocessors(tmp_path: Path) -> None:
    model = build(
        "SegformerForSemanticSegmentation",
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
    )  # fmt: skip
    folder = save(model, tmp_path / "seg")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 96}}))
    assert load(folder).kwargs["pixel_values"].shape == (2, 3, 64, 96)


def test_no_architectures_entry_loads_the_bare_model(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    del config["architectures"]
    (bert / "config.json").write_text(json.dumps(config))
    loaded = load(bert)
    assert type(loaded.model).__name__ == "BertModel"
    assert any("does not use" in note and "classifier" in note for note in loaded.notes)


def test_a_head_without_weights_is_noted(tmp_path: Path) -> None:
    folder = save(build("BertModel", **TEXT), tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert any("random weights" in note and "classifier" in note for note in load(folder).notes)


def test_pytorch_bin_is_read_as_tensors_only(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(bert).model
    assert isinstance(before, nn.Module)
    (bert / "model.safetensors").unlink()
    torch.save(before.state_dict(), bert / "pytorch_model.bin")
    after = load(bert).model
    assert isinstance(after, nn.Module)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, ("canary",)

    monkeypatch.chdir(bert)
    torch.save({**before.state_dict(), "x": Evil()}, bert / "pytorch_model.bin")
    with pytest.raises(LoadError, match="refused"):
        load(bert)
    assert not (bert / "canary").exists()


def test_code_in_the_folder_never_runs(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bert)
    (bert / "modeling_own.py").write_text(f"import os; os.mkdir(r'{bert / 'canary'}')\nclass Own: pass\n")
    config = json.loads((bert / "config.json").read_text())
    remote = {"AutoConfig": "modeling_own.Own", "AutoModel": "modeling_own.Own"}
    extra = {"auto_map": remote, "attn_implementation": "someone/kernel", "trust_remote_code": True}
    (bert / "config.json").write_text(json.dumps({**config, **extra}))
    assert type(load(bert).model).__name__ == "BertForSequenceClassification"
    for name in ("Own", "pipeline", "BertTokenizer", "BertConfig", "AutoModel", "utils", "__class__", 3):
        (bert / "config.json").write_text(json.dumps({**config, **extra, "architectures": [name]}))
        with pytest.raises(LoadError, match="no model class"):
            load(bert)
    (bert / "config.json").write_text(json.dumps({**config, **extra, "architectures": None, "model_type": "own"}))
    with pytest.raises(LoadError, match="does not accept the config"):
        load(bert)
    assert not (bert / "canary").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"model_type": "bert", "architectures": ["BertModel"']
)
def test_damaged_configs_are_named(text: str, bert: Path) -> None:
    (bert / "config.json").write_text(text)
    with pytest.raises(LoadError) as caught:
        load(bert)
    assert "config.json" in caught.value.where


def test_damaged_and_missing_weights(bert: Path) -> None:
    data = (bert / "model.safetensors").read_bytes()
    for cut in (data[:1000], data[:-100], b""):
        (bert / "model.safetensors").write_bytes(cut)
        with pytest.raises(LoadError) as caught:
            load(bert)
        assert str(bert) in caught.value.where
    (bert / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="no weights"):
        load(bert)


def test_weights_of_another_config_are_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "hidden_size": 48, "num_attention_heads": 3}))
    with pytest.raises(LoadError, match="cannot load the weights"):
        load(bert)
    (bert / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(LoadError, match="quantised"):
        load(bert)


def test_a_pickled_transformers_module_loads_without_trust(tmp_path: Path) -> None:
    model = build("BertForSequenceClassification", **TEXT)
    torch.save(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert type(loaded.model) is type(model)
    assert loaded.kwargs["input_ids"].shape == (2, 32)
    generator = build("GPT2LMHeadModel", n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=16)
    torch.save(generator, tmp_path / "g.pt")
    assert load(tmp_path / "g.pt").kwargs["input_ids"].shape == (2, 16)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["Transformer", "Pooling", "Dense"], "Pooling, Dense"),
        (["Transformer", "Normalize"], ""),
        (None, ""),
        ("no list", ""),
    ],
)
def test_what_sentence_transformers_puts_behind_is_said(kinds: Any, said: str, bert: Path) -> None:
    listed = [{"type": f"sentence_transformers.models.{k}"} for k in kinds] if isinstance(kinds, list) else kinds
    if kinds is not None:
        (bert / "modules.json").write_text(json.dumps(listed))
    notes = [note for note in load(bert).notes if "modules.json" in note]
    assert len(notes) == bool(said)
    assert said in "".join(notes)
