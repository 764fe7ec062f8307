"""Clocks that do not look at a watch, and tables made up for a program: latency without noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxprune.driver.measure_latency import at_counts, counts_of, probes_of
from fxprune.ir.program import Program
from fxprune.target.clock import Clock, PairedLatency
from fxprune.target.latency_table import Curve, LatencyTable, Point, Setting, classes, fingerprint

Time = Callable[[Program], float]


def work_of(program: Program) -> float:
    """Elements of all weights with two dimensions or more: what a made-up machine's time goes with."""
    return float(sum(t.numel() for t in program.exported.state_dict.values() if t.dim() > 1))


def fixed_and_work(fixed: float) -> Time:
    """Milliseconds: a start that nothing shortens, in elements, and one for a thousand elements."""
    return lambda program: (fixed + work_of(program)) / 1e3


class Feet(nn.Module):
    """Four feed-forward parts: what is cut is all that takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 128) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(128, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


class FakeClock(Clock):
    """Reads ``time`` of the programs; everything else (lowering, inputs) is left out."""

    time: Time = staticmethod(fixed_and_work(0.0))
    read_so_far = 0

    def read(self, program: Program) -> PairedLatency:
        type(self).read_so_far += 1
        dense, small = self.time(self._program), self.time(program)
        return PairedLatency(small / dense, 1e-6, small, dense, 9)


def made_up(
    program: Program,
    ratio: Callable[[str, int, int], float],
    dense_ms: float = 100.0,
    error: float = 1e-6,
    probes: bool = False,
) -> LatencyTable:
    """A table of all classes: ``ratio(kind, count, size)`` of the dense latency."""
    curves = {}
    for name, groups in classes(program).items():
        g = groups[0]
        probed = set(probes_of(g)) if probes and g.size >= 128 else set()
        counts = sorted({*counts_of(g), *probed})
        points = tuple(Point(n, ratio(str(g.kind), n, g.size), error, n in probed) for n in counts)
        curves[name] = Curve(str(g.kind), g.size, len(groups), points)
    return LatencyTable(Setting("onnx", "a made-up device"), fingerprint(program), dense_ms, curves)


__all__ = ["FakeClock", "Feet", "Time", "at_counts", "fixed_and_work", "made_up", "work_of"]
