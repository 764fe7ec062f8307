"""Gradients of the loss with respect to a 0/1 mask on every element of every group, per sample, in one backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Batch, Calibration
from ....errors import FxpruneError, InternalError
from ....ir.example_sizes import runtime_sizes
from ....ir.program import Program
from ....ir.signature import batch_axes, samples_in
from ....process.jobs import run_jobs
from .consumers import Consumer, consumers, elements, sample_of
from .objective import objectives

Gradients = dict[str, Tensor]
Passes = Iterator[tuple[Gradients, int]]
"""Per backward pass: dL/dm by group, and the samples in it."""


def mask_gradients(
    program: Program, data: Calibration | None, seed: int, probes: int
) -> Iterator[tuple[Gradients, int]]:
    """Per backward pass: group name -> dL/dm, and the number of samples in it.

        ``dL/dm[b, i] = sum over consumers, over everything but (b, i), of x * dL/dx``      x: operand of the consumer

    Shapes   [batch, size]; [1, size], summed over samples, for a group with a consumer without a sample axis
    Memory   that of one batch's backward pass without weight gradients, plus [batch, size] per group
    Errors   FxpruneError naming the node where a NaN first appears, or where the model fails on the data
    """
    if data is None or not data.batches:
        raise InternalError("mask gradients need calibration data")
    taps = consumers(program)
    for batch, first in zip(data.batches, first_samples(program, data), strict=True):
        yield from _passes(program, taps, batch, seed, first, probes)


def add_over_passes(
    name: str,
    program: Program,
    data: Calibration | None,
    seed: int,
    probes: int,
    measure: Callable[[Tensor, int], Tensor],
) -> tuple[Gradients, int]:
    """(group name -> sum over all backward passes of ``measure(dL/dm, samples)``, number of samples in all passes).

    The passes are those of :func:`mask_gradients`; each batch is a job called ``name``, so the sum can be interrupted,
    resumed and shared. Groups that no loss reaches are absent. Within a batch passes are added first, then batches.
    """

    def of_batch(passes: Passes) -> Gradients:
        total = Gradients()
        for gradients, samples in passes:
            for group, g in gradients.items():
                found = measure(g, samples)
                total[group] = total[group] + found if group in total else found
        return total

    result = Gradients()
    found, seen = batch_by_batch(name, program, data, seed, probes, of_batch)
    for one in found:
        for group, value in one.items():
            result[group] = result[group] + value if group in result else value
    return result, seen


def batch_by_batch(
    name: str, program: Program, data: Calibration | None, seed: int, probes: int, work: Callable[[Passes], Gradients]
) -> tuple[list[Gradients], int]:
    """(``work`` of every batch's backward passes, in order; number of samples in all passes). A batch is a job."""
    if data is None or not data.batches:
        raise InternalError("mask gradients need calibration data")
    batches, taps, firsts = data.batches, consumers(program), first_samples(program, data)

    def job(number: int) -> Gradients:
        seen = 0

        def count_batch() -> Passes:
            nonlocal seen
            for gradients, samples in _passes(program, taps, batches[number], seed, firsts[number], probes):
                seen += samples
                yield gradients, samples

        found = work(count_batch())
        return {**found, _SEEN: torch.tensor(seen)}

    results = run_jobs(name, len(batches), job)
    return [{k: v for k, v in r.items() if k != _SEEN} for r in results], sum(int(r[_SEEN]) for r in results)


_SEEN = "number of samples"  # no parameter has this name, so no group has


def _passes(program: Program, taps: Sequence[Consumer], batch: Batch, seed: int, first: int, probes: int) -> Passes:
    run = TappedRun(program, taps, without_samples(taps), batch)
    losses = objectives(program, run.forward(), batch, run.samples, seed, first, probes)
    for i, loss in enumerate(losses):
        yield run.gradients_of(loss, retain=i < len(losses) - 1), run.samples


def first_samples(program: Program, data: Calibration) -> list[int]:
    """The number of each batch's first sample among all samples: what their random directions are drawn by."""
    sizes = [samples_in(program.flatten(b.args, b.kwargs)) for b in data.batches]
    return [0, *accumulate(sizes)][:-1]


def without_samples(taps: Sequence[Consumer]) -> set[str]:
    """Groups with a consumer whose operand has no sample axis: their gradients are known per batch only."""
    return {g.name for tap in taps if tap.operand.sampled is None for g in tap.groups}


def notes_on_samples(program: Program) -> list[str]:
    """A note that names the groups whose gradients are per batch."""
    names = sorted(without_samples(consumers(program)))
    if not names:
        return []
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"gradients per batch, not per sample, for {len(names)} group(s) without a sample axis: {some}"]


