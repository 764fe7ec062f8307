"""Layers that read a group through a weight, and the second moments of what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Batch
from ....data.memory import share
from ....ir.axes import Axes
from ....ir.axis import element_of, leaves, real_size
from ....ir.dataflow import goes_to, row_weight
from ....ir.group import PruneGroup
from ....ir.linear_layers import Layer, layer_at
from ....ir.patches import unfold
from ....ir.program import Program
from ....ir.signature import padding_mask
from ....process.ranks import add_up, mine
from .consumers import consumers

ROWS = 8192
"""Rows of an unfolded convolution per batch: neighbouring pixels say nearly the same, so more are thinned out."""
LARGEST = 8192  # inputs of a layer whose moments are gathered: 512 MiB in fp64
HELD = 2**30  # bytes of moments held at a time; more layers take more runs over the data


@dataclass(frozen=True)
class Reader:
    """A linear layer or convolution that sums over ``group``, with the weight that does it.

    source         the node it reads;  weight, bias: placeholders ("" where there is none)
    form           ``linear`` [o, k], ``transposed`` [k, o] or ``conv`` [o, c, ..kernel]
    target, norm   the sum that its output goes into, and the norm behind (see ``dataflow.goes_to``)
    unit           [k] element of the group per input column, -1 for none
    """

    group: PruneGroup
    node: str
    source: str
    weight: str
    bias: str
    form: str
    target: str
    norm: str
    eps: float
    unit: Tensor

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight as [o, k]."""
        return tensor.T if self.form == "transposed" else tensor.flatten(1)

    def shape_like(self, matrix: Tensor, like: Tensor) -> Tensor:
        """[o, k] back in the shape and dtype of ``like``."""
        whole = matrix.T if self.form == "transposed" else matrix
        return whole.reshape(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Inputs:
    """Weighted moments of a layer's inputs, fp64: g [k, k] centred, mean [k]; level: mean weight of a row."""

    g: Tensor
    mean: Tensor
    level: float


def readers(program: Program) -> tuple[list[Reader], dict[str, str]]:
    """(every reader, group -> why some consumer of it is none)."""
    axes: Axes = program.need("axes")
    bound, tensors, found, left = program.tensor_of_placeholder, program.tensors, list[Reader](), dict[str, str]()
    for side in consumers(program):
        node = side.operand.node
        layer = _layer(node, side.operand.path, bound, axes)
        for group in side.groups:
            if isinstance(layer, str):
                left[group.name] = f"{node.name}: {layer}"
                continue
            weight, bias = layer.weight, layer.bias
            unit = element_of(axes.dims[weight.name][layer.into], group.axis)
            if layer.form == "conv":
                unit = unit.repeat_interleave(tensors[bound[weight.name]][0, 0].numel())
            _, target, norm, eps = goes_to(node, bound)
            found.append(
                Reader(
                    group,
                    node.name,
                    layer.source.name,
                    weight.name,
                    bias.name if bias is not None else "",
                    layer.form,
                    target,
                    norm,
                    eps,
                    unit,
                )
            )
    return found, left


def _layer(node: Node, path: str, bound: Mapping[str, str], axes: Axes) -> Layer | str:
    """The layer that sums over the argument ``path``, or why it cannot be solved for."""
    layer = layer_at(node, bound)
    if not isinstance(layer, Layer):
        return layer or "no weight is multiplied here"
    if path != layer.operand:
        return "the group is not in its input"
    if any(real_size(a.size, axes.sizes) != a.size for d in axes.dims[layer.weight.name] for a in leaves(d)):
        return "an axis is folded with an open size"
    return layer


def gather(program: Program, layers: Sequence[Reader], batches: Sequence[Batch]) -> dict[str, Inputs]:
    """Moments of every reader's inputs over real rows of the dense model, rows weighted by the norm behind, by node.

    Readers of one node share them. Layers with more than ``LARGEST`` inputs are left out. Costs one run of the model
    per ``HELD`` bytes of moments, and k^2 per row.
    """
    width = {r.node: len(r.unit) for r in layers if len(r.unit) <= LARGEST}
    found: dict[str, Inputs] = {}
    pending = list(width)
    while pending:
        now, held = list[str](), 0
        while pending and (not now or held + 8 * width[pending[0]] ** 2 <= share(HELD, 0.25)):
            held += 8 * width[pending[0]] ** 2
            now.append(pending.pop(0))
        found |= _gather(program, {r.node: r for r in layers if r.node in now}, batches)
    return found


@torch.no_grad()
def _gather(program: Program, layers: Mapping[str, Reader], batches: Sequence[Batch]) -> dict[str, Inputs]:
    sums: dict[str, Tensor] = {}
    for node, one in layers.items():
        k = len(one.unit)
        sums |= {
            f"{node}.g": torch.zeros(k, k, dtype=torch.float64),
            f"{node}.s": torch.zeros(k, dtype=torch.float64),
            f"{node}.w": torch.zeros((), dtype=torch.float64),
            f"{node}.n": torch.zeros((), dtype=torch.float64),
        }
    for i in mine(len(batches)):
        flat = program.flatten(batches[i].args, batches[i].kwargs)
        watch = _Watch(program, {name for one in layers.values() for name in (one.source, one.target)})
        watch.run(*program.arguments(flat))
        mask = padding_mask(program, flat)
        for node, one in layers.items():
            x, w = rows(program, one, watch.seen, mask)
            weighted = x * w[:, None]
            sums[f"{node}.g"] += (x.T @ weighted).double().cpu()
            sums[f"{node}.s"] += weighted.sum(0, dtype=torch.float64).cpu()
            sums[f"{node}.w"] += w.sum(dtype=torch.float64).cpu()
            sums[f"{node}.n"] += len(w)
    sums = add_up(sums)
    made = {}
    for node in layers:
        total = sums[f"{node}.w"].clamp_min(1e-300)
        mean = sums[f"{node}.s"] / total
        level = float(total / sums[f"{node}.n"].clamp_min(1))
        made[node] = Inputs(sums[f"{node}.g"] / total - torch.outer(mean, mean), mean, level)
    return made


class _Watch(Interpreter):
    def __init__(self, program: Program, names: set[str]) -> None:
        super().__init__(program.exported.graph_module)
        self.names, self.seen = names, dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value


def rows(program: Program, one: Reader, seen: Mapping[str, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the layer reads, [n, k], and the weight of each row, [n]; padding is left out."""
    x, z = seen[one.source], seen[one.target]
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if one.form == "conv":
        kernel = program.tensors[program.tensor_of_placeholder[one.weight]].shape[2:]
        x = unfold(next(n for n in program.graph.nodes if n.name == one.node), kernel, x)
        step = -(-len(x) // ROWS)
        x = x[:: step | 1 if step > 1 else 1]  # odd: an even step would meet the same columns of every picture row
        return x, x.new_ones(len(x))
    weight = row_weight(one.norm, one.eps, z)
    lead = x.shape[:-1]
    if weight.dim() and weight.shape[:-1] == lead:
        w = weight.reshape(-1).to(x.dtype)
    else:
        w = x.new_ones(lead.numel())
    x = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(x):
        real = mask.reshape(-1).to(x.device)
        x, w = x[real], w[real]
    return x, w
