"""Closed-form recovery of kept tiles: layer by layer, each row of tiles solved over the inputs that it still reads."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data.batch import Batch, sample_count
from ....ir.dataflow import goes_to
from ....ir.linear_layers import Matrix
from ....ir.program import Program
from ....ir.sparsity import Sparsity
from ....process.ranks import mine
from .closed_form import LARGEST, LIMIT, RETRIES
from .lockstep import Lockstep
from .moments import System
from .record import Fitted, Recovery, Step
from .shared import from_first
from .sites import Site, position_read

TOGETHER = 2**24  # elements of the systems that are solved in one batch


@dataclass(frozen=True)
class TileForm:
    """How the kept entries of every sparse layer are solved for.

    method   ``ridge``: towards the residual sum that the layer's output goes into (or its own dense output where it
             joins none), rows weighted by the norm that reads it, inputs from the layers already recovered;
             ``obs``: towards the layer's own dense output, rows alike: the joint form of block OBS's updates
    rel      ridge strength, in means of the diagonal
    """

    method: str
    rel: float

    def fit(
        self, dense: Program, pruned: Program, layers: Sequence[tuple[Matrix, Sparsity]], batches: Sequence[Batch]
    ) -> Fitted:
        """Weights and biases of ``pruned`` (``dense`` with zeros) that answer best for what is gone, on ``batches``."""
        sites = [self._site(dense, matrix) for matrix, _ in layers]
        walk = Lockstep(dense, pruned, {}, [batches[i] for i in mine(len(batches))], sites)
        changed: dict[str, Tensor] = {}
        skipped: dict[str, str] = {}
        steps: list[Step] = []
        for site, (matrix, sparsity) in zip(sites, layers, strict=True):
            if matrix.shape[1] > LARGEST:
                skipped[matrix.node] = f"it has {matrix.shape[1]} inputs, more than {LARGEST}"
                walk.leave(site)
                continue
            moments = walk.collect(site)
            if not moments.rows:
                skipped[matrix.node] = "no rows to fit"
                continue
            system = moments.finish(centred=bool(site.bias))
            old = walk.tensors[site.weight]
            change = by_rows(system, sparsity, matrix.matrix(old), self.rel)
            new = {site.weight: (old.double() + matrix.store(change)).to(old.dtype)}
            offset = None
            if site.bias:
                offset = system.bias(change)
                new[site.bias] = (walk.tensors[site.bias].double() + offset).to(old.dtype)
            walk.tensors.update(from_first(new))
            changed.update((name, walk.tensors[name]) for name in new)
            size = float(matrix.matrix(old).double().norm())
            steps.append(
                Step(
                    matrix.node,
                    matrix.parameter,
                    "reads",
                    site.norm,
                    moments.rows,
                    system.error(),
                    system.error(change, offset),
                    self.rel,
                    float(change.norm()) / size if size else 0.0,
                )
            )
        samples = sample_count(batches)
        return Fitted(
            Recovery(self.method, self.method, self.rel, 0.0, samples, steps=tuple(steps), skipped=skipped), changed
        )

    def _site(self, dense: Program, matrix: Matrix) -> Site:
        nodes = {n.name: n for n in dense.graph.nodes}
        node, bound = nodes[matrix.node], dense.tensor_of_placeholder
        path, target, norm, eps = goes_to(node, bound) if self.method == "ridge" else ((), matrix.node, "", 0.0)
        if not path:
            target, norm, eps = matrix.node, "", 0.0
        movable = matrix.bias if matrix.bias and len(nodes[matrix.bias].users) == 1 else ""
        return Site(
            matrix.node,
            matrix.node,
            True,
            matrix.operand,
            matrix.weight,
            movable,
            "transposed" if matrix.transposed else "linear",
            path,
            target,
            norm,
            eps,
            torch.zeros(0).long(),
            read=position_read(nodes[target]) if path else None,
        )


def by_rows(system: System, sparsity: Sparsity, weight: Tensor, rel: float) -> Tensor:
    """Change of the weight, [out, in], zero where nothing stays: a ridge per row of tiles over the inputs it reads.

    Rows of tiles that keep the same number of inputs are solved together. As in slicing's recovery, the ridge holds on
    to the weights, and is made ten times stronger while they would change by more than their own size.
    """
    (outputs, inputs), (bn, bk) = sparsity.shape, sparsity.tile
    reads = sparsity.kept.repeat_interleave(bk, 1)[:, :inputs]
    change = weight.new_zeros(outputs, inputs, dtype=torch.float64)
    by_count: Mapping[int, list[int]] = collections.defaultdict(list)
    for row, count in enumerate(reads.sum(1).tolist()):
        by_count[count].append(row)
    level = float(system.g.diagonal().mean()) if len(system.g) else 0.0
    if level <= 0:
        return change
    for count, rows in by_count.items():
        step = max(1, TOGETHER // max(1, count * count))
        for start in range(0, len(rows) if count else 0, step):
            some = rows[start : start + step]
            index = torch.stack([reads[r].nonzero()[:, 0] for r in some])  # [rows, count]
            high = torch.tensor([min(bn, outputs - r * bn) for r in some])
            at = torch.tensor(some)[:, None] * bn + torch.arange(bn)
            wide = at.clamp_max(outputs - 1)  # a ragged last row of tiles repeats its last output, to fill the batch
            g = system.g[index[:, :, None], index[:, None, :]]
            b = system.b[index[:, :, None], wide[:, None, :]]
            solved = _solve_damped(g, b, rel * level)
            for i, r in enumerate(some):
                here = slice(r * bn, r * bn + int(high[i]))
                most, now, strength = float(weight[here].double().norm()), solved[i], rel
                for _ in range(RETRIES if most > 0 else 0):
                    if float(now[:, : high[i]].norm()) <= LIMIT * most:
                        break
                    strength = 10 * max(strength, 1e-3)
                    now = _solve_damped(g[i : i + 1], b[i : i + 1], strength * level)[0]
                change[here, index[i]] = now[:, : high[i]].T
    return change


def _solve_damped(g: Tensor, b: Tensor, damp: float) -> Tensor:
    """(g + damp I)^-1 b, batched. [rows, count, outputs]"""
    whole = g + damp * torch.eye(g.shape[-1], dtype=g.dtype)
    factor, failed = torch.linalg.cholesky_ex(whole)
    if bool((failed == 0).all()):
        return torch.cholesky_solve(b, factor)
    return torch.linalg.pinv(whole, hermitian=True) @ b
