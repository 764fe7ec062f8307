"""Per-sample sums of weight times gradient over every tile: all that a distortion curve needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data import Batch, Calibration
from ....errors import InternalError
from ....matrices import BlockGroup
from ....program import Axes, Program
from ....ranks import add_up, mine
from ....sparsity import tile_areas, tile_sums
from .consumers import Operand, batch_axes, sample_of, sampled_dim
from .mask_gradients import first_samples, guarded, not_finite, samples_of, sizes_now
from .objective import objectives

CHUNK = 2**24  # elements of per-sample weight gradients that are alive at a time: 64 MiB


@dataclass(frozen=True)
class Products:
    """Of one layer.

    products  P[n, b] = sum over tile b of W * dL_n/dW. [samples x probes, tiles] float32
    taylor    mean over tile b of |W * mean_n dL_n/dW|. [tiles] float64
    energy    |W_b|^2. [tiles] float64
    """

    products: Tensor
    taylor: Tensor
    energy: Tensor


def tile_products(program: Program, groups: Sequence[BlockGroup], data: Calibration | None, seed: int,
                  probes: int) -> dict[str, Products]:
    """Group name -> its products over all samples, from one forward and ``probes`` backward runs per batch.

    Per-sample gradients of a linear layer are ``g_n = sum over positions of e x^T`` (e: gradient of its output, x: its
    input); they are made a few samples at a time, pooled and forgotten.

    Memory   samples x tiles per layer, one gradient per weight, and what one batch's backward run needs
    Cost     samples x positions x out x in per layer and probe: that of a backward run
    """
    if data is None or not data.batches:
        raise InternalError("tile products need calibration data")
    firsts = first_samples(program, data)
    probes = 1 if data.labelled else probes
    tensors = program.tensors
    weights = {g.name: g.matrix.matrix(tensors[g.matrix.parameter].detach()).float() for g in groups}
    sums = {g.name: torch.zeros(data.samples * probes, g.size) for g in groups}
    means = {g.name: torch.zeros(g.matrix.shape, dtype=torch.float64) for g in groups}
    for number in mine(len(data.batches)):
        batch, first = data.batches[number], firsts[number]
        run = LayerRun(program, groups, batch)
        losses = objectives(program, run.forward(), batch, run.samples, seed, first, probes)
        for probe, loss in enumerate(losses):
            run.found = {}
            if loss.requires_grad:
                loss.backward(retain_graph=probe < len(losses) - 1)
            for group in groups:
                if group.name in run.found:
                    rows = sums[group.name][probe * data.samples + first :][: run.samples]
                    means[group.name] += _pool(run.found[group.name], weights[group.name], group, rows)
    added = add_up({f"{kind}/{name}": t for kind, home in (("p", sums), ("g", means)) for name, t in home.items()})
    found = {}
    for g in groups:
        weight = weights[g.name].double()
        areas = tile_areas(g.matrix.shape, g.tile)
        products = added[f"p/{g.name}"]
        if not torch.isfinite(products).all():
            raise not_finite(program, data.batches[0], f"a gradient of {g.matrix.parameter}")
        slope = (weight * added[f"g/{g.name}"] / max(1, len(products))).abs()
        found[g.name] = Products(products, (tile_sums(slope, g.tile) / areas).flatten(),
                                 tile_sums(weight.square(), g.tile).flatten())
    return found


def _pool(pair: tuple[Tensor, Tensor], weight: Tensor, group: BlockGroup, rows: Tensor) -> Tensor:
    """Write the samples' tile sums into ``rows`` [samples, tiles]; returns the sum of their gradients. [out, in]"""
    x, e = pair
    total = torch.zeros(weight.shape, dtype=torch.float64)
    step = max(1, CHUNK // weight.numel())
    for start in range(0, len(x), step):
        g = torch.bmm(e[start : start + step].transpose(1, 2), x[start : start + step])
        rows[start : start + step] = tile_sums(g * weight, group.tile).flatten(1)
        total += g.sum(0).double()
    return total


class LayerRun(Interpreter):
    """Runs the graph; ``inputs`` then holds what every layer read, and after a backward run ``found`` the pair (inputs,
    output gradients), by sample: [samples, positions, in] and [samples, positions, out], float32.
    """

    def __init__(self, program: Program, groups: Sequence[BlockGroup], batch: Batch) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.program, self.axes = program, program.need("axes")
        self.layers = {g.matrix.node: g for g in groups}
        self.flat = program.flatten(batch.args, batch.kwargs)
        self.samples = samples_of(self.flat)
        self.sizes, self.batch_axes = sizes_now(program, self.flat), batch_axes(program)
        self.inputs: dict[str, Tensor] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self) -> list[Any]:
        """Outputs of the graph, in order."""
        with torch.enable_grad():
            values = [v.detach() if isinstance(v, Tensor) else v for v in self.program.arguments(self.flat)]
            return list(self.run(*values))

    def run_node(self, n: Node) -> Any:
        value = guarded(super().run_node, n)
        group = self.layers.get(n.name)
        if group is None:
            return value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operand = self._operand(n, group)
        self.inputs[group.name] = self._by_sample(operand, operand.value(args, kwargs).detach())
        alias = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        alias.register_hook(partial(self._collect, group, operand))
        return alias

    def _operand(self, node: Node, group: BlockGroup) -> Operand:
        axes: Axes = self.axes
        dims = axes.dims[group.matrix.source]
        return Operand(node, group.matrix.operand, len(dims) - 1, dims, sampled_dim(dims, self.batch_axes))

    @torch.no_grad()
    def _collect(self, group: BlockGroup, operand: Operand, gradient: Tensor) -> None:
        self.found[group.name] = self.inputs[group.name], self._by_sample(operand, gradient)

    def _by_sample(self, operand: Operand, t: Tensor) -> Tensor:
        """Rows ordered by sample, as many for each. [samples, positions, width]"""
        assert operand.sampled is not None
        sample = sample_of(operand, t.shape, self.batch_axes, self.samples, self.sizes)
        moved = t.movedim(operand.sampled, 0).index_select(0, sample.argsort(stable=True).to(t.device))
        return moved.reshape(self.samples, -1, t.shape[-1]).float().cpu()
