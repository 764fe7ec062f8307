"""Budgets of latency from end to end on clocks without noise: met, corrected, reproduced, reported, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.timing import FakeClock, Feet, fixed_and_work
from torch import nn

import fxprune
from fxprune.cli.entry import USER_ERROR, main
from fxprune.driver import decide_latency
from fxprune.errors import BudgetInfeasible, LoadError, OptionError
from fxprune.request.latency import FILE
from fxprune.target import clock
from fxprune.target.latency_table import LatencyTable

QUIET: dict[str, Any] = {"on_event": lambda event: None, "importance": "l2", "floor": 0.0}


INPUT = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Feet:
    return Feet().eval()


@pytest.fixture
def uneven(model: Feet) -> Feet:
    """Two parts have few neurons that matter: plans keep fewer there."""
    with torch.no_grad():
        for up, down in zip(model.up[:2], model.down[:2], strict=True):
            up.weight[20:] *= 0.01
            down.weight[:, 20:] *= 0.01
    return model


@pytest.fixture(autouse=True)
def _no_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables are kept in the test's folder, and latency is a function of the program."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clock, "Clock", FakeClock)
    monkeypatch.setattr(FakeClock, "time", staticmethod(fixed_and_work(4000.0)))
    monkeypatch.setattr(FakeClock, "read_so_far", 0)


def mixed(program: Any) -> bool:
    """Whether its parts have several widths, as under a plan and not while a table is measured."""
    return len({t.shape[0] for t in program.exported.state_dict.values() if t.dim() == 2 and t.shape[1] == 16}) > 1


def bent(program: Any) -> float:
    """A plan of several widths saves a third less than its groups one by one: what a correction is for."""
    time, dense = fixed_and_work(4000.0)(program), (4000.0 + 4 * 2 * 16 * 128) / 1e3
    return dense - (dense - time) * (0.66 if mixed(program) else 1.0)


def test_a_ratio_is_met_and_told(model: Feet, tmp_path: Path) -> None:
    made = fxprune.compile(model, INPUT, latency=0.6, batch=5, out=tmp_path / "small", **QUIET)
    told = json.loads((tmp_path / "small" / "report.json").read_text(encoding="utf-8"))["latency"]
    assert told["achieved_ratio"] == pytest.approx(0.6, rel=0.05)
    assert told["predicted_ms"] == pytest.approx(told["achieved_ms"], rel=0.02)
    assert told["target"] == pytest.approx(0.6 * told["dense_ms"])
    assert (told["batch"], told["threads"], told["backend"], told["met"]) == (5, 0, "eager", True)
    assert len(told["rounds"]) == 1
    assert [e["size"] for e in told["layers"]] == [128] * 4
    assert sum(e["dense_ms"] - e["predicted_ms"] for e in told["layers"]) == pytest.approx(
        told["dense_ms"] - told["predicted_ms"], rel=1e-3
    )
    table = LatencyTable.read(tmp_path / "small" / FILE)
    assert table.hash == told["table"]["sha256"] == made.plan.about["latency_table"]
    assert made.report["cost"]["ratio"]["flops"] < 0.6
    assert FILE in made.report["files"]
    assert fxprune.load(tmp_path / "small")(INPUT).shape == INPUT.shape


def test_milliseconds_are_met(model: Feet) -> None:
    told = fxprune.compile(model, INPUT, latency_ms=14, **QUIET).report["latency"]
    assert told["target"] == 14
    assert told["achieved_ms"] == pytest.approx(14, rel=0.05)


def test_a_miss_is_corrected_and_the_search_repeated(uneven: Feet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClock, "time", staticmethod(bent))
    told = fxprune.compile(uneven, INPUT, latency=0.7, **QUIET).report["latency"]
    first, *later = told["rounds"]
    assert first["achieved_ms"] > 1.05 * first["target_ms"]
    assert 1 <= len(later) <= 2
    assert later[0]["correction"] == pytest.approx(0.66, rel=0.05)
    assert told["met"]
    assert told["achieved_ratio"] == pytest.approx(0.7, rel=0.05)


def test_what_no_round_meets_is_said(uneven: Feet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes longer or shorter than before, in turns, whenever a plan of several widths is run."""
    moods = iter((1.12, 0.9, 1.12))

    def moody(self: FakeClock, program: Any) -> Any:
        one = steady(self, program)
        factor = next(moods) if mixed(program) else 1.0
        return type(one)(one.ratio * factor, one.error, one.ms * factor, one.dense_ms, one.rounds)

    steady = FakeClock.read
    monkeypatch.setattr(FakeClock, "read", moody)
    warned: list[str] = []
    options = {**QUIET, "on_event": lambda e: warned.append(e.text) if e.kind == "warning" else None}
    told = fxprune.compile(uneven, INPUT, latency=0.7, **options).report["latency"]
    assert len(told["rounds"]) > 1
    assert any(f"of {len(told['rounds'])} plans none came within 5%" in text for text in warned)
    best = min(told["rounds"], key=lambda e: abs(e["achieved_ms"] - e["target_ms"]))
    assert told["achieved_ms"] == best["achieved_ms"]


