"""How much memory calibration may take: one budget, of which caches take shares; and what to do when it runs out."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import SymInt, Tensor

from ..errors import FxpruneError, OptionError
from ..ir.cost import Budget
from ..ir.dataflow import MOVES, family
from ..ir.pipeline import Pass
from ..ir.program import Program
from ..ir.signature import samples_in
from ..process.jobs import forget_identity
from .batch import Batch, Calibration, evenly

_budget: contextvars.ContextVar[int | None] = contextvars.ContextVar("memory", default=None)
STREAMS = 0.5  # share of the budget for what is alive of every batch while two graphs run side by side
FLOW = 0.5  # share of the budget for one batch on its way forwards and back
WAYS = 3  # values stay for the way back, meet their gradients there, and outputs are compared in fp64
LEAST = 2**20  # bytes, so that no cache is given nothing
HEAP = 2**25
"""Bytes of the largest value of a batch. The C library takes what is larger from the system anew each time and gives it
back: on a CNN at 224 pixels batches of 6 run 2.6 times as fast as batches of 32, five times on the way back."""
TOGETHER = 4  # samples of a batch at least, for scores that compare them with each other


@contextlib.contextmanager
def memory_limit(amount: int | float | str | None) -> Iterator[None]:
    """Caches of calibration take at most ``amount`` bytes together inside the block: "8GiB", a number, or None for
    their usual sizes. Weights are not counted, and one batch on its way through the model only by :func:`split_to_fit`.

    Raises OptionError for what is no amount.
    """
    token = _budget.set(None if amount is None else _read(amount))
    try:
        yield
    finally:
        _budget.reset(token)


def _read(amount: int | float | str) -> int:
    where, cure = f"--memory {amount}", "write 8GiB, or 512MiB"
    try:
        asked = Budget.parse("bytes", amount)
    except Exception as error:
        raise OptionError(f"'{amount}' is no amount of memory", where=where, cure=cure) from error
    if asked.relative or asked.amount < LEAST:
        raise OptionError("memory is an amount of at least 1 MiB", where=where, cure=cure)
    return int(asked.amount)


def find_budget() -> int | None:
    """The budget in bytes, None where there is none."""
    return _budget.get()


def share(usual: int, part: float) -> int:
    """``usual`` bytes, or ``part`` of the budget where there is one and that is less.

    >>> with memory_limit("64MiB"):
    ...     share(2**30, 0.25), share(2**20, 0.25)
    (16777216, 1048576)
    """
    budget = _budget.get()
    return usual if budget is None else min(usual, max(LEAST, int(budget * part)))


def subsample_to_fit(program: Program, data: Calibration) -> Calibration:
    """``data``, or evenly chosen samples of it: as many as two graphs can hold side by side within the budget."""
    budget = _budget.get()
    if budget is None or not data.batches:
        return data
    most = max(1, int(STREAMS * budget / max(2 * alive(program), 1)))
    if data.samples <= most:
        return data
    chosen = set(evenly(range(data.samples), most))
    first, batches = 0, list[Batch]()
    for batch in data.batches:
        here = [i for i in range(batch.size) if first + i in chosen]
        first += batch.size
        if here:
            batches.append(batch if len(here) == batch.size else batch.pick(torch.tensor(here)))
    return replace(data, batches=tuple(batches))


def split_to_fit(program: Program, data: Calibration) -> Calibration:
    """The same samples in batches that fit the budget while one of them runs forwards and back through the model, and
    whose largest value the C library keeps at hand (``HEAP``, at least ``TOGETHER`` samples).

    A graph that was captured at a fixed batch size takes its batches as they are. Scores that compare the samples of a
    batch with each other (``trajectory``) see fewer at a time then.
    """
    budget = _budget.get()
    if program.fixed_batch:
        return data
    most = max(TOGETHER, HEAP // max(largest(program), 1))
    if budget is not None:
        most = min(most, max(1, int(FLOW * budget / max(WAYS * through(program), 1))))
    if all(b.size <= most for b in data.batches):
        return data
    parts = [b.pick(part) for b in data.batches for part in torch.arange(b.size).tensor_split(-(-b.size // most))]
    return replace(data, batches=tuple(parts))


def through(program: Program) -> int:
    """Bytes of all values that one sample's run makes, views not counted."""
    made = (n for n in program.graph.nodes if n.op == "call_function" and family(n) not in MOVES)
    return -(-sum(_bytes(t) for n in made for t in _tensors(n.meta.get("val"))) // _example_size(program))


def largest(program: Program) -> int:
    """Bytes of the largest value of one sample's run."""
    sizes = (_bytes(t) for n in program.graph.nodes if n.op == "call_function" for t in _tensors(n.meta.get("val")))
    return -(-max(sizes, default=0) // _example_size(program))


def alive(program: Program) -> int:
    """Most bytes of values that are alive at one time while one sample runs through, parameters not counted."""
    nodes = list(program.graph.nodes)
    last = {n: i for i, node in enumerate(nodes) for n in node.all_input_nodes}
    ends: dict[int, list[int]] = {}
    now = most = 0
    for i, node in enumerate(nodes):
        if node.op != "placeholder" and node in last:
            size = sum(map(_bytes, _tensors(node.meta.get("val"))))
            now += size
            ends.setdefault(last[node], []).append(size)
        most = max(most, now)
        now -= sum(ends.pop(i, ()))
    return -(-most // _example_size(program))


def _example_size(program: Program) -> int:
    """Samples of the example inputs."""
    args, kwargs = program.example_inputs
    return max(samples_in((*args, *kwargs.values())), 1)


def _tensors(value: object) -> Sequence[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else ()


def _bytes(value: Tensor) -> int:
    size = value.element_size()
    for n in value.shape:
        size *= int(n.node.hint or 1) if isinstance(n, SymInt) else int(n)
    return size


def give_back() -> None:
    """Hand what is no longer used back to the system: objects in cycles, and freed memory that the C library keeps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def ran_out(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, is a lack of memory: Python's, the CPU allocator's or the GPU's."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError)
            and ("not enough memory" in words or "can't allocate memory" in words or "out of memory" in words)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def with_smaller_batches(
    passes: Sequence[Pass], calibration: Calibration | None, error: Exception, warn: Callable[[str], None]
) -> tuple[list[Pass], Calibration | None]:
    """(``passes``, ``calibration``) on batches of half the size, to be run again after memory ran out.

    Raises FxpruneError where no pass reads data, or every batch holds one sample.
    """
    reads = [getattr(p, "data", None) for p in passes]
    given = next((data for data in reads if isinstance(data, Calibration)), None)
    less = None if given is None else halve_batches(given)
    if given is None or less is None:
        raise FxpruneError(
            "memory ran out",
            where=", ".join(p.slug() for p in passes),
            why=(str(error).splitlines() or [type(error).__name__])[0][:200],
            cure="give `--memory` less than is free, fewer `--samples`, or a larger machine",
        ) from error
    warn(
        f"memory ran out in {', '.join(p.slug() for p in passes)}: it goes on with batches of "
        f"{max(b.size for b in less.batches)} samples"
    )
    forget_identity()  # what was kept of this run belongs to the old batches
    again = [
        replace(p, data=less) if data is given else p  # type: ignore[call-arg]
        for p, data in zip(passes, reads, strict=True)
    ]
    return again, less if calibration is given else calibration


def halve_batches(data: Calibration) -> Calibration | None:
    """The same samples in batches of half the size; None where every batch holds one sample.

    Scores that compare the samples of a batch with each other (``trajectory``) see fewer at a time then.
    """
    if all(b.size < 2 for b in data.batches):
        return None
    parts = [p for b in data.batches for p in torch.arange(b.size).tensor_split(min(2, b.size))]
    batches = [b for b in data.batches for _ in range(min(2, b.size))]
    return replace(data, batches=tuple(b.pick(p) for b, p in zip(batches, parts, strict=True)))
