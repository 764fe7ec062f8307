"""Tensors and a few plain facts as bytes, for files and for other processes. Reading them runs nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MARK = b"fxprune1"
_DIGEST = hashlib.sha256().digest_size
_HEAD = len(_MARK) + _DIGEST + 8


def pack(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """``tensors`` (strided, of any device) and ``about`` (what JSON can say) as bytes with a checksum.

    Bit for bit: dtypes, shapes and NaN payloads come back as they were, on the CPU.
    """
    from safetensors.torch import save

    facts = json.dumps(dict(about)).encode()
    held = {n: t.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for n, t in tensors.items()}
    body = len(facts).to_bytes(8, "little") + facts + save(held)
    return _MARK + hashlib.sha256(body).digest() + body


def unpack(packet: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`pack` was given. Raises ValueError for bytes that are cut off, changed, or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    view = memoryview(packet)
    body = view[len(_MARK) + _DIGEST :]
    if len(packet) < _HEAD or view[: len(_MARK)] != _MARK:
        raise ValueError("this is no packet of fxprune")
    if hashlib.sha256(body).digest() != view[len(_MARK) : len(_MARK) + _DIGEST]:
        raise ValueError("the packet is damaged: its checksum differs")
    length = int.from_bytes(body[:8], "little")
    try:
        about = json.loads(bytes(body[8 : 8 + length]))
        tensors = load(bytes(body[8 + length :]))
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if not isinstance(about, dict):
        raise ValueError("the packet's facts are no object")
    return tensors, about
