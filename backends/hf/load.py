"""``load_hf``: the class of transformers from a folder that ``--target hf`` wrote, without code from the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ...errors import LoadError
from ...intake.pooling import NotKnownError, read_encoder, transformer_folder
from ...ir.provenance import first_line
from ...process.libraries import offline, survive_torchvision
from ...process.silence import quiet
from . import modeling_pruned
from .folder import CONFIG


def load_hf(path: str | os.PathLike[str], dtype: Any = "auto", **options: Any) -> Any:
    """The pruned model as its class of transformers, in evaluation form: it generates, trains and saves as any other.

    path     what ``--target hf`` wrote (other Hugging Face folders load as well)
    dtype    of the weights; by default that of the folder
    options  more for the class's ``from_pretrained``, such as ``device_map``

    Of a folder of sentence-transformers it is the transformer alone, in 0_Transformer too: SentenceTransformer(path)
    gives the whole. Code in the folder is not run: the class is transformers' own, and layers get the widths that config.json states.
    Raises LoadError.
    """
    path = Path(path)
    path = path / transformer_folder(path)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        name = config["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as failure:
        raise LoadError(
            "the folder names no class of transformers",
            where=str(path / CONFIG),
            why=first_line(failure),
            cure="give what `--target hf` wrote",
        ) from None
    survive_torchvision()
    try:
        with offline(), quiet():
            cls = getattr(modeling_pruned, name)
            return cls.from_pretrained(str(path), dtype=dtype, local_files_only=True, **options).eval()
    except Exception as failure:  # whatever transformers says
        raise LoadError(
            f"transformers does not load the folder as {name}",
            where=str(path),
            why=first_line(failure),
            cure="it may be damaged: compile it again, or check the version of transformers",
        ) from failure


def load_whole(path: Path) -> Any:
    """The model in float32, with the pooling that modules.json of the folder puts behind it."""
    try:
        encoder = read_encoder(path, lambda inside: load_hf(inside, dtype=torch.float32))
    except NotKnownError:
        encoder = None
    return encoder or load_hf(path, dtype=torch.float32)
