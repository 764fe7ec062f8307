"""What sentence-transformers puts behind a transformer, in plain torch: pooling, projections, normalisation.

Needs torch and safetensors alone, so that a process without fxprune can run this file on a folder. What a folder says
is read as data: names of classes are looked up in the tables below and never imported.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODULES, CONFIG, WEIGHTS = "modules.json", "config.json", "model.safetensors"
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which they are put side by side where the config has a switch for each."""
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    cls.__name__: cls
    for cls in (nn.Identity, nn.Tanh, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish)
}
LARGEST_CONFIG = 2**20  # bytes
ReadWeights = Callable[[Path], Mapping[str, Tensor]]


class NotKnownError(ValueError):
    """A folder that asks for what is not known here; says what."""


class Pooling(nn.Module):
    """Tokens [batch, length, width] and their mask [batch, length] -> one vector a row; several modes side by side.

    left   whether texts are padded in front: then the first and the last token lie elsewhere
    """

    def __init__(self, modes: Sequence[str], left: bool = False) -> None:
        super().__init__()
        self.modes, self.left = tuple(modes), left

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        found = [self._pool(mode, tokens, mask) for mode in self.modes]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _pool(self, mode: str, tokens: Tensor, mask: Tensor) -> Tensor:
        if mode == "cls" and not self.left:
            return tokens[:, 0]
        if mode == "lasttoken" and self.left:
            return tokens[:, -1]
        if mode == "max":
            return tokens.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
        weights = self._weights(mode, mask).unsqueeze(-1).to(tokens.dtype)
        total = (tokens * weights).sum(dim=1)
        if mode in ("cls", "lasttoken"):
            return total
        count = weights.sum(dim=1).clamp(min=1e-9)
        return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)

    def _weights(self, mode: str, mask: Tensor) -> Tensor:
        """What each token counts."""
        if mode == "cls":
            return (mask.cumsum(dim=1) == 1) * mask
        if mode == "lasttoken":
            return (mask.flip(1).cumsum(dim=1).flip(1) == 1) * mask
        if mode == "weightedmean":  # by its place in the text, from 1
            padding = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
            return (torch.arange(1, mask.shape[1] + 1, device=mask.device) - padding) * mask
        return mask


class Dense(nn.Module):
    """A linear layer with its activation, and a residual where the folder says so."""

    def __init__(self, inside: int, outside: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(inside, outside, bias=bias), activation
        self.adds_input = residual
        self.residual = nn.Linear(inside, outside, bias=False) if residual and inside != outside else nn.Identity()

    def forward(self, vector: Tensor) -> Tensor:
        out: Tensor = self.activation(self.linear(vector))
        return out + self.residual(vector) if self.adds_input else out


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, vector: Tensor) -> Tensor:
        return F.normalize(vector, p=2.0, dim=-1)


class SentenceEncoder(nn.Module):
    """A transformer with what stands behind it: token ids and mask -> ``{"sentence_embedding": [batch, width]}``.

    stages   name -> pooling first, then projections and normalisation;  folders: name -> where it lies in the folder
    inside   where the transformer lies in the folder: "" or a name
    longest  texts are cut to so many tokens; None where the folder does not say
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        transformer: Any,
        stages: Mapping[str, nn.Module],
        folders: Mapping[str, str],
        inside: str = "",
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.stages = transformer, nn.ModuleDict(dict(stages))
        self.folders, self.inside, self.longest = dict(folders), inside, longest

    @property
    def config(self) -> Any:
        """That of the transformer."""
        return self.transformer.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        made = self.transformer(input_ids=input_ids, **{k: v for k, v in given.items() if v is not None})
        tokens: Tensor = made.last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pool, *behind = self.stages.values()
        vector: Tensor = pool(tokens, mask)
        for stage in behind:
            vector = stage(vector)
        return {"sentence_embedding": vector}

    def rebuilt(self, config: Any) -> SentenceEncoder:
        """The same around a transformer of another config, with new weights."""
        stages = copy.deepcopy(dict(self.stages))
        return SentenceEncoder(type(self.transformer)(config), stages, self.folders, self.inside, self.longest)

    def tie_weights(self) -> None:
        """As the transformer does."""
        self.transformer.tie_weights()


def read_encoder(
    folder: Path, load: Callable[[Path], Any], weights: ReadWeights | None = None
) -> SentenceEncoder | None:
    """The encoder of a folder of sentence-transformers; None where it is none.

    load     gives the transformer that lies in a folder
    weights  reads a ``pytorch_model.bin`` as tensors only

    Raises NotKnownError for a folder with anything else in it, and OSError, ValueError or whatever the readers say for
    a damaged one.
    """
    listed = list_modules(folder)
    if not listed:
        return None
    kinds = [_kind(one) for one in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "Normalize"}:
        raise NotKnownError("known are a Transformer with Pooling behind it, then Dense and Normalize")
    inside = _inside(folder, listed[0])
    said = _settings(folder / inside)
    stages: dict[str, nn.Module] = {}
    folders: dict[str, str] = {}
    for number, (kind, one) in enumerate(zip(kinds, listed, strict=True)):
        if number:
            name = f"{kind.lower()}_{number}"
            folders[name] = _inside(folder, one)
            stages[name] = _stage(kind, folder, folders[name], inside, weights)
    longest = said.get("max_seq_length")
    transformer = load(folder / inside)
    return SentenceEncoder(transformer, stages, folders, inside, longest if isinstance(longest, int) else None).eval()


def list_modules(folder: Path) -> list[Mapping[str, Any]]:
    """The entries of modules.json, in their order; none where there is no such list."""
    found = _read(folder / MODULES)
    good = isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in found)
    return found if good else []


def transformer_folder(folder: Path) -> str:
    """Where a folder's transformer lies in it: "" or a name."""
    listed = list_modules(folder)
    try:
        return _inside(folder, listed[0]) if listed and _kind(listed[0]) == "Transformer" else ""
    except NotKnownError:
        return ""


