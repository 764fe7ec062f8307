"""What a run works on, as one digest: program, data, seed and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.program import Program
from ..process.environment import core_versions
from .batch import Calibration

_FORMAT = 1  # of what is hashed, and how


def fingerprint(program: Program, data: Calibration | None, seed: int, options: Iterable[str] = ()) -> str:
    """SHA-256 of all that finished jobs depend on: what is stored under another one is never taken up.

    The graph (every node with its arguments), the weights, the groups with their limits, the calibration batches, the
    seed, ``options`` (how the criterion and the passes are set, as text), and the versions of fxprune and torch.
    Tensors are read in place, at the speed of SHA-256: about a second per GiB.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, core_versions(), seed, list(options)]).encode())

    def say(*facts: object) -> None:
        digest.update(repr(facts).encode())

    for node in program.graph.nodes:
        say(node.op, node.name, str(node.target), node.args, node.kwargs)
    for group in program.groups or ():
        limits = (group.granularity, group.floor, group.least, group.strict, group.ordered)
        say(group.name, str(group.kind), group.size, group.frozen, *limits)
    for name, tensor in sorted(program.tensors.items()):
        say(name)
        add_tensor(digest, tensor)
    for batch in data.batches if data is not None else ():
        leaves, spec = pytree.tree_flatten((batch.args, dict(batch.kwargs), batch.labels))
        say(str(spec))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                add_tensor(digest, leaf)
            else:
                say(leaf)
    return digest.hexdigest()


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and values of a tensor, wherever it lies, to a hash."""
    digest.update(repr((tensor.dtype, tuple(tensor.shape), tensor.layout)).encode())
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    flat = dense.to("cpu", memory_format=torch.contiguous_format).resolve_conj().resolve_neg().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy())
