"""Activation-aware magnitude: the weights that read an element, times how strongly it is driven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Calibration
from ....errors import InternalError
from ....ir.program import Program
from ....process.jobs import run_jobs
from .consumers import Consumer, consumers, elements
from .criterion import Criterion, prunable
from .mask_gradients import guard_step, not_finite


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
        batches, taps = data.batches, consumers(program)

        def of_batch(number: int) -> dict[str, Tensor]:
            batch = batches[number]
            run = _Watched(program, taps)
            with torch.no_grad():
                run.run(*program.arguments(program.flatten(batch.args, batch.kwargs)))
            for label, found in run.found.items():
                if label.endswith(("/x", "/w")) and not torch.isfinite(found).all():
                    node = taps[int(label.partition("/")[0])].operand.node.name
                    raise not_finite(program, batch, f"an operand of {node}")
            return run.found

        energies = [_Energy(tap) for tap in taps]
        for found in run_jobs(self.name, len(batches), of_batch):
            for number, energy in enumerate(energies):
                energy.add({k.removeprefix(f"{number}/"): v for k, v in found.items() if k.startswith(f"{number}/")})
        result = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)}
        for energy in energies:
            for name, score in energy.per_group().items():
                result[name] += score
        return {name: score.sqrt() for name, score in result.items()}


class _Energy:
    """Energies of a consumer's two operands along the contracted dimension, added up over batches."""

    def __init__(self, tap: Consumer) -> None:
        self.tap = tap
        self.x = self.w = torch.zeros(())
        self.rows = self.w_rows = 0
        self.labels: dict[str, tuple[Tensor, Tensor | None]] = {}

    def add(self, found: dict[str, Tensor]) -> None:
        """Add what :func:`_energies` found in one batch."""
        if not found:
            return
        self.x, self.rows = self.x + found["x"], self.rows + int(found["rows"])
        other = self.tap.other
        if other is not None and "w" in found:
            if other.sampled is None:
                self.w, self.w_rows = found["w"], 1  # a weight: the same in every batch
            else:
                self.w, self.w_rows = self.w + found["w"], self.w_rows + int(found["w_rows"])
        for group in self.tap.groups if not self.labels else ():
            self.labels[group.name] = found[f"{group.name}/mine"], found.get(f"{group.name}/theirs")

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
    """Runs the graph; ``found`` then holds what each consumer's operands showed, by ``<number of the consumer>/``."""

    def __init__(self, program: Program, taps: Sequence[Consumer]) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.found: dict[str, Tensor] = {}
        self.taps: dict[str, list[tuple[int, Consumer]]] = {}
        for number, tap in enumerate(taps):
            self.taps.setdefault(tap.operand.node.name, []).append((number, tap))

    def run_node(self, n: Node) -> Any:
        if n.name in self.taps:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            for number, tap in self.taps[n.name]:
                self.found |= {f"{number}/{k}": v for k, v in _energies(tap, args, kwargs).items()}
        return guard_step(super().run_node, n)


def _energies(tap: Consumer, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """``x``, ``w``: energies of the two operands [length]; ``rows``, ``w_rows``: how many values each is a sum of;
    ``<group>/mine``, ``<group>/theirs``: which element of the group each position of either operand is [length]."""
    x = tap.operand.value(args, kwargs)
    along = _energy(x, tap.operand.position)
    found = {"x": along, "rows": torch.tensor(x.numel() // max(1, len(along)))}
    other = tap.other
    w = None if other is None else other.value(args, kwargs)
    if other is not None and w is not None:
        found["w"] = _energy(w, other.position)
        found["w_rows"] = torch.tensor(w.numel() // max(1, len(found["w"])))
    for group in tap.groups:
        found[f"{group.name}/mine"] = elements(tap.operand, x, group.axis).cpu()
        if other is not None and w is not None:
            found[f"{group.name}/theirs"] = elements(other, w, group.axis).cpu()
    return found


def _energy(tensor: Tensor, position: int) -> Tensor:
    """Summed squares along every dimension but one. [length] float64"""
    rest = [d for d in range(tensor.dim()) if d != position]
    squares = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).square()
    return (squares.sum(rest) if rest else squares).to("cpu", torch.float64)


def _gather(values: Tensor, label: Tensor, size: int) -> Tensor:
    mine = label >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, label[mine], values[mine])
