"""Scores in a report: one line per group however many elements it has, exact to the bit."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError

ENCODING = "base64 of little-endian float32"


def encode(values: Tensor) -> str:
    """[n] numbers as text; indices up to 2^24 are exact.

    >>> decode(encode(torch.tensor([0.5, 3.0])), 2)
    [0.5, 3.0]
    """
    flat = values.detach().to("cpu", torch.float32).contiguous()
    return base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode("ascii")


def decode(text: str, size: int) -> list[float]:
    """What :func:`encode` made text of. Raises LoadError unless it holds ``size`` finite numbers."""
    import numpy as np

    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise LoadError("the scores of the report are damaged", why=str(error)) from None
    if len(raw) != 4 * size:
        raise LoadError("the scores of the report are damaged", why=f"{len(raw)} bytes, expected {4 * size}")
    values = np.frombuffer(raw, "<f4")
    if not np.isfinite(values).all():
        raise LoadError("the scores of the report are damaged", why="they are not finite")
    return [float(v) for v in values]


def rank(entry: Mapping[str, Any]) -> list[int]:
    """Elements of a group's entry, the last to be removed first: by its ``order``, else by its scores (ties by index).

    Raises LoadError for an order that is none.
    """
    size = int(entry["size"])
    if entry["order"] is not None:
        order = [int(i) for i in decode(entry["order"], size)]
        if sorted(order) != list(range(size)):
            raise LoadError("the order in the report is none", where=str(entry["group"]))
        return order
    values: Sequence[float] = decode(entry["scores"], size)
    return sorted(range(size), key=lambda i: (-values[i], i))
