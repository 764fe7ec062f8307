"""Per-sample sums of weight times gradient over every tile: all that a distortion curve needs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Batch, Calibration
from ....errors import InternalError
from ....ir.axes import Axes
from ....ir.example_sizes import runtime_sizes
from ....ir.linear_layers import BlockGroup
from ....ir.program import Program
from ....ir.signature import batch_axes, samples_in
from ....ir.sparsity import Tile, tile_areas, tile_sums
from ....process.jobs import run_jobs
from .consumers import Operand, find_sample_dim, sample_of
from .mask_gradients import first_samples, guard_step, not_finite
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


def tile_products(
    program: Program,
    groups: Sequence[BlockGroup],
    data: Calibration | None,
    seed: int,
    probes: int,
    slopes: bool = True,
) -> dict[str, Products]:
    """Group name -> its products over all samples, from one forward and ``probes`` backward runs per batch.

    Per-sample gradients of a linear layer are ``g_n = sum over positions of e x^T`` (e: gradient of its output, x: its
    input); they are made a few samples at a time, pooled and forgotten. Every batch is a job (see ``process/jobs``).

    slopes   also ``taylor``, which wants the mean gradient of every weight; zeros without
    Memory   samples x tiles per layer, with ``slopes`` one gradient per weight and batch, and what one batch's backward
             run needs
    Cost     samples x positions x out x in per layer and probe: that of a backward run
    """
    if data is None or not data.batches:
        raise InternalError("tile products need calibration data")
    batches, firsts, tensors = data.batches, first_samples(program, data), program.tensors
    weights = {g.name: g.matrix.matrix(tensors[g.matrix.parameter].detach()).float().cpu() for g in groups}

    def job(number: int) -> dict[str, Tensor]:
        run, found = LayerRun(program, groups, batches[number]), dict[str, Tensor]()
        losses = objectives(program, run.forward(), batches[number], run.samples, seed, firsts[number], probes)
        for g in groups:
            found[f"{g.name}/p"] = torch.zeros(len(losses), run.samples, g.size)
            if slopes:
                found[f"{g.name}/g"] = torch.zeros(g.matrix.shape)
        for probe, loss in enumerate(losses):
            run.found = {}
            if loss.requires_grad:
                loss.backward(retain_graph=probe < len(losses) - 1)
            for g in groups:
                if g.name in run.found:
                    slope = _pool(run.found[g.name], weights[g.name], g.tile, found[f"{g.name}/p"][probe])
                    if slopes:
                        found[f"{g.name}/g"] += slope
        return {name: t.flatten(0, 1) if name.endswith("/p") else t for name, t in found.items()}

    parts, made = run_jobs("tiles", len(batches), job), {}
    for g in groups:
        products, weight = torch.cat([part[f"{g.name}/p"] for part in parts]), weights[g.name].double()
        if not torch.isfinite(products).all():
            raise not_finite(program, batches[0], f"a gradient of {g.matrix.parameter}")
        mean = (
            sum((part[f"{g.name}/g"].double() for part in parts), torch.zeros(())) / len(products)
            if slopes
            else torch.zeros(g.matrix.shape)
        )
        taylor = tile_sums((weight * mean).abs(), g.tile) / tile_areas(g.matrix.shape, g.tile)
        made[g.name] = Products(products, taylor.flatten(), tile_sums(weight.square(), g.tile).flatten())
    return made


def _pool(pair: tuple[Tensor, Tensor], weight: Tensor, tile: Tile, rows: Tensor) -> Tensor:
    """Write the samples' tile sums into ``rows`` [samples, tiles]; returns the sum of their gradients. [out, in]"""
    x, e = pair
    total = torch.zeros(weight.shape)
    step = max(1, CHUNK // weight.numel())
    for start in range(0, len(x), step):
        g = torch.bmm(e[start : start + step].transpose(1, 2), x[start : start + step])
        rows[start : start + step] = tile_sums(g * weight, tile).flatten(1)
        total += g.sum(0)
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
        self.samples = samples_in(self.flat)
        self.sizes, self.batch_axes = runtime_sizes(program, self.flat), batch_axes(program)
        self.inputs: dict[str, Tensor] = {}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self) -> list[Any]:
        """Outputs of the graph, in order."""
        with torch.enable_grad():
            values = [v.detach() if isinstance(v, Tensor) else v for v in self.program.arguments(self.flat)]
            return list(self.run(*values))

    def run_node(self, n: Node) -> Any:
        value = guard_step(super().run_node, n)
        group = self.layers.get(n.name)
        if group is None:
            return value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operand = self._operand(n, group)
        self.inputs[group.name] = self._by_sample(operand, operand.value(args, kwargs).detach())
        alias = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        alias.register_hook(partial(LayerRun._collect, weakref.proxy(self), group, operand))  # see TappedRun
        return alias

    def _operand(self, node: Node, group: BlockGroup) -> Operand:
        axes: Axes = self.axes
        dims = axes.dims[group.matrix.source]
        return Operand(node, group.matrix.operand, len(dims) - 1, dims, find_sample_dim(dims, self.batch_axes))

    @torch.no_grad()
    def _collect(self, group: BlockGroup, operand: Operand, gradient: Tensor) -> None:
        self.found[group.name] = self.inputs[group.name], self._by_sample(operand, gradient)

    def _by_sample(self, operand: Operand, t: Tensor) -> Tensor:
        """Rows ordered by sample, as many for each. [samples, positions, width]"""
        assert operand.sampled is not None
        sample = sample_of(operand, t.shape, self.batch_axes, self.samples, self.sizes)
        moved = t.movedim(operand.sampled, 0).index_select(0, sample.argsort(stable=True).to(t.device))
        return moved.reshape(self.samples, -1, t.shape[-1]).float().cpu()
