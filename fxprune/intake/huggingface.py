"""Hugging Face folders: a class of transformers by the folder's ``architectures`` entry, and inputs by its config."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoadError
from ..process.libraries import offline, survive_torchvision
from ..process.silence import quiet
from .example_inputs import BATCH, LENGTH, make
from .forward import parameter_names
from .images import preprocessor_size, read_preprocessor
from .pickles import read_weights
from .rehearsal import first_line
from .tensors import find_weights, shorten

_LARGEST_CONFIG = 16 * 1024**2  # bytes
# Entries of a config that make transformers fetch or run code or weights from elsewhere.
_FOREIGN = frozenset({"auto_map", "custom_pipelines", "trust_remote_code", "kernel_config", "use_kernels"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "tokenizer.model")
_SUBCONFIGS = ("vision_config", "text_config", "backbone_config", "encoder", "decoder", "audio_config")


def load_folder(
    folder: Path, changed: Mapping[str, Any] | None = None, encoder: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in a Hugging Face folder, in float32 and evaluation form, and notes on its weights.

    changed  entries of its config with other values
    encoder  the class without a head, whatever head the folder has: the text encoder of one with a decoder

    The class is ``architectures[0]`` of config.json, from transformers itself: code in the folder is never run. Nothing
    is fetched. Weights are read from safetensors, or from pytorch_model.bin as tensors only.
    Raises LoadError when config or weights are missing, damaged, quantised or do not belong together.
    """
    raw = _read_config(folder)
    survive_torchvision()
    try:
        with quiet():
            import transformers
    except Exception as failure:
        cure = "pip install 'fxprune[transformers]'"
        raise LoadError(
            "transformers cannot be imported", where=str(folder), why=first_line(failure), cure=cure
        ) from None
    if raw.get("quantization_config"):
        raise LoadError(
            "quantised models are not supported",
            where=str(folder / "config.json"),
            why="it has a quantization_config",
            cure="use the model's unquantised weights",
        )
    cls: Any = transformers.AutoModel if encoder else _model_class(transformers, raw, folder)
    with offline(), quiet():
        try:
            config = _config(transformers, cls, raw)
            _change(config, changed or {}, folder)
            if cls is transformers.AutoModel:
                cls = transformers.AutoModel._model_mapping[type(config)]
            texts = transformers.AutoModelForTextEncoding._model_mapping
            if encoder and "decoder_input_ids" in inspect.signature(cls.forward).parameters and type(config) in texts:
                cls = texts[type(config)]
        except LoadError:
            raise
        except Exception as failure:
            raise LoadError(
                "transformers does not accept the config", where=str(folder / "config.json"), why=first_line(failure)
            ) from None
        switch_cache_off(config)
        source = _weights(folder)
        try:
            model, info = cls.from_pretrained(
                None if isinstance(source, dict) else str(folder),
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                **({"state_dict": source} if isinstance(source, dict) else {"use_safetensors": True}),
            )
        except Exception as failure:
            raise LoadError(
                "transformers cannot load the weights",
                where=str(folder),
                why=first_line(failure),
                cure="the weight file is damaged, or belongs to another config.json: get the folder again",
            ) from None
    return model.eval(), _notes(model, info, raw, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"{path.stat().st_size} bytes is no configuration")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as failure:
        raise LoadError(
            "the model's config cannot be read",
            where=str(path),
            why=first_line(failure),
            cure="a Hugging Face folder has a config.json beside its weights; save_pretrained writes both",
        ) from None
    cleaned: dict[str, Any] = _without_foreign(raw)
    return cleaned