def _kind(one: Mapping[str, Any]) -> str:
    """The name of a class of sentence-transformers; of another package's the whole of it."""
    whole = str(one["type"])
    return whole.rpartition(".")[2] if whole.startswith("sentence_transformers.") else whole


def _inside(folder: Path, one: Mapping[str, Any]) -> str:
    path = one.get("path")
    if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
        raise NotKnownError(f"modules.json says no folder of it for {_kind(one)}")
    return "" if path in ("", ".") else Path(path).as_posix()


def _settings(folder: Path) -> Mapping[str, Any]:
    """What the transformer's folder says of how it is used."""
    said = _read(folder / "sentence_bert_config.json") or {}
    if not isinstance(said, dict):
        raise NotKnownError("sentence_bert_config.json holds no object")
    text = (said.get("modality_config") or {}).get("text", {})
    asked = {
        "transformer_task": (said.get("transformer_task"), "feature-extraction"),
        "module_output_name": (said.get("module_output_name"), "token_embeddings"),
        "method": (text.get("method"), "forward"),
        "method_output_name": (text.get("method_output_name"), "last_hidden_state"),
    }
    for name, (value, known) in asked.items():
        if value not in (None, known):
            raise NotKnownError(f"sentence_bert_config.json has {name} {value!r}")
    return said


def _stage(kind: str, folder: Path, place: str, inside: str, weights: ReadWeights | None) -> nn.Module:
    said = _read(folder / place / CONFIG) if place else None
    if kind == "Pooling" and isinstance(said, dict):
        tokenizer = _read(folder / inside / "tokenizer_config.json")
        return Pooling(_modes(said), isinstance(tokenizer, dict) and tokenizer.get("padding_side") == "left")
    said = {} if kind == "Normalize" and said is None else said
    if not isinstance(said, dict):
        raise NotKnownError(f"there is no {place or '.'}/{CONFIG} for {kind}")
    own = said.get("module_input_name", "sentence_embedding")
    if own != "sentence_embedding" or said.get("module_output_name") not in (None, own):
        raise NotKnownError(f"{place}/{CONFIG} works on {own}, not on the sentence embedding")
    return Normalize() if kind == "Normalize" else _dense(said, folder / place, place, weights)


def _modes(said: Mapping[str, Any]) -> Sequence[str]:
    modes = said.get("pooling_mode")
    if modes is None:
        modes = [mode for switch, mode in _SWITCHES.items() if said.get(switch)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not all(mode in MODES for mode in modes):
        raise NotKnownError(f"its pooling is {modes!r}")
    return modes


def _dense(said: Mapping[str, Any], folder: Path, place: str, weights: ReadWeights | None) -> Dense:
    name = said.get("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, leaf = str(name).rpartition(".")
    if leaf not in _ACTIVATIONS or not (package == "torch.nn" or package.startswith("torch.nn.modules.")):
        raise NotKnownError(f"{place} has the activation {name}")
    path = folder / WEIGHTS
    if path.is_file():
        from safetensors.torch import load_file

        state: Mapping[str, Tensor] = load_file(path)
    elif weights is not None and (folder / "pytorch_model.bin").is_file():
        state = weights(folder / "pytorch_model.bin")
    else:
        raise NotKnownError(f"{place} holds no weights")
    inside, outside = int(said["in_features"]), int(said["out_features"])
    made = Dense(inside, outside, bool(said.get("bias", True)), _ACTIVATIONS[leaf](), bool(said.get("use_residual")))
    made.load_state_dict({name: value.float() for name, value in state.items()})
    return made


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes()[:LARGEST_CONFIG]) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
