"""``tune``: a bounded number of optimiser steps of unlabelled distillation, after the closed form."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn import functional

from ....data.batch import Batch
from ....data.memory import share
from ....ir.axes import Axes
from ....ir.axis import Keep
from ....ir.dataflow import Family, family, row_weight
from ....ir.program import Program
from ....ir.signature import padding_mask
from .agreement import Agreement, Yardstick
from .outputs import Output, class_rows, divergence, floating, rows, run
from .record import Tuning
from .sites import Site, align, find_sites

TABLES = (Family.TABLE, Family.LOOKUP)
"""Ops that look rows up: most of such a table is never seen in the calibration set, so it is left alone."""
CACHE = 2**28  # bytes of dense results that are kept; beyond, the dense model runs again
CHECKS = 8  # times that the guard looks while tuning
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Tuner:
    """Adam on the pruned graph's weights towards what the dense graph says, from a closed form on.

    Loss    per output: logits ``KL(dense || pruned) T^2`` at T = 2, per position (Hinton et al. 2015); others
            ``sum (S - S')^2 / sum S^2`` over the cosine matrices S, S' of the batch without their diagonal (relational:
            Park et al. 2019), plus the mean of ``1 - cos`` per sample, plus the normalised squared error of every
            entry. ``hidden`` times the mean over residual sums of their squared error, rows weighted by the norm behind
            them (as in the closed form), divided by that of their weighted mean.
    Trains  every floating parameter that has one name, is no table that rows are looked up in (embeddings), and that
            the loss depends on; what is half precision keeps a copy in fp32 for the optimiser.
    Steps   bounded: ``steps``; one calibration batch each, in an order drawn anew for every round; learning rate
            ``lr``, warm-up over the first tenth, then a cosine to zero
    Chosen  by held-out agreement, on a sentence encoder at 0.4 of its FLOPs: ``lr`` 1e-4 gained with 512 and 2048
            samples, 2e-4 with 2048 a little less, 4e-4 and 1e-3 with 512 nothing; ``hidden`` made no difference
    Guard   the agreement on held-out samples at eight points on the way; the best state must beat the start's,
            else nothing is changed. A loss that is not finite ends the run.
    """

    steps: int = 200
    lr: float = 1e-4
    seed: int = 0
    hidden: float = 1.0

    def run(
        self,
        program: Program,
        pruned: Program,
        keep: Keep,
        batches: Sequence[Batch],
        start: Mapping[str, Tensor],
        ruler: Yardstick,
        tolerance: float,
    ) -> tuple[dict[str, Tensor], Tuning]:
        """(changed tensors by placeholder, ``start`` where that was better; the record)."""
        leaves = {
            n: _leaf(start.get(n, pruned.tensors[pruned.tensor_of_placeholder[n]])) for n in trainable(program, pruned)
        }
        begin = ruler.measure(pruned, start) if ruler.usable else Agreement(0.0, 0.0, 0.0)
        best, at, best_tensors = begin, 0, dict(start)
        losses: list[float] = []
        why = "" if ruler.usable else "too few held-out samples to judge it"
        why = why or ("" if leaves and batches else "nothing can be trained")
        distill = _Distillation(program, pruned, keep, batches, self.hidden)
        order = _order(len(batches), self.steps, self.seed)
        every = max(1, math.ceil(self.steps / CHECKS))
        adam = torch.optim.Adam(leaves.values(), lr=self.lr, betas=(0.9, 0.99)) if leaves else None
        for step, index in enumerate(order if not why else ()):
            assert adam is not None
            for group in adam.param_groups:
                group["lr"] = self.lr * schedule(step, self.steps)
            try:
                loss = distill.loss(index, {**start, **_cast(leaves, pruned)})
                adam.zero_grad()
                loss.backward()
            except (RuntimeError, NotImplementedError) as error:
                if step:
                    raise
                why = f"the graph cannot be differentiated: {str(error).strip().splitlines()[0]}"
                break
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                why = f"the loss was not finite at step {step}"
                break
            adam.step()
            if (step + 1) % every == 0 or step + 1 == self.steps:
                now = {**start, **{n: t.detach().clone() for n, t in _cast(leaves, pruned).items()}}
                value = ruler.measure(pruned, now)
                if value.is_better(best) and not value.veto(begin, tolerance):
                    best, at, best_tensors = value, step + 1, now
        why = why or ("" if at else "no check agreed better with the dense outputs than the closed form")
        said = _means(losses, len(batches))
        entries = sum(t.numel() for t in leaves.values())
        return best_tensors, Tuning(
            len(losses), at, at > 0, self.lr, self.seed, entries, len(batches), said, begin.record(), best.record(), why
        )


def _means(losses: Sequence[float], batches: int) -> dict[str, float]:
    """Of the first and the last round over the batches, and the smallest of any round: batches differ in difficulty."""
    if not losses:
        return {}
    rounds = [losses[i : i + batches] for i in range(0, max(1, len(losses) - batches + 1))]
    means = [sum(r) / len(r) for r in rounds]
    return {"first": means[0], "last": means[-1], "best": min(means)}


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at ``step``: up over the first tenth, then down to zero along a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def trainable(program: Program, pruned: Program) -> list[str]:
    """Placeholders of the parameters that tuning may change; they can all be written back into the dense program."""
    bound, tensors, axes, whole = pruned.tensor_of_placeholder, pruned.tensors, program.need("axes"), program.tensors
    tied = collections.Counter(t.data_ptr() for t in whole.values())  # a weight of two names is written to one only
    names = set(pruned.exported.graph_signature.inputs_to_parameters)
    found = []
    for node in pruned.placeholders():
        if node.name not in names or axes.dims.get(node.name) is None:
            continue
        value = tensors[bound[node.name]]
        if not value.is_floating_point() or not value.numel() or tied[whole[bound[node.name]].data_ptr()] > 1:
            continue
        if not node.users or any(family(user) in TABLES and user.args[0] is node for user in node.users):
            continue
        found.append(node.name)
    return found


def _leaf(value: Tensor) -> Tensor:
    wide = value.detach().float() if value.dtype in (torch.float16, torch.bfloat16) else value.detach()
    return wide.clone().requires_grad_()


def _cast(leaves: Mapping[str, Tensor], pruned: Program) -> dict[str, Tensor]:
    bound, tensors = pruned.tensor_of_placeholder, pruned.tensors
    return {n: t.to(tensors[bound[n]].dtype) for n, t in leaves.items()}


def _order(count: int, steps: int, seed: int) -> list[int]:
    """The batch of every step: all in a new random order each round."""
    generator, found = torch.Generator().manual_seed(seed), list[int]()
    while count and len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]


class _Recording(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, program: Program, wanted: Sequence[str]) -> None:
        super().__init__(program.exported.graph_module)
        self.wanted, self.seen = set(wanted), dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
        return value


@dataclass(frozen=True)
class _DenseOutputs:
    """What the dense graph said on one batch: floating outputs, padding, residual sums and their row weights."""

    outputs: list[Output]
    mask: Tensor | None
    hidden: dict[str, tuple[Tensor, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*(o.value for o in self.outputs), *(t for t, _ in self.hidden.values())))


class _Distillation:
    """The loss of one batch as a function of the pruned graph's tensors."""

    def __init__(self, program: Program, pruned: Program, keep: Keep, batches: Sequence[Batch], hidden: float) -> None:
        self.program, self.pruned, self.keep, self.batches = program, pruned, keep, batches
        self.axes: Axes = program.need("axes")
        there = {n.name for n in pruned.graph.nodes}
        sites = find_sites(program, keep, pruned.graph, False).sites if hidden else ()
        self.sites: dict[str, Site] = {s.target: s for s in sites if s.target in there and s.path}
        self.hidden, self.cached, self.used = hidden, dict[int, _DenseOutputs](), 0

    def loss(self, index: int, tensors: Mapping[str, Tensor]) -> Tensor:
        batch = self.batches[index]
        flat = self.pruned.flatten(batch.args, batch.kwargs)
        said = self._dense(index)
        recording = _Recording(self.pruned, list(self.sites))
        outputs = floating(self.pruned, run(self.pruned, flat, tensors, recording), batch.size)
        parts = [output_loss(a, b, said.mask) for a, b in zip(said.outputs, outputs, strict=True)]
        total = torch.stack(parts).mean()
        sums = [_normalise(recording.seen[name], want, weight) for name, (want, weight) in said.hidden.items()]
        return total + self.hidden * torch.stack(sums).mean() if sums else total

    @torch.no_grad()
    def _dense(self, index: int) -> _DenseOutputs:
        if index in self.cached:
            return self.cached[index]
        batch = self.batches[index]
        flat = self.program.flatten(batch.args, batch.kwargs)
        recording, mask = _Recording(self.program, list(self.sites)), padding_mask(self.program, flat)
        outputs = floating(self.program, run(self.program, flat, None, recording), batch.size)
        hidden = {}
        for name, site in self.sites.items():
            whole = recording.seen[name]
            hidden[name] = (align(whole, self.axes.dims[name], self.keep), _weight(site, whole, mask))
        said = _DenseOutputs(outputs, mask, hidden)
        if self.used + said.bytes <= share(CACHE, 0.25):
            self.cached[index], self.used = said, self.used + said.bytes
        return said


def _weight(site: Site, z: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of rows: 1 / what the norm behind divides by, squared; 0 where there is padding. Broadcasts over z."""
    weight = row_weight(site.norm, site.eps, z)
    if mask is not None and z.dim() == 3 and mask.shape == z.shape[:2]:
        weight = weight * mask[..., None].to(weight)
    return weight


def _normalise(got: Tensor, want: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error over the weighted variance around the mean row. []"""
    wide = torch.promote_types(got.dtype, torch.float32)
    got, want = got.to(wide), want.to(wide)
    weight = weight.to(wide).expand_as(want)
    channel = 1 if want.dim() == 4 else want.dim() - 1
    around = [d for d in range(want.dim()) if d != channel]
    mean = (weight * want).sum(around, keepdim=True) / weight.sum(around, keepdim=True).clamp_min(1e-12)
    spread = (weight * (want - mean).square()).sum()
    return (weight * (got - want).square()).sum() / spread.clamp_min(1e-12)


def output_loss(dense: Output, pruned: Output, mask: Tensor | None) -> Tensor:
    """How far one output is from the dense one; 0 where they agree. []"""
    if dense.classes is not None:
        return divergence(class_rows(dense, mask), class_rows(pruned, mask), TEMPERATURE)
    wide = torch.promote_types(dense.value.dtype, torch.float32)
    a, b = (functional.normalize(rows(o.value.to(wide), mask), dim=1) for o in (dense, pruned))
    apart = 1 - torch.eye(len(a), dtype=wide, device=a.device)
    relation = ((a @ a.T - b @ b.T) * apart).square().sum() / ((a @ a.T) * apart).square().sum().clamp_min(1e-12)
    weight = torch.ones((), dtype=wide, device=a.device)
    if mask is not None and dense.value.dim() > 2 and mask.shape == dense.value.shape[:2]:
        weight = mask.to(a).reshape(*mask.shape, *[1] * (dense.value.dim() - 2))
    entries = _normalise(pruned.value, dense.value, weight)
    return relation + (1 - (a * b).sum(1)).mean() + entries
