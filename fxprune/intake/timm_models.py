"""Models by their timm name, without the network."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoadError
from ..process.libraries import offline, survive_torchvision
from ..process.silence import quiet
from .rehearsal import first_line
from .tensors import read_checkpoint, shorten


def load_timm(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    trust_pickle: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The timm model ``name`` and notes on its weights.

    options: how it is built, as for ``timm.create_model`` (``img_size``, ``in_chans``, ``num_classes``, ...).
    Weights come from ``checkpoint``, else from the local cache of Hugging Face or torch.hub, else they are random and a
    note says so. A checkpoint with another number of classes gets a classifier of its size.
    Raises LoadError for an unknown name, or a checkpoint that does not fit.
    """
    built = dict(options or {})
    survive_torchvision()
    try:
        with quiet():
            import timm
    except Exception as failure:
        raise LoadError(
            "timm cannot be imported", where=f"timm:{name}", why=first_line(failure), cure="pip install 'fxprune[timm]'"
        ) from None
    if not name or any(mark in name for mark in ":/\\") or not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        cure = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists the names"
        raise LoadError(f"timm has no model '{name}'", where=f"timm:{name}", why=f"{len(known)} are known", cure=cure)
    if checkpoint is not None:
        weights = read_checkpoint(checkpoint, trust_pickle=trust_pickle)
        model = _create(name, pretrained=False, **built)
        if "num_classes" not in built:
            model = _fit_classes(name, model, weights.tensors, built)
        tensors, notes = _without_classifier(model, weights.tensors, built)
        load_state(model, tensors, where=str(checkpoint), architecture=f"timm:{name}")
        return model, (*weights.notes, *notes)
    if _is_cached(name):
        try:
            return _create(name, pretrained=True, **built), ("weights from the local cache",)
        except LoadError:  # a cache that turns out incomplete
            pass
    note = f"weights are random: no pretrained weights of {name} on this machine (`--checkpoint FILE` loads yours)"
    return _create(name, pretrained=False, **built), (note,)


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    import timm

    try:
        with offline(), quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same on every call
            return timm.create_model(name, pretrained=pretrained, **options).eval()
    except Exception as failure:
        said = ",".join(f"{key}={value}" for key, value in options.items())
        raise LoadError(
            "timm cannot build the model",
            where=f"timm:{name}" + (f" --model-args {said}" if said else ""),
            why=first_line(failure),
            cure="give `--model-args` that this architecture takes" if said else "check the name's tag",
        ) from None


def _is_cached(name: str) -> bool:
    """True if pretrained weights lie in a local cache; looks at files only."""
    import timm

    try:
        with quiet():
            cfg = timm.get_pretrained_cfg(name)
        if cfg is None:
            return False
        if cfg.hf_hub_id:
            from huggingface_hub import try_to_load_from_cache

            names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
            return any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in names)
        if cfg.url:
            return (Path(torch.hub.get_dir()) / "checkpoints" / str(cfg.url).rpartition("/")[2]).is_file()
    except Exception:  # a name without weights, or a cache of another layout
        return False
    return False


def _without_classifier(
    model: nn.Module, state: dict[str, Tensor], built: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights without those of a classifier that was not built (``num_classes=0``), and what was left out."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if built.get("num_classes") != 0 or not classifier:
        return state, ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = model.state_dict()
    gone = [k for k in state if k not in own and k.startswith(tuple(f"{head}." for head in heads))]
    note = (f"the checkpoint's classifier is left out (num_classes=0): {shorten(gone)}",) if gone else ()
    return {k: v for k, v in state.items() if k not in gone}, note


def _fit_classes(name: str, model: nn.Module, state: dict[str, Tensor], built: Mapping[str, Any]) -> nn.Module:
    """The model with as many classes as the checkpoint's classifier has."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(classifier, str):
        return model
    own = dict(model.named_parameters()).get(f"{classifier}.weight")
    theirs = state.get(f"{classifier}.weight")
    if own is None or theirs is None or own.shape[1:] != theirs.shape[1:] or own.shape[0] == theirs.shape[0]:
        return model
    return _create(name, pretrained=False, num_classes=int(theirs.shape[0]), **built)


def load_state(model: nn.Module, state: dict[str, Tensor], *, where: str, architecture: str) -> None:
    """Put a state dict into a model. Raises LoadError that lists what is missing, left over or of another shape."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [
        f"{k}: checkpoint {_shape(state[k])}, model {_shape(own[k])}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    # Buffers that counters and index tables live in are often left out; weights never are.
    parameters = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    if any(k in parameters for k in missing) or extra or shapes:
        parts = [
            f"missing {shorten(missing)}" if missing else "",
            f"left over {shorten(extra)}" if extra else "",
            f"of another shape: {shorten(shapes, 4)}" if shapes else "",
        ]
        raise LoadError(
            f"the checkpoint does not fit {architecture}",
            where=where,
            why="; ".join(part for part in parts if part),
            cure="name the architecture that the checkpoint was trained with",
        )
    try:
        model.load_state_dict(state, strict=False)
    except Exception as failure:
        raise LoadError("the checkpoint cannot be loaded", where=where, why=first_line(failure)) from None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
