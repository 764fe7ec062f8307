"""What an ONNX file says, as values: its inputs, its nodes in order, its constants as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEWEST, OLDEST = 23, 11
"""Opsets that the translations know."""
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""Numbers of onnx.TensorProto.DataType -> the same in torch. Whole numbers of 4 bits, floats of 8 and texts are not."""


@dataclass(frozen=True)
class Input:
    """An input of the file: a size is a number, or the word under which the file leaves it open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """One op of the file.

    inputs      names of values; "" for one that is left out
    attributes  numbers, texts, tuples of them, and tensors
    scope       the path of the module that it came from, where the exporter wrote it down
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    scope: str = ""

    def __str__(self) -> str:
        return f"node {self.name} ({self.op})"


@dataclass(frozen=True)
class Graph:
    """A file that was read.

    constants  name -> tensor: initialisers, and what nodes hold
    trained    those that are initialisers, where exporters put weights
    notes      what the user must know: what was left out
    """

    path: Path
    opset: int
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Tensor] = field(repr=False)
    trained: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def readers(self) -> dict[str, list[Node]]:
        """Value -> the nodes that read it, in order; a node that reads it twice stands there twice."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found


def find_needed(nodes: Sequence[Node], outputs: Sequence[str]) -> tuple[Node, ...]:
    """The nodes that ``outputs`` depend on, in order."""
    wanted, kept = set(outputs), list[Node]()
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return tuple(reversed(kept))
