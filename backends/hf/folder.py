"""The Hugging Face folder that a model came from: the template of the one it goes home to."""

from __future__ import annotations

import collections
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LoweringError
from ...intake.load import Loaded
from ...intake.pooling import Dense, Pooling, SentenceEncoder

CONFIG, CODE = "config.json", "modeling_pruned.py"
TRANSFORMER, STAGES = "transformer.", "stages."
"""What names of a sentence encoder begin with."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceFolder:
    """A folder and the model that was loaded from it.

    model    the dense model: of transformers' class, or a sentence encoder around one
    config   its config.json as it lies there
    dtypes   of the tensors in its safetensors, by their names there;  dtype: of most of them
    """

    path: Path
    model: nn.Module = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    dtypes: Mapping[str, torch.dtype] = field(repr=False)
    dtype: torch.dtype

    @staticmethod
    def of(source: Loaded) -> SourceFolder | None:
        """The folder that a model was loaded from; None where it came from elsewhere."""
        if source.folder is None or not isinstance(source.model, nn.Module):
            return None
        encoder = source.model if isinstance(source.model, SentenceEncoder) else None
        inside = encoder.inside if encoder else ""
        places: Mapping[str, str] = encoder.folders if encoder else {}
        own = source.folder / inside
        config = json.loads((own / CONFIG).read_text(encoding="utf-8"))
        dtypes = {(TRANSFORMER if encoder else "") + name: dtype for name, dtype in _read_dtypes(own)}
        for stage, place in places.items():
            if place not in ("", inside):
                dtypes |= {f"{STAGES}{stage}.{name}": dtype for name, dtype in _read_dtypes(source.folder / place)}
        counted = collections.Counter(dtypes.values()) or {_read_stated_dtype(config): 1}
        return SourceFolder(source.folder, source.model, config, dtypes, max(counted, key=lambda d: counted[d]))

    @property
    def encoder(self) -> SentenceEncoder | None:
        """The model, where pooling stands behind its transformer."""
        return self.model if isinstance(self.model, SentenceEncoder) else None

    @property
    def transformer(self) -> Any:
        """The dense model's part of a class of transformers; mostly all of it."""
        return self.encoder.transformer if self.encoder else self.model

    @property
    def class_name(self) -> str:
        """Of the model's class in transformers."""
        return type(self.transformer).__name__

    def own(self, folder: Path) -> Path:
        """Where in ``folder`` the transformer lies."""
        return folder / self.encoder.inside if self.encoder else folder

    def in_class(self, name: str) -> str | None:
        """What the class calls a tensor or module of the model; None for what stands behind the transformer."""
        if self.encoder is None:
            return name
        return f"{name}.".removeprefix(TRANSFORMER)[:-1] if f"{name}.".startswith(TRANSFORMER) else None

    def dtype_of(self, name: str) -> torch.dtype:
        """What a floating tensor of the model is stored in."""
        return self.dtypes.get(name, self.dtype)

    def autos(self) -> dict[str, str]:
        """Auto class of transformers -> the class that it gives for this folder, this model's own or its base."""
        import transformers
        from transformers.models.auto import auto_factory

        found: dict[str, str] = {}
        config: Any = type(self.transformer.config)
        for name in (n for n in dir(transformers) if n.startswith("AutoModel")):
            auto: Any = getattr(transformers, name)
            mapping = getattr(auto, "_model_mapping", None)
            if not isinstance(mapping, auto_factory._LazyAutoMapping) or config not in mapping:
                continue
            given: Any = mapping[config]
            given = given[0] if isinstance(given, tuple) else given
            if given is type(self.transformer) or name == "AutoModel":
                found[name] = given.__name__
        return found

    def with_numbers(self, numbers: Mapping[tuple[str, ...], int]) -> dict[str, Any]:
        """The entries of the config that hold these numbers, with them."""
        told: dict[str, Any] = {}
        for path, value in numbers.items():
            part = told
            if path[1:]:
                part = told.setdefault(path[0], copy.deepcopy(self.config.get(path[0]) or {}))
            for name in path[1:-1]:
                part = part.setdefault(name, {})
            part[path[-1]] = value
        return told

    def write_config(self, directory: Path, changes: Mapping[str, Any]) -> None:
        """The config as it was, with these entries changed or added."""
        told = {**{k: v for k, v in self.config.items() if k != "auto_map"}, **changes}
        if self.encoder:  # a head that the folder had is not written
            told["architectures"] = [self.class_name]
        told.setdefault("architectures", [self.class_name])
        (self.own(directory) / CONFIG).write_text(
            json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def write_stages(self, directory: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
        """Weights and sizes of what stands behind the transformer; the paths of the weights.

        tensors   by the names of the model, in the dtypes in which they are stored
        """
        from safetensors.torch import save_file

        if self.encoder is None:
            return []
        stages, places = dict(self.encoder.stages.items()), self.encoder.folders
        written: list[Path] = []
        width = 0  # of the pooled vector, where a layer behind says it
        for name in (n for n, stage in stages.items() if isinstance(stage, Dense)):
            prefix, place = f"{STAGES}{name}.", directory / places[name]
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            outside, inside = own["linear.weight"].shape
            width = width or inside
            _change(place / CONFIG, {"in_features": inside, "out_features": outside})
            written.append(place / "model.safetensors")
            save_file(own, written[-1], metadata={"format": "pt"})
        for name, stage in stages.items():
            if isinstance(stage, Pooling) and width:
                told = dict.fromkeys(("embedding_dimension", "word_embedding_dimension"), width // len(stage.modes))
                _change(directory / places[name] / CONFIG, told, add=False)
        return written


def need_folder(source: SourceFolder | None) -> SourceFolder:
    """The folder. Raises LoweringError where there is none."""
    if source is None:
        raise LoweringError(
            "the target 'hf' writes a model back into the folder that it came from",
            where="--target hf",
            why="this one came from no Hugging Face folder",
            cure="model.save_pretrained(folder), and compile the folder; `fxprune lower` needs it as `--against`",
        )
    return source


def _read_dtypes(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """(name, dtype) of every floating tensor in a folder's safetensors."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    yield name, dtype


def _change(path: Path, said: Mapping[str, Any], add: bool = True) -> None:
    """Write other values into a config, where they are others; ``add``: those too that it has not."""
    told = json.loads(path.read_text(encoding="utf-8"))
    new = {key: value for key, value in said.items() if told.get(key) != value and (add or key in told)}
    if new:
        path.write_text(json.dumps({**told, **new}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_stated_dtype(config: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32
