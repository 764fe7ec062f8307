"""The stop-watch of latency budgets: a program against the dense one, lowered by the same backend, in one run."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.memory import give_back
from ..errors import OptionError
from ..ir.pipeline import Pipeline
from ..ir.program import Program
from ..ir.signature import dim_names, sample_inputs, samples_in
from ..process.environment import cpu_name
from .backend import Backend, Lowered
from .parity import Runner
from .timing import Timing, latency, sample_times

SECONDS, ROUNDS = 2.0, 200  # of measuring, per program
LEAST = 9  # rounds, however long one takes
TOGETHER = 64 * 2**20  # bytes of dense weights up to which both programs stay loaded while a delivery is timed
SURELY = 512 * 2**20  # the same where plans follow from what is read: call by call in turns is surer
TURNS = ("dense", "small", "small", "dense") * 2  # of larger ones, one of which is loaded at a time


@dataclass(frozen=True)
class PairedLatency:
    """A program beside the dense one.

    ratio     median of the rounds' own ratios: what slows both down for longer than a round cancels
    error     standard error of that median, in the same unit
    ms        median milliseconds per call;  dense_ms: of the dense program in the same rounds
    rounds    how many there were
    """

    ratio: float
    error: float
    ms: float
    dense_ms: float
    rounds: int


class Clock:
    """Lowers programs with a backend and times them beside the dense one. Use as a context manager: its files go.

    batch    samples per call;  threads: 0 leaves them to the runtime
    together largest dense weights, in bytes, at which two programs are timed call by call in turns, both loaded. Two
             runtimes of larger ones are what most of the memory goes into: there one is loaded at a time, for a block
             of calls, in the order of ``TURNS``, so that a drift slows both alike

    With one CPU thread the clock is the process's own CPU time: the same as a watch on an idle machine, and not moved
    by whoever else wants the core. With more threads, or on a GPU, it is a watch.
    """

    def __init__(
        self,
        backend: Backend,
        dense: Program,
        batch: int = 1,
        threads: int = 0,
        seconds: float = SECONDS,
        together: int | None = None,
    ) -> None:
        if batch < 1:
            raise OptionError("a batch holds at least one sample", where=f"--batch {batch}")
        self.backend, self.batch, self.threads, self.seconds = (
            backend.with_threads(threads) if threads else backend,
            batch,
            threads,
            seconds,
        )
        self.device = "cuda" if backend.runs_on() == "cuda" and torch.cuda.is_available() else "cpu"
        self.flat = on_device(at_batch(dense, batch), self.device)
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-latency-")
        self._made = 0
        self._dense: Callable[[], Any] | None = None
        self._payload: Path | None = None  # the dense program's
        self._program = dense
        weights = sum(t.numel() * t.element_size() for t in dense.tensors.values())
        self._apart = weights > (TOGETHER if together is None else together)
        self._gpu = self.device == "cuda" or any(t.device.type == "cuda" for t in dense.tensors.values())
        self._clock = time.process_time if threads == 1 and not self._gpu else time.perf_counter

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._dense = None
        self._folder.cleanup()

    def read(self, program: Program) -> PairedLatency:
        """``program`` lowered and timed beside the dense one. Raises LoweringError."""
        with self._folder_of_its_own() as folder:
            lowered = self._lower(program, folder)
            if self._apart:
                payload = lowered.payload
                del lowered
                give_back()
                return self._in_blocks(lambda: self.backend.load(payload), self.seconds)
            with torch_threads(self.threads):
                calls = {"dense": self._of_dense(), "small": self._calling(lowered.run)}
                samples, _ = sample_times(calls, seconds=self.seconds, warmup=2, rounds=ROUNDS, clock=self._clock)
                while len(samples["dense"]) < LEAST:
                    more, _ = sample_times(calls, seconds=self.seconds, warmup=0, rounds=5, clock=self._clock)
                    samples = {name: [*samples[name], *more[name]] for name in samples}
            return pair_latencies(samples["dense"], samples["small"])

    def dense_seconds(self) -> float:
        """Seconds of one call of the dense program, the better of two; of the first alone where that is short."""
        call, best = self._of_dense(), math.inf
        with torch_threads(self.threads):
            for _ in range(2):
                started = time.perf_counter()
                call()
                best = min(best, time.perf_counter() - started)
                if best < 0.1:
                    break
        return best

    def beside(self, load: Callable[[], Runner], seconds: float) -> PairedLatency:
        """What ``load`` loads beside the dense program, for about so many seconds."""
        if self._apart:
            return self._in_blocks(load, seconds)
        with torch_threads(self.threads):
            calls = {"dense": self._of_dense(), "small": self._calling(load())}
            samples, _ = sample_times(calls, seconds=seconds, warmup=2, rounds=ROUNDS, clock=self._clock)
        return pair_latencies(samples["dense"], samples["small"])

    def _in_blocks(self, load: Callable[[], Runner], seconds: float) -> PairedLatency:
        """The same with one of them loaded at a time. A block counts as a round, its median as the round's time."""
        medians: dict[str, list[float]] = {"dense": [], "small": []}
        with torch_threads(self.threads):
            for name, turns in itertools.groupby(TURNS):
                call = self._of_dense() if name == "dense" else self._calling(load())
                for turn, _ in enumerate(turns):
                    samples, _ = sample_times(
                        {name: call},
                        seconds=seconds / len(TURNS),
                        warmup=0 if turn else 2,
                        rounds=ROUNDS,
                        least=2,
                        clock=self._clock,
                    )
                    medians[name].append(statistics.median(samples[name]))
                del call
                give_back()
        return pair_latencies(medians["dense"], medians["small"])

    def alone(self, run: Runner, seconds: float) -> Timing:
        """The same payload by itself, where there is no dense program to hold it against."""
        with torch_threads(self.threads):
            calls = {"small": self._calling(run)}
            return latency(calls, seconds=seconds, warmup=2, rounds=ROUNDS, clock=self._clock)["small"]

    def _of_dense(self) -> Callable[[], Any]:
        """The dense program's call: lowered once, and kept where both are held at the same time."""
        if self._dense is not None:
            return self._dense
        if self._payload is not None:
            return self._calling(self.backend.load(self._payload))
        folder = Path(self._folder.name) / "dense"
        folder.mkdir()
        lowered = self._lower(self._program, folder)
        call = self._calling(lowered.run)
        if self._apart:
            self._payload = lowered.payload
        else:
            self._dense = call
        return call

    @contextlib.contextmanager
    def _folder_of_its_own(self) -> Iterator[Path]:
        """An empty folder; its files go."""
        self._made += 1
        folder = Path(self._folder.name) / str(self._made)
        folder.mkdir()
        yield folder
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                file.unlink()

    def _lower(self, program: Program, folder: Path) -> Lowered:
        bare = program.but(axes=None, groups=None, scores=None, plan=None, tokens=None)
        return self.backend.lower(Pipeline(self.backend.legalize()).run(bare), folder)

    def _calling(self, run: Runner) -> Callable[[], Any]:
        def call() -> None:
            run(self.flat)
            if self._gpu:
                torch.cuda.synchronize()

        return call


