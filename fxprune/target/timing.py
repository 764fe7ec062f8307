"""Latency, measured so that two numbers may be compared: interleaved, warmed up, medians with their spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Timing:
    """Latency of one callable. All times in milliseconds per call.

    median_ms, q1_ms, q3_ms  of the samples (quartiles); min_ms the fastest
    samples                  how many were taken
    calls                    calls per sample; more than one where a single call is too short for the clock
    items                    samples of data one call handles (its batch size)
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    samples: int
    calls: int
    items: int = 1

    @property
    def per_second(self) -> float:
        """Items per second at the median."""
        return 1e3 * self.items / self.median_ms if self.median_ms else math.inf

    @property
    def spread(self) -> float:
        """Interquartile range over the median: above about 0.2 the machine was busy."""
        return (self.q3_ms - self.q1_ms) / self.median_ms if self.median_ms else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_second": self.per_second, "spread": self.spread}


def latency(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 5.0,
    warmup: int = 3,
    rounds: int = 200,
    items: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every function in turns until ``seconds`` have gone or ``rounds`` are done; at least 5 rounds.

    One round calls each function once, in an order that rotates, so that a slow spell of the machine, a warm cache or
    a falling clock touches all of them alike. Calls under 0.5 ms are repeated within a sample.
    A function for a GPU must synchronise before it returns.
    """
    if not functions:
        return {}
    samples, calls = sample_times(functions, seconds=seconds, warmup=warmup, rounds=rounds, clock=clock)
    return {name: timing(values, calls[name], items) for name, values in samples.items()}


def sample_times(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 5.0,
    warmup: int = 3,
    rounds: int = 200,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(milliseconds per call, round by round, calls per sample) of every function, in turns, see :func:`latency`.

    least   rounds, however long one takes
    """
    if seconds <= 0 or rounds < 1 or warmup < 0:
        raise OptionError("the time to measure must be positive", where=f"seconds={seconds}, rounds={rounds}")
    names, calls = list(functions), {}
    for name, function in functions.items():
        for _ in range(max(1, warmup)):
            started = clock()
            function()
            took = clock() - started
        calls[name] = min(1000, max(1, math.ceil(5e-4 / took))) if took > 0 else 1
    samples: dict[str, list[float]] = {name: [] for name in names}
    begun = clock()
    for number in range(max(least, rounds)):
        if number >= least and (clock() - begun >= seconds or number >= rounds):
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            function = functions[name]
            started = clock()
            for _ in range(calls[name]):
                function()
            samples[name].append(1e3 * (clock() - started) / calls[name])
    return samples, calls


def timing(values: list[float], calls: int, items: int) -> Timing:
    """Of samples in milliseconds, ``calls`` calls each."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, q1, q3, min(values), len(values), calls, items)


def session(path: str | Path, threads: int = 0) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU that keeps quiet.

    threads  for work inside an op; 0 lets ONNX Runtime take every physical core
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
