"""The stop-watch of latency: fair rounds, few runtimes in memory at a time, no files left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxprune
from fxprune.backends.eager.backend import EagerBackend
from fxprune.driver.measure_latency import lowerable
from fxprune.intake.capture import capture
from fxprune.ir.program import Program
from fxprune.registry import backend
from fxprune.target import clock as clocks
from fxprune.target.backend import Lowered, Runner
from fxprune.target.clock import TURNS, Clock, at_batch, pair_latencies

INPUT = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


class Counting(EagerBackend):
    """Counts its runners that are alive, and how often it lowers."""

    alive: ClassVar[weakref.WeakSet[Runner]] = weakref.WeakSet()
    most = lowered = 0

    def lower(self, program: Program, directory: Path) -> Lowered:
        type(self).lowered += 1
        return super().lower(program, directory)

    def load(self, payload: Path) -> Runner:
        inner = super().load(payload)

        def run(flat: Any) -> list[Any]:
            return inner(flat)

        self.alive.add(run)
        type(self).most = max(self.most, len(self.alive))
        return run


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    gc.collect()
    Counting.alive.clear()
    monkeypatch.setattr(Counting, "most", 0)
    monkeypatch.setattr(Counting, "lowered", 0)
    return Counting


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    return lowerable(capture(model, (INPUT,)))


def test_a_real_clock_reads_both_and_leaves_no_files(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with Clock(backend("eager"), program, batch=7, threads=1, seconds=0.01) as clock:
        assert [t.shape for t in clock.flat] == [(7, 16)]
        one = clock.read(program)
        assert one.ratio > 0
        assert one.ms > 0
        assert one.rounds >= 9
    assert list(tmp_path.glob("fxprune-latency-*")) == []
    assert [t.shape for t in at_batch(program, 2)] == [(2, 16)]


@pytest.mark.parametrize(("limit", "most", "rounds"), [(0, 1, 2), (2**20, 2, 5)])
def test_of_large_programs_one_is_loaded_at_a_time(
    limit: int,
    most: int,
    rounds: int,
    program: Program,
    counting: type[Counting],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(clocks, "TOGETHER", limit)
    monkeypatch.setattr(clocks, "TURNS", TURNS[:4])
    payload = counting().lower(program, tmp_path).payload
    gc.collect()
    with Clock(counting(), program, batch=2, seconds=0.01) as clock:
        assert clock.dense_seconds() > 0
        readings = [clock.read(program), clock.beside(lambda: counting().load(payload), 0.01)]
        assert counting.lowered == 3, "the dense program is lowered once"
    assert counting.most == most
    for one in readings:
        assert one.rounds >= rounds
        assert one.ratio > 0
        assert one.error >= 0
    assert (readings[0].rounds == rounds) == (limit == 0)


def test_in_blocks_a_drift_slows_both_alike(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is slower than the one before: 10 ms and 4 ms at first, and as much again by the eighth."""
    monkeypatch.setattr(clocks, "TOGETHER", 0)
    now = [0.0]
    blocks: list[str] = []

    def sampled(calls: dict[str, Callable[[], Any]], **_: Any) -> tuple[dict[str, list[float]], dict[str, int]]:
        (name,) = calls
        now[0] += 1 / 8
        blocks.append(name)
        return {name: [(10.0 if name == "dense" else 4.0) * (1 + now[0])] * 3}, {name: 1}

    monkeypatch.setattr(clocks, "sample_times", sampled)
    with Clock(backend("eager"), program, batch=2) as clock:
        one = clock.beside(lambda: backend("eager").load(clock._payload), 0.1)  # type: ignore[arg-type]
    assert blocks == list(TURNS)
    assert one.ratio == pytest.approx(0.4, rel=0.01)
    assert (one.rounds, one.ms < one.dense_ms) == (4, True)


def test_what_was_verified_is_unloaded_before_it_is_timed(counting: type[Counting], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = fxprune.compile(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval(),
        INPUT,
        flops=0.5,
        importance="l2",
        align=1,
        on_event=lambda _: None,
    )
    made.backend = counting()

    def measure(backend: Any, lowered: Lowered, *_: Any) -> dict[str, Any]:
        assert len(counting.alive) == 0
        with pytest.raises(RuntimeError, match="unloaded after it was verified"):
            lowered.run([INPUT])
        assert backend.load(lowered.payload)([INPUT])[0].shape == (3, 16)
        return {}

    made.save(tmp_path / "small", measure=measure)
    assert counting.most == 1


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is slow for a while is slow to both."""
    slow = [1.0, 1.0, 5.0, 5.0, 5.0, 1.0]
    one = pair_latencies([10.0 * s for s in slow], [4.0 * s for s in slow])
    assert one.ratio == pytest.approx(0.4)
    assert one.error == pytest.approx(0.0, abs=1e-12)