class SharedClock:
    """The one clock of a run, made when it is first asked for, so that the dense program is lowered once; a context.

    batch, threads   as :class:`Clock` takes them
    """

    def __init__(self, batch: int = 1, threads: int = 0) -> None:
        self.batch, self.threads = batch, threads
        self.made: Clock | None = None

    def of(self, backend: Backend, dense: Callable[[], Program]) -> Clock:
        """The clock; ``dense`` is asked for where there is none yet."""
        if self.made is None:
            self.made = Clock(backend, dense(), self.batch, self.threads, together=SURELY)
        return self.made

    def __enter__(self) -> SharedClock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.made is not None:  # its files go
            self.made.__exit__()
            self.made = None


def pair_latencies(dense: list[float], small: list[float]) -> PairedLatency:
    """From the milliseconds of both, round by round.

    >>> pair_latencies([10.0, 20.0, 10.0], [5.0, 10.0, 6.0]).ratio
    0.5
    """
    ratios = [b / a for a, b in zip(dense, small, strict=True)]
    q1, middle, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    error = 1.2533 * (q3 - q1) / 1.349 / math.sqrt(len(ratios))  # of a median, with the spread as a normal one's
    return PairedLatency(middle, error, statistics.median(small), statistics.median(dense), len(ratios))


def at_batch(program: Program, batch: int) -> list[Any]:
    """Seeded user inputs at a batch size, other open sizes as in the example.

    Raises OptionError where the program was captured with another, fixed batch.
    """
    sizes = {symbol: batch for symbol, word in dim_names(program).items() if word == "batch" or word.endswith("_batch")}
    flat = sample_inputs(program, sizes)
    fixed = next((t.shape[0] for t in flat if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] != batch), None)
    if fixed is not None:
        raise OptionError(
            "the program runs at one batch size only",
            where=f"--batch {batch}",
            why=f"it was captured with a fixed batch of {fixed}",
            cure=f"`--batch {fixed}`",
        )
    return flat


def batch_for(program: Program, batch: int) -> int:
    """``batch`` where the program's is open, else the fixed one that it was captured with."""
    try:
        at_batch(program, batch)
    except OptionError:
        return samples_in(sample_inputs(program, {}))
    return batch


def on_device(flat: Sequence[Any], device: str) -> list[Any]:
    """Inputs where the payload takes them, so that no copy is timed."""
    return [t.to(device) if isinstance(t, torch.Tensor) and device != "cpu" else t for t in flat]


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch with so many CPU threads for a while; 0 leaves them alone."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(program: Program) -> str:
    """The name of the device that the program's weights lie on: where its latency is measured."""
    tensors = iter(program.tensors.values())
    first = next((t for t in tensors if t.device.type == "cuda"), None)
    return torch.cuda.get_device_name(first.device) if first is not None else cpu_name()
