"""Activation-aware magnitude: the weights that read an element, times how strongly it is driven."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data import Calibration
from ....errors import InternalError
from ....program import Program
from .consumers import Consumer, consumers, elements
from .criterion import Criterion, prunable
from .mask_gradients import guarded, not_finite


class Activation(Criterion):
    """``I[i] = sqrt( sum over consumers, positions k of element i, of mean(x_k^2) * sum(w_k^2) )``

    x is the operand that enters a consumer, averaged over samples and positions; w is the other side of the product:
    a weight (summed over outputs), or the other activation (keys for queries; averaged). It is the root of the summed
    Wanda scores (|w| * ||x||)^2 of every weight that reads the element: the energy that its removal takes from the
    consumers' outputs, were the inputs uncorrelated.

    Shapes   x is [.., length, ..] with the contracted dimension anywhere; energies are [length]
    Unit     output norm of the consumers; comparable only within a group
    Source   Sun et al. 2023 (Wanda), arXiv:2306.11695, eq. 1
    Law      zero for an element that is never active, or that no weight reads; batching does not matter
    """

    name = "activation"
    unit = "output norm"
    needs_data = True

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        if data is None or not data.batches:
            raise InternalError("the activation criterion needs calibration data")
        taps = consumers(program)
        energies = [_Energy(tap) for tap in taps]
        for batch in data.batches:
            run = _Watched(program, energies)
            flat = program.flatten(batch.args, batch.kwargs)
            with torch.no_grad():
                run.run(*program.arguments(flat))
            for energy in energies:
                if not torch.isfinite(energy.total).all():
                    raise not_finite(program, batch, f"an operand of {energy.tap.operand.node.name}")
        result = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)}
        for energy in energies:
            for name, score in energy.per_group().items():
                result[name] += score
        return {name: score.sqrt() for name, score in result.items()}


class _Energy:
    """Running energies of a consumer's two operands along the contracted dimension."""

    def __init__(self, tap: Consumer) -> None:
        self.tap = tap
        self.x = self.w = torch.zeros(())
        self.rows = self.w_rows = 0
        self.labels: dict[str, tuple[Tensor, Tensor | None]] = {}

    @property
    def total(self) -> Tensor:
        return torch.stack([self.x.sum(), self.w.sum()])

    def see(self, args: Any, kwargs: Any) -> None:
        x = self.tap.operand.value(args, kwargs)
        along = _energy(x, self.tap.operand.position)
        self.x, self.rows = self.x + along, self.rows + x.numel() // max(1, len(along))
        other = self.tap.other
        w = None if other is None else other.value(args, kwargs)
        if other is not None and w is not None:
            along = _energy(w, other.position)
            if other.sampled is None:
                self.w, self.w_rows = along, 1
            else:
                self.w, self.w_rows = self.w + along, self.w_rows + w.numel() // max(1, len(along))
        for group in self.tap.groups if not self.labels else ():
            known = other is not None and w is not None
            self.labels[group.name] = (elements(self.tap.operand, x, group.axis).cpu(),
                                       elements(other, w, group.axis).cpu() if known else None)  # type: ignore[arg-type]

    def per_group(self) -> dict[str, Tensor]:
        out = {}
        for group in self.tap.groups:
            if group.name not in self.labels:
                continue
            mine, theirs = self.labels[group.name]
            x = self.x / max(1, self.rows)
            if theirs is None:
                out[group.name] = _gather(x, mine, group.size)
            elif len(theirs) == len(mine):
                out[group.name] = _gather(x * (self.w / max(1, self.w_rows)), mine, group.size)
            else:  # a grouped convolution: its kernel shows the channels of one group only
                w = _gather(self.w / max(1, self.w_rows), theirs, group.size)
                out[group.name] = _gather(x, mine, group.size) * w
        return out


class _Watched(Interpreter):
    """Runs the graph and lets each consumer's energies see its operands."""

    def __init__(self, program: Program, energies: list[_Energy]) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.energies: dict[str, list[_Energy]] = {}
        for energy in energies:
            self.energies.setdefault(energy.tap.operand.node.name, []).append(energy)

    def run_node(self, n: Node) -> Any:
        if n.name in self.energies:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            for energy in self.energies[n.name]:
                energy.see(args, kwargs)
        return guarded(super().run_node, n)


def _energy(tensor: Tensor, position: int) -> Tensor:
    """Summed squares along every dimension but one. [length] float64"""
    rest = [d for d in range(tensor.dim()) if d != position]
    squares = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).square()
    return (squares.sum(rest) if rest else squares).to("cpu", torch.float64)


def _gather(values: Tensor, label: Tensor, size: int) -> Tensor:
    mine = label >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, label[mine], values[mine])
