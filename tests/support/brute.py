"""Brute force for the trajectory criterion: a whole masked forward pass per removal, and the losses as written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from fxprune.data.batch import Batch
from fxprune.ir.axis import Keep
from fxprune.ir.group import PruneGroup
from fxprune.ir.program import Program
from fxprune.passes.analysis.importance.features import Tap, View
from fxprune.testing import _Masked, run_flat

Watched = tuple[dict[str, Tensor], list[Any]]


class Watching(_Masked):
    """The masked run of ``fxprune.testing`` that keeps values, and what some nodes read once masked."""

    def __init__(self, program: Program, keep: Keep, flat: Sequence[Any], names: set[str]) -> None:
        super().__init__(program, keep, flat)
        self.names, self.seen = names, dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = value
        return value

    def _mask(self, x: Tensor, position: int, dim: Any) -> Tensor:
        masked = super()._mask(x, position, dim)
        self.seen["masked"] = masked
        return masked


def watch(
    program: Program, batch: Batch, taps: Sequence[Tap], group: PruneGroup | None = None, *elements: int
) -> Watched:
    """Values of the taps (``masked`` for the last masked operand) and outputs, without some elements."""
    keep = {} if group is None else {group.axis: torch.tensor([i for i in range(group.size) if i not in elements])}
    flat = program.flatten(batch.args, batch.kwargs)
    run = Watching(program, keep, flat, {t.value for t in taps})
    outputs = run_flat(program, flat, run)
    return run.seen, outputs


def features_moved(
    taps: Sequence[Tap],
    view: View,
    now: dict[str, Tensor],
    was: dict[str, Tensor],
    mask: Tensor | None = None,
    normalised: bool = True,
) -> float:
    """Sum over the taps of a view of the mean squared entry of the change, by the definition."""
    total = 0.0
    for z in view.wanted:
        tap = taps[z]
        changed = now["masked"] if view.masked and z == view.own else now[tap.value]
        pair = [t.double() for t in (changed, was[tap.value])]
        if not tap.rows:
            total += float((pair[0].mean(0) - pair[1].mean(0)).square().mean())
            continue
        rows = [t.movedim(tap.channel, -1).reshape(-1, t.shape[tap.channel]) for t in pair]
        rows = [r if mask is None else r[mask.reshape(-1)] for r in rows]
        one, two = (functional.normalize(r, dim=1) if normalised else r for r in rows)
        total += float((one @ one.T - two @ two.T).square().mean())
    return total


def logits_moved(now: Tensor, was: Tensor, temperature: float) -> float:
    """Hinton's KL of logits [samples, classes]."""
    p, q = (functional.softmax(t.double() / temperature, -1) for t in (was, now))
    return float(temperature**2 * (p * (p / q).log()).sum(-1).mean())
