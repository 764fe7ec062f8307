"""Latency: fair turns, robust numbers, bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fxprune.errors import OptionError
from fxprune.process.environment import environment, usable_cores, versions
from fxprune.target.timing import latency, sample_times


class Clock:
    """A clock that only moves when a function says how long it took."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []  # type: tuple[float, list[str]]

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function that takes these times in turn, the last one from then on."""
        times = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


def test_medians_quartiles_and_throughput() -> None:
    clock = Clock()
    job = clock.job("a", 9.0, 0.010, 0.030, 0.020, 0.050, 0.040)
    timing = latency({"a": job}, warmup=1, rounds=5, seconds=1, items=4, clock=clock)["a"]
    assert timing.median_ms == pytest.approx(30)
    assert timing.min_ms == pytest.approx(10)
    assert (timing.q1_ms, timing.q3_ms) == (pytest.approx(20), pytest.approx(40))
    assert timing.samples == 5
    assert timing.calls == 1
    assert timing.per_second == pytest.approx(4 / 0.030)
    assert timing.spread == pytest.approx(20 / 30)
    assert json.loads(json.dumps(timing.to_dict()))["per_second"] == pytest.approx(133.33, rel=1e-3)


def test_functions_take_turns_and_the_first_place_rotates() -> None:
    clock = Clock()
    latency({n: clock.job(n, 0.01) for n in "abc"}, warmup=2, rounds=6, seconds=100, clock=clock)
    assert "".join(clock.calls) == "aabbcc" + "abcbcacab" * 2


def test_a_slow_spell_touches_all_alike() -> None:
    clock = Clock()
    slow = {n: clock.job(n, *[0.01] * 4, *[0.1] * 6, 0.01) for n in "ab"}
    times = latency(slow, warmup=1, rounds=10, seconds=100, clock=clock)
    assert times["a"].median_ms == pytest.approx(times["b"].median_ms)


def test_the_time_budget_ends_it_after_at_least_five_rounds() -> None:
    clock = Clock()
    assert latency({"a": clock.job("a", 2.0)}, seconds=1, clock=clock)["a"].samples == 5
    assert latency({"a": clock.job("a", 0.1)}, seconds=1, clock=clock)["a"].samples in (10, 11)
    assert latency({"a": clock.job("a", 0.01)}, seconds=100, rounds=7, clock=clock)["a"].samples == 7


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    timing = latency({"a": clock.job("a", 1e-5)}, rounds=5, clock=clock)["a"]
    assert timing.calls == 50
    assert timing.median_ms == pytest.approx(0.01)
    assert len(clock.calls) == 3 + 5 * 50


def test_nothing_to_measure_and_no_time() -> None:
    assert latency({}) == {}
    with pytest.raises(OptionError, match="must be positive"):
        latency({"a": lambda: None}, seconds=0)


def test_the_environment_is_plain_data() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["cpu"]
    assert facts["usable_cores"] == usable_cores() >= 1
    assert facts["torch"] == versions()["torch"]
    assert facts["torch_threads"] >= 1


def test_as_few_rounds_as_are_asked_for() -> None:
    clock = Clock()
    samples, _ = sample_times({"a": clock.job("a", 2.0)}, seconds=1, warmup=0, least=2, clock=clock)
    assert samples == {"a": [2000.0, 2000.0]}
    samples, _ = sample_times({"a": clock.job("a", 2.0)}, seconds=1, warmup=0, clock=clock)
    assert len(samples["a"]) == 5