def _without_foreign(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {
            k: _without_foreign(v)
            for k, v in value.items()
            if k not in _FOREIGN and not k.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
        }
        if kept.get("use_pretrained_backbone"):  # the folder's own weights follow
            kept["use_pretrained_backbone"] = False
        return kept
    return [_without_foreign(v) for v in value] if isinstance(value, list) else value


def _model_class(transformers: Any, raw: Mapping[str, Any], folder: Path) -> Any:
    listed = raw.get("architectures")
    if not listed:
        return transformers.AutoModel
    name = listed[0] if isinstance(listed, list) else listed
    found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise LoadError(
            f"transformers has no model class '{name}'",
            where=str(folder / "config.json"),
            why="the class comes from transformers itself; code in the folder or on a hub is never run",
            cure="build the model in Python and pass it to fxprune.compile, or save it with torch.export.save as .pt2",
        )
    return found


def _config(transformers: Any, cls: Any, raw: dict[str, Any]) -> Any:
    config_class = getattr(cls, "config_class", None)
    if config_class is None or cls is transformers.AutoModel:
        config_class = transformers.CONFIG_MAPPING[raw["model_type"]]
    return config_class.from_dict(raw)


def _change(config: Any, changed: Mapping[str, Any], folder: Path) -> None:
    """Set entries of a config. Raises LoadError for those that it does not have, or that would run code or fetch."""
    for name, value in changed.items():
        known = hasattr(config, name) and not callable(getattr(config, name)) and not name.startswith("_")
        if not known or name in _FOREIGN:
            close = difflib.get_close_matches(name, [k for k in config.to_dict() if k not in _FOREIGN], n=3)
            raise LoadError(
                f"the config has no entry '{name}'",
                where=str(folder / "config.json"),
                why="`--model-args` change entries of it",
                cure=f"did you mean {' or '.join(close)}?" if close else "config.json lists most of them",
            )
        setattr(config, name, value)


def switch_cache_off(config: Any) -> None:
    """A cache of keys and values is an output nobody wants of a compiled encoder."""
    for part in (config, *(getattr(config, name, None) for name in _SUBCONFIGS)):
        if getattr(part, "use_cache", None):
            part.use_cache = False


def _weights(folder: Path) -> dict[str, Tensor] | None:
    """None where safetensors lie in the folder; else the state dict of its pytorch_model.bin, read as tensors only."""
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise LoadError(
            "the folder holds no weights",
            where=str(folder),
            why="neither model.safetensors nor pytorch_model.bin is there",
            cure="save_pretrained writes them; a folder with only config.json has none",
        )
    state: dict[str, Tensor] = {}
    for shard in shards:
        found = find_weights(read_weights(shard))
        if found is None:
            raise LoadError("the weight file holds no state dict", where=str(shard))
        state.update(found.tensors)
    return state


def _notes(model: nn.Module, info: Mapping[str, Any], raw: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    missing, extra = sorted(map(str, info["missing_keys"])), sorted(map(str, info["unexpected_keys"]))
    if missing and len(missing) >= len(list(model.parameters())):
        raise LoadError(
            "the weights belong to another model",
            where=str(folder),
            why=f"none of the parameters of {type(model).__name__} is among them; left over: {shorten(extra)}",
            cure="check the architectures entry of config.json",
        )
    notes = []
    if missing:
        notes.append(f"random weights, absent from the folder: {shorten(missing)}")
    if extra:
        notes.append(f"weights in the folder that {type(model).__name__} does not use: {shorten(extra)}")
    stored = raw.get("dtype") or raw.get("torch_dtype")
    if stored not in (None, "float32"):
        notes.append(f"weights stored as {stored} are computed in float32")
    return tuple(notes)


def tokenizer_folder(folder: Path) -> Path | None:
    """The folder if a tokenizer lies in it."""
    return folder if any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, without network and without code of its own. Raises LoadError if there is none."""
    survive_torchvision()
    try:
        with offline(), quiet():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as failure:
        raise LoadError(
            "the tokenizer cannot be loaded",
            where=str(folder),
            why=first_line(failure),
            cure="tokenizer.save_pretrained(folder) writes one beside the model",
        ) from None


def picture_size(config: Any, folder: Path | None = None) -> tuple[int, int, int] | None:
    """(channels, height, width) in pixels that a config asks for; the preprocessor's size where the config has none."""
    channels = _first(config, "num_channels") or 3
    channels = channels if isinstance(channels, int) else 3
    size = _first(config, "image_size")
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return channels, size, size
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return channels, size[0], size[1]
    made = preprocessor_size(read_preprocessor(folder)) if folder is not None else None
    return (channels, *(made or (224, 224)))


def _first(config: Any, name: str) -> Any:
    """An entry of the config, or of the first of its parts that has it."""
    for part in (config, *(getattr(config, sub, None) for sub in _SUBCONFIGS)):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return None


def example_kwargs(model: nn.Module, folder: Path | None = None) -> dict[str, Tensor]:
    """Keyword inputs of batch 2 for a transformers model, by its ``main_input_name``, forward signature and config.

    Token ids [2, T] avoid the padding id and come with a mask of ones (and token types where the folder's tokenizer
    makes them); T is at most 32. Pictures [2, C, H, W], videos [2, F, C, H, W] and spectra [2, mel, frames] have the
    size the config says.
    """
    config: Any = model.config
    names = list(parameter_names(model))
    main = getattr(model, "main_input_name", "input_ids")
    kwargs: dict[str, Tensor] = {}
    size = picture_size(config, folder)
    shape: tuple[int, ...]
    if "input_ids" in names and (main == "input_ids" or "pixel_values" not in names):
        kwargs.update(_text(model, config, names, folder))
    if "pixel_values" in names and size is not None and _wants_pictures(model, main):
        frames = getattr(config, "num_frames", None)  # a video: [batch, frame, channel, height, width]
        shape = (BATCH, frames, *size) if isinstance(frames, int) else (BATCH, *size)
        kwargs["pixel_values"] = make(shape, torch.float32)
    if "input_features" in names and main == "input_features":
        frames = 2 * (_first(config, "max_source_positions") or 50)  # Whisper's second convolution halves the frames
        kwargs["input_features"] = make((BATCH, _first(config, "num_mel_bins") or 80, frames), torch.float32)
    if "input_values" in names and main == "input_values":
        mel, length = _first(config, "num_mel_bins"), _first(config, "max_length")
        # a spectrogram of fixed length, or one second of sound at 16 kHz
        shape = (BATCH, length, mel) if isinstance(mel, int) and isinstance(length, int) else (BATCH, 16000)
        kwargs["input_values"] = make(shape, torch.float32)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        kwargs["decoder_input_ids"] = _ids(model, config, 8)
    return kwargs


def _wants_pictures(model: nn.Module, main: str) -> bool:
    """Pictures are the main input, or the model reads them beside its text: by a vision tower, or as patches."""
    config: Any = model.config
    return main == "pixel_values" or any(getattr(config, n, None) is not None for n in ("vision_config", "image_size"))


def _text(model: nn.Module, config: Any, names: list[str], folder: Path | None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"input_ids": _ids(model, config, token_limit(config, LENGTH))}
    if "attention_mask" in names:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    has_tokenizer = folder is not None and tokenizer_folder(folder) is not None
    if "token_type_ids" in names and folder is not None and has_tokenizer:
        made = load_tokenizer(folder).model_input_names
        if "token_type_ids" in made:
            found["token_type_ids"] = torch.zeros_like(found["input_ids"])
    return found


def token_limit(config: Any, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model's positions allow (RoBERTa's begin after its padding id)."""
    limits = [_first(config, name) for name in ("max_position_embeddings", "n_positions", "max_target_positions")]
    limits = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not limits:
        return wanted
    pad = getattr(config, "pad_token_id", None)
    offset = pad + 1 if isinstance(pad, int) and 0 < pad < 8 and min(limits) > pad + 1 else 0
    return max(1, min(wanted, min(limits) - offset))


def _ids(model: nn.Module, config: Any, length: int) -> Tensor:
    rows = None
    embeddings = getattr(model, "get_input_embeddings", lambda: None)
    try:
        rows = getattr(embeddings(), "num_embeddings", None)
    except Exception:  # dual encoders have no single table
        rows = None
    below = rows or _first(config, "vocab_size") or 2
    ids = make((BATCH, length), torch.int64, below)
    pad = _first(config, "pad_token_id")
    return torch.where(ids == pad, (pad + 1) % below, ids) if isinstance(pad, int) else ids
