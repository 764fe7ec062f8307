"""Scores in a report: one line per group however many elements it has, exact to the bit."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LoadError
from ..ir.cost import CostModel
from ..ir.importance import ImportanceScores
from ..ir.program import Program

ENCODING = "base64 of little-endian float32"


def group_entries(
    program: Program, kept: Mapping[str, int], scores: Mapping[str, ImportanceScores] | None, kinds: Collection[str]
) -> list[dict[str, Any]]:
    """Every prunable group as plain data, in graph order.

    program   dense, with its groups;  kept: group -> how many elements stay, all where it is not named;  kinds: those
              that the search might cut (``searched``)

    ``macs`` and ``params`` are what one element costs in the dense program. ``scores`` [size] and ``order`` [size], the
    last to be removed first, are encoded (:func:`encode`); ``order`` is null where it is that of the scores.
    """
    model, found = CostModel(program), []
    params = model.ledger("params", {})
    for group in program.need("groups"):
        if not group.prunable:
            continue
        one = None if scores is None else scores.get(group.name)
        found.append(
            {
                "group": group.name,
                "kind": str(group.kind),
                "searched": str(group.kind) in kinds,
                "size": group.size,
                "kept": kept.get(group.name, group.size),
                "granularity": group.granularity,
                "floor": group.floor,
                "exact": group.exact,
                "macs": int(group.macs),
                "params": -params.change(group.axis, group.size - 1),
                "parameters": sorted({s.parameter for s in group.slots}),
                "criterion": None if one is None else one.criterion,
                "unit": None if one is None else one.unit,
                "comparable": one is not None and one.comparable,
                "scores": None if one is None else encode(one.values),
                "order": None if one is None or one.order is None else encode(one.order),
            }
        )
    return found


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


def ranked(entry: Mapping[str, Any]) -> list[int]:
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