def test_a_target_that_turns_out_to_be_out_of_reach_leaves_the_closest_plan(
    uneven: Feet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(program: Any) -> float:
        return bent(program) if not mixed(program) else dense - 0.45 * (dense - fixed_and_work(4000.0)(program))

    dense = (4000.0 + 4 * 2 * 16 * 128) / 1e3
    monkeypatch.setattr(FakeClock, "time", staticmethod(stubborn))
    said: list[str] = []
    made = fxprune.compile(uneven, INPUT, latency=0.4, **{**QUIET, "on_event": lambda e: said.append(e.text)})
    told = made.report["latency"]
    assert (len(told["rounds"]), told["met"]) == (1, False)
    assert told["achieved_ratio"] > 0.5
    assert any("plans none came within 5%" in text for text in said)


def test_the_same_table_gives_the_same_plan_and_nothing_is_measured(
    uneven: Feet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeClock, "time", staticmethod(bent))  # so that the table holds a correction
    model = uneven
    first = fxprune.compile(model, INPUT, latency=0.7, out=tmp_path / "a", **QUIET)
    count = FakeClock.read_so_far
    assert len(first.report["latency"]["rounds"]) > 1
    again = fxprune.compile(model, INPUT, latency=0.7, latency_table=tmp_path / "a" / FILE, **QUIET)
    planned = fxprune.plan(model, INPUT, latency=0.7, latency_table=tmp_path / "a" / FILE, **QUIET)
    assert FakeClock.read_so_far == count
    assert again.plan.choices == first.plan.choices == planned.need("plan").choices
    told = again.report["latency"]
    assert told["achieved_ms"] is None
    assert told["met"] is None
    assert told["rounds"] == []
    assert told["predicted_ms"] == pytest.approx(first.report["latency"]["predicted_ms"])


def test_a_table_is_measured_once(model: Feet, tmp_path: Path) -> None:
    fxprune.compile(model, INPUT, latency=0.6, **QUIET)
    measured = FakeClock.read_so_far
    fxprune.compile(Feet().eval(), INPUT, latency=0.8, **QUIET)  # other weights, same shapes
    assert FakeClock.read_so_far == measured + 1
    assert len(list((tmp_path / "cache" / "fxprune" / "latency").iterdir())) == 1
    fxprune.compile(model, INPUT, latency=0.8, batch=2, **QUIET)
    assert FakeClock.read_so_far > measured + 2


def test_other_budgets_say_what_to_expect_once_a_table_is_known(model: Feet) -> None:
    assert "latency" not in fxprune.compile(model, INPUT, flops=0.5, **QUIET).report
    told = fxprune.compile(model, INPUT, flops=0.5, expect_latency=True, **QUIET).report["latency"]
    assert FakeClock.read_so_far > 0
    assert told["target"] is None
    assert told["predicted_ms"] / told["dense_ms"] == pytest.approx((4000 + 0.5 * 16384) / (4000 + 16384), rel=0.03)
    count = FakeClock.read_so_far
    assert fxprune.compile(model, INPUT, params=0.5, **QUIET).report["latency"]["predicted_ms"] > 0
    assert FakeClock.read_so_far == count


@pytest.mark.parametrize(("fixed", "says"), [(40_000.0, "only 1.17 times faster"), (4e6, "no faster")])
def test_a_target_that_will_not_get_faster_is_warned_of(
    model: Feet, monkeypatch: pytest.MonkeyPatch, fixed: float, says: str
) -> None:
    monkeypatch.setattr(FakeClock, "time", staticmethod(fixed_and_work(fixed)))
    warned: list[str] = []
    options = {**QUIET, "on_event": lambda e: warned.append(e.text) if e.kind == "warning" else None}
    fxprune.compile(model, INPUT, flops=0.5, expect_latency=True, **options)
    assert says in warned[0]
    for word in ("goes with nothing that was cut", "one sample per call", "latency="):
        assert word in warned[0]


def padded_to(step: int) -> Callable[[Any], float]:
    """A machine that runs every width as the next multiple."""

    def time(program: Any) -> float:
        wide = [t.shape[0] for t in program.exported.state_dict.values() if t.dim() == 2 and t.shape[1] == 16]
        return (4000.0 + sum(2 * 16 * -(-w // step) * step for w in wide)) / 1e3

    return time


def test_widths_follow_what_the_target_likes(model: Feet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClock, "time", staticmethod(padded_to(32)))
    made = fxprune.compile(model, INPUT, latency=0.6, align="auto", **QUIET)
    assert {len(c.keep) % 32 for c in made.plan.choices.values()} == {0}
    assert made.report["latency"]["alignment"]["multiples_of"] == 32
    warned: list[str] = []
    options = {**QUIET, "on_event": lambda e: warned.append(e.text) if e.kind == "warning" else None}
    monkeypatch.setattr(decide_latency, "SLOWER", 1.0)
    fxprune.compile(model, INPUT, flops=0.6, **options)
    assert "align=32" in warned[0]
    monkeypatch.setattr(FakeClock, "time", staticmethod(padded_to(8)))
    made = fxprune.compile(model, INPUT, latency=0.6, align="auto", batch=2, **QUIET)
    assert made.report["latency"]["alignment"]["multiples_of"] == 8


def test_tokens_take_part_by_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: nn.Module) -> None:
    """A machine that takes time for tokens in a file's constants: half of it goes with nothing."""

    def tokens(program: Any) -> float:
        kept = [
            n.meta["val"].shape[1]
            for n in program.graph.nodes
            if getattr(n.target, "__name__", "") == "linear" or "linear" in str(n.target)
        ]
        return 100.0 + sum(int(k) for k in kept if isinstance(k, int))

    monkeypatch.setattr(FakeClock, "time", staticmethod(tokens))
    x = torch.randn(2, 1, 8, 8)
    made = fxprune.compile(
        trained,
        x,
        latency=0.85,
        prune="tokens",
        tokens="tome{schedule=constant}",
        on_event=lambda event: None,
        recover="none",
        importance="l2",
    )
    told = made.report["latency"]
    assert made.plan.tokens is not None
    assert not made.plan.tokens.empty
    assert 1 <= len(told["rounds"]) <= 3
    assert told["achieved_ratio"] == pytest.approx(
        min((e["ratio"] for e in told["rounds"]), key=lambda r: abs(r - 0.85))
    )
    assert told["layers"] == []
    assert made.plan.about["budget"] == "latency=0.85"


def test_out_of_reach_names_the_range(model: Feet, tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasible, match="out of reach") as error:
        fxprune.compile(model, INPUT, latency=0.1, out=tmp_path / "small", **QUIET)
    assert "of the dense latency" in error.value.why
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"latency": 0.5, "flops": 0.5}, "exactly one budget"),
        ({"latency": 0.5, "rounds": 2}, "rounds and latency"),
        ({"latency": 0.5, "blocks": "32x32", "flops": 0.5}, "no latency that can be predicted"),
        ({"latency": 0.5, "batch": 0}, "at least one sample"),
        ({"latency": 2}, "at most 1"),
        ({"latency": 0.5, "plan": "p.json"}, "a plan or a budget"),
        ({"flops": 0.5, "align": "wide"}, "cannot be read"),
        ({"latency": 0.5, "threads": -1}, "cannot be negative"),
    ],
)
def test_requests_that_make_no_sense(model: Feet, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        fxprune.compile(model, INPUT, **{**QUIET, **options})


def test_a_table_that_is_none_and_one_of_another_model(model: Feet, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LoadError, match="no table of latencies"):
        fxprune.compile(model, INPUT, latency=0.5, latency_table=tmp_path / "t.json", **QUIET)
    other = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    fxprune.compile(other, INPUT, latency=0.8, out=tmp_path / "other", **QUIET)
    with pytest.raises(LoadError, match="of another program"):
        fxprune.compile(model, INPUT, latency=0.5, latency_table=tmp_path / "other" / FILE, **QUIET)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Feet) -> None:
    torch.save(nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 16)), tmp_path / "m.pt")
    argv = ["compile", str(tmp_path / "m.pt"), "--input", "2x16", "--latency", "0.7", "--batch", "4", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        assert main([*argv, "--out", str(tmp_path / "small"), "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["report"]["latency"]["threads"] == 1
        assert "latency   dense" in err
        assert "batch 4, 1 thread)" in err
        assert main([*argv, "--latency-ms", "3"]) == USER_ERROR
        assert main([*argv[:5], "0.01", *argv[6:]]) == USER_ERROR
        assert "out of reach" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)
