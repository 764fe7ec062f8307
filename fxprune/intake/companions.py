"""The small files beside a model's weights: tokenizer, processor, generation config, chat template, pooling."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

LARGEST = 64 * 2**20  # bytes of a file that is copied
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".pt", ".pth")
OTHERS = (".ot", ".pt2", ".onnx", ".onnx.data", ".onnx_data", ".gguf", ".tflite", ".ckpt", ".npz", ".py", ".pyc")
"""Weights in other forms, which are not those of the result, and code, which is never run."""
OURS = ("report.json", "report.html", "plan.json", "manifest.json")
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")  # what a report can name


def copy_companions(folder: Path, directory: Path) -> list[str]:
    """Copy every small file of a Hugging Face folder byte for byte; return the names of those left out that are no
    weights and no code: above ``LARGEST``, or with odd characters in their names."""
    left_out = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
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
