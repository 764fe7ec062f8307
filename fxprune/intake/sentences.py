"""Folders of sentence-transformers: the module that people use, from token ids to the sentence embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import FxpruneError, LoadError
from .huggingface import load_folder, tokenizer_folder
from .pickles import read_weights
from .pooling import CONFIG, NotKnownError, list_modules, read_encoder, transformer_folder
from .rehearsal import first_line
from .tensors import find_weights


def load_sentences(
    folder: Path, changed: Mapping[str, Any]
) -> tuple[nn.Module, Path, Path | None, tuple[str, ...]] | None:
    """(model, the folder that it is, the one of its tokenizer, notes) of a Hugging Face folder, with pooling,
    projections and normalisation where modules.json lists them; None where the folder holds no config.json.

    What is not known is left out with all that stands behind the transformer, and a note says so. Raises LoadError.
    """
    inside = folder / transformer_folder(folder)
    if not (inside / CONFIG).is_file():
        return None
    notes: list[str] = []

    def transformer(path: Path) -> nn.Module:
        model, said = load_folder(path, changed, encoder=True)
        notes.extend(said)
        return model

    try:
        found = read_encoder(folder, transformer, _tensors)
    except NotKnownError as unknown:
        return _alone(folder, inside, changed, str(unknown))
    except FxpruneError:
        raise
    except Exception as failure:  # sizes that are none, weights of another shape, a damaged file
        raise LoadError(
            "what stands behind the transformer cannot be loaded", where=str(folder), why=first_line(failure)
        ) from None
    if found is None:
        return _alone(folder, inside, changed, "")
    return found, folder, tokenizer_folder(inside), tuple(notes)


def _alone(
    folder: Path, inside: Path, changed: Mapping[str, Any], why: str
) -> tuple[nn.Module, Path, Path | None, tuple[str, ...]]:
    """The transformer itself."""
    model, notes = load_folder(inside, changed)
    kinds = [str(one["type"]).rpartition(".")[2] for one in list_modules(folder)]
    left_out = [kind for kind in kinds if kind not in ("Transformer", "Normalize")]
    if left_out:
        said = (
            f"modules.json lists {', '.join(left_out)} behind the transformer (sentence-transformers): left out, so "
            f"that its own output is scored and judged, not the embedding ({why}); give the whole as an nn.Module for "
            "that"
        )
        notes = (*notes, said)
    return model, inside, tokenizer_folder(inside), notes


def _tensors(path: Path) -> Mapping[str, Tensor]:
    found = find_weights(read_weights(path))
    if found is None:
        raise LoadError("the weight file holds no state dict", where=str(path))
    return found.tensors