class TappedRun(Interpreter):
    """Runs the graph and hands every consumer an alias of its operand, whose gradient is reduced as it arrives.

    watch: nodes whose values are kept in ``watched``, to build losses from.
    """

    def __init__(
        self, program: Program, taps: Sequence[Consumer], lumped: set[str], batch: Batch, watch: Collection[str] = ()
    ) -> None:
        super().__init__(program.exported.graph_module, garbage_collect_values=True)
        self.program, self.batch, self.lumped = program, batch, lumped
        self.taps: dict[str, list[Consumer]] = {}
        for tap in taps:
            self.taps.setdefault(tap.operand.node.name, []).append(tap)
        self.flat = program.flatten(batch.args, batch.kwargs)
        self.samples = samples_in(self.flat)
        self.sizes = runtime_sizes(program, self.flat)
        self.batch_axes = batch_axes(program)
        self.gradients: Gradients = {}
        self.watch, self.watched = watch, dict[str, Tensor]()
        self.aliases: list[tuple[Consumer, Tensor]] = []

    def forward(self) -> list[Any]:
        """Outputs of the graph, in order."""
        with torch.enable_grad():
            values = [v.detach() if isinstance(v, Tensor) else v for v in self.program.arguments(self.flat)]
            return list(self.run(*values))

    def run_node(self, n: Node) -> Any:
        value = self._step(n)
        if n.name in self.watch:
            self.watched[n.name] = value
        return value

    def _step(self, n: Node) -> Any:
        if n.name not in self.taps:
            return guard_step(super().run_node, n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        for tap in self.taps[n.name]:
            x = tap.operand.value(args, kwargs)
            if torch.isnan(x).any():
                raise not_finite(self.program, self.batch, f"an operand of {n.name}")
            # an alias of its own, so that the gradient seen is the one through this consumer
            alias = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            # the hook must not hold this run: through C++ no garbage collector finds that circle
            alias.register_hook(partial(TappedRun._collect, weakref.proxy(self), tap, x.detach()))
            args, kwargs = tap.operand.put(args, kwargs, alias)
            self.aliases.append((tap, alias))
        return guard_step(lambda node: getattr(self, node.op)(node.target, args, kwargs), n)

    def gradients_of(self, loss: Tensor, inputs: Sequence[Tensor] | None = None, retain: bool = True) -> Gradients:
        """dL/dm of every group, or of those whose aliases are ``inputs``: autograd then runs no further than these."""
        self.gradients = {}
        if loss.requires_grad and inputs is None:  # else no group reaches it
            loss.backward(retain_graph=retain)
        elif loss.requires_grad and inputs:
            torch.autograd.grad(loss, list(inputs), retain_graph=retain, allow_unused=True)
        for name, gradient in self.gradients.items():
            if not torch.isfinite(gradient).all():
                raise not_finite(self.program, self.batch, f"a gradient of group {name}")
        return self.gradients

    @torch.no_grad()
    def _collect(self, tap: Consumer, x: Tensor, gradient: Tensor) -> None:
        product = x * gradient
        product = product.float() if product.dtype in (torch.float16, torch.bfloat16) else product
        position, sampled = tap.operand.position, tap.operand.sampled
        rest = [d for d in range(x.dim()) if d not in (sampled, position)]
        flat = product.sum(rest) if rest else product
        if sampled is None:
            flat = flat[None]
        else:
            flat = flat.T if sampled > position else flat
            sample = sample_of(tap.operand, x.shape, self.batch_axes, self.samples, self.sizes).to(flat.device)
        for group in tap.groups:
            label = elements(tap.operand, x, group.axis)
            mine = label >= 0
            per = flat.new_zeros(len(flat), group.size).index_add_(1, label[mine], flat[:, mine])
            if group.name not in self.lumped:
                rows = per.new_zeros(self.samples, group.size).index_add_(0, sample, per)
            else:
                rows = per.sum(0, keepdim=True)
            rows = rows.to("cpu", torch.float64)
            held = self.gradients.get(group.name)
            self.gradients[group.name] = rows if held is None else held + rows


def guard_step(step: Any, node: Node) -> Any:
    """Run one node; a failure names it."""
    try:
        return step(node)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, FxpruneError):
            raise
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FxpruneError(
            "the model failed on the calibration data",
            where=node.name,
            why=line,
            cure="check the data's shapes and types against the model's inputs",
        ) from error


def not_finite(program: Program, batch: Batch, seen: str) -> FxpruneError:
    """The error for a NaN met in this batch; a second run, node by node, says where it first appears."""

    class First(Interpreter):
        found = ""

        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if not self.found and n.op != "output":
                parts = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(t, Tensor) and t.is_floating_point() and torch.isnan(t).any() for t in parts):
                    self.found = n.name
            return value

    first = First(program.exported.graph_module)
    with torch.no_grad():
        first.run(*program.arguments(program.flatten(batch.args, batch.kwargs)))
    bound = program.tensor_of_placeholder
    if first.found in bound:
        return FxpruneError(
            "a weight is not a finite number",
            where=bound[first.found],
            why=f"seen in {seen}",
            cure="load a checkpoint that is not damaged",
        )
    if first.found in program.user_inputs:
        return FxpruneError("the calibration data holds a NaN", where=f"input '{first.found}'", cure="clean the data")
    why = "it is the first NaN of the forward pass" if first.found else "the backward pass overflowed"
    return FxpruneError(
        "an activation is not a number",
        where=first.found or seen,
        why=why,
        cure="score in float32, or leave out the samples that overflow",
    )
