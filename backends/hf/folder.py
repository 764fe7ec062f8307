"""The Hugging Face folder that a model came from: the template of the one it goes home to."""

from __future__ import annotations

import collections
import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import LoweringError
from ...intake.load import Loaded

CONFIG, CODE = "config.json", "modeling_pruned.py"
LARGEST = 64 * 2**20  # bytes of a file that is copied
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".pt", ".pth")
OTHERS = (".ot", ".pt2", ".onnx", ".onnx.data", ".onnx_data", ".gguf", ".tflite", ".ckpt", ".npz", ".py", ".pyc")
"""Weights in other forms, which are not those of the pruned model, and code, which is never run."""
OURS = ("report.json", "report.html", "plan.json", "manifest.json", CONFIG)
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")  # what a report can name
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceFolder:
    """A folder and the model that was loaded from it.

    model    the dense model, of transformers' class
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
        config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
        dtypes = dict(_stored(source.folder))
        counted = collections.Counter(dtypes.values()) or {_stated(config): 1}
        return SourceFolder(source.folder, source.model, config, dtypes, max(counted, key=lambda d: counted[d]))

    @property
    def class_name(self) -> str:
        """Of the model's class in transformers."""
        return type(self.model).__name__

    def dtype_of(self, name: str) -> torch.dtype:
        """What a floating tensor of the model is stored in."""
        return self.dtypes.get(name, self.dtype)

    def autos(self) -> dict[str, str]:
        """Auto class of transformers -> the class that it gives for this folder, this model's own or its base."""
        import transformers
        from transformers.models.auto import auto_factory

        found: dict[str, str] = {}
        config: Any = type(self.model.config)
        for name in (n for n in dir(transformers) if n.startswith("AutoModel")):
            auto: Any = getattr(transformers, name)
            mapping = getattr(auto, "_model_mapping", None)
            if not isinstance(mapping, auto_factory._LazyAutoMapping) or config not in mapping:
                continue
            given: Any = mapping[config]
            given = given[0] if isinstance(given, tuple) else given
            if given is type(self.model) or name == "AutoModel":
                found[name] = given.__name__
        return found

    def copy_files(self, directory: Path) -> list[str]:
        """Copy every small file byte for byte; return the names of those left out that are no weights."""
        left_out = []
        for path in sorted(self.path.rglob("*")):
            inside = path.relative_to(self.path)
            if any(part.startswith((".", "__")) for part in inside.parts) or not path.is_file():
                continue
            if path.name.endswith((*WEIGHTS, *OTHERS)) or str(inside) in OURS:
                continue
            if path.stat().st_size > LARGEST or not _PLAIN.fullmatch(inside.as_posix()):
                left_out.append(str(inside))
                continue
            (directory / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / inside)
        return left_out

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
        told.setdefault("architectures", [self.class_name])
        (directory / CONFIG).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _stored(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """(name, dtype) of every floating tensor in a folder's safetensors."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    yield name, dtype


def _stated(config: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32
