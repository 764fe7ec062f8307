"""Latency of what was delivered: measured beside the dense model, told honestly, recorded later, never in the way."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reports import parsed, words
from support.timing import FakeClock, Feet, fixed_and_work
from torch import nn

import fxprune
from fxprune.artifact import delivered
from fxprune.artifact.artifact import Artifact
from fxprune.artifact.compare import compare, read_valid, rows_of
from fxprune.artifact.delivered import record
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.data.memory import memory_limit
from fxprune.errors import FxpruneError, LoweringError, OptionError
from fxprune.intake.capture import capture
from fxprune.report import render
from fxprune.target import clock
from fxprune.target.clock import PairedLatency
from fxprune.workflows.bench import bench

INPUT = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
QUIET: dict[str, Any] = {"importance": "l2", "align": 1, "on_event": lambda _: None}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


def perceptron(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16)).eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model.pt"
    torch.save(perceptron(), path)
    return path


@pytest.fixture(scope="module")
def made(dense: Path) -> Path:
    """An artefact that was timed at batch 3 with one thread."""
    out = dense.parent / "small"
    assert (
        main(
            [
                "compile",
                str(dense),
                "--input",
                "2x16",
                "--flops",
                "0.5",
                "--align",
                "1",
                "--batch",
                "3",
                "--threads",
                "1",
                "--seconds",
                "0.02",
                "--out",
                str(out),
                "-q",
            ]
        )
        == OK
    )
    return out


@pytest.fixture
def small(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "small"))


def told(path: Path) -> dict[str, Any]:
    return dict(read_valid(path)["measured"])


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def page_of(path: Path) -> str:
    return words(parsed((path / "report.html").read_text(encoding="utf-8")))


# ------------------------------------------------------------ compile and apply


def test_a_compiled_artefact_says_how_fast_it_is(made: Path, dense: Path, tmp_path: Path) -> None:
    measured, text = told(made), page_of(made)
    (row,) = measured["rows"]
    assert (measured["target"], measured["why"]) == ("eager", None)
    assert measured["versions"]["torch"] == torch.__version__
    assert (row["batch"], row["threads"], row["by"]) == (3, 1, "compile")
    assert row["rounds"] >= 5
    assert row["error"] >= 0
    assert row["speedup"] == pytest.approx(1 / row["ratio"])
    macs = read_valid(made)["cost"]["ratio"]["flops"]
    assert row["realised"] == pytest.approx(row["speedup"] * macs)
    for wanted in (
        "speed-up, measured",
        "Measured latency",
        "latency, batch 3, 1 thread",
        f"{row['ratio']:.3f}",
        f"{row['dense_ms']:.3f} ms",
        f"{row['realised']:.2f}",
        f"{row['error']:.4f}",
    ):
        assert wanted in text, wanted
    assert "fxprune bench measures it" not in text
    # the clock decides nothing
    other = tmp_path / "other"
    assert (
        main(
            [
                "compile",
                str(dense),
                "--input",
                "2x16",
                "--flops",
                "0.5",
                "--align",
                "1",
                "--seconds",
                "0",
                "--out",
                str(other),
                "-q",
            ]
        )
        == OK
    )
    for name in ("plan.json", "model.pt2"):
        assert (other / name).read_bytes() == (made / name).read_bytes()
    assert told(other)["rows"] == []
    assert "it was left out (--seconds 0); fxprune bench measures it." in page_of(other)


def test_fast_leaves_out_the_timing_and_the_page_and_no_check(
    made: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"compile {dense} --input 2x16 --flops 0.5 --align 1 --batch 3 --threads 1 --fast"
    quick = tmp_path / "quick"
    assert main([*asked.split(), "--out", str(quick)]) == OK
    assert str(quick / "report.json") in "".join(capsys.readouterr().err.split()), "what is there is named"
    assert {p.name for p in made.iterdir()} - {p.name for p in quick.iterdir()} == {"report.html"}
    for name in ("plan.json", "model.pt2"):
        assert (quick / name).read_bytes() == (made / name).read_bytes()
    assert told(quick)["rows"] == []
    one, two = read_valid(quick), read_valid(made)
    assert all(one[key] == two[key] for key in ("proof", "masked", "parity", "cost", "groups"))
    assert fxprune.load(quick)(INPUT).shape == (2, 16)
    page = tmp_path / "later.html"
    assert main(["report", str(quick), "--out", str(page), "-q"]) == OK
    assert "it was left out (--seconds 0)" in words(parsed(page.read_text(encoding="utf-8")))
    assert main([*asked.split(), "--seconds", "1", "--out", str(tmp_path / "no"), "-q"]) == USER_ERROR


def test_apply_times_too_and_a_fixed_batch_is_taken_as_it_is(tmp_path: Path) -> None:
    fixed = torch.export.export(perceptron(), (INPUT,))
    plan = fxprune.plan(fixed, flops=0.5, **QUIET).plan
    assert plan is not None
    made = fxprune.apply(fixed, plan, out=tmp_path / "a", seconds=0.02, batch=8, on_event=lambda _: None)
    (row,) = made.report["measured"]["rows"]
    assert (row["batch"], row["by"]) == (2, "apply")
    assert fxprune.apply(fixed, plan, on_event=lambda _: None).report.get("measured") is None  # nothing was lowered


class Told(FakeClock):
    """Also tells what a payload beside the dense one takes."""

    beside_ms = (10.0, 8.0)
    fails: Exception | None = None

    def dense_seconds(self) -> float:
        return self.beside_ms[0] / 1e3

    def beside(self, load: Any, seconds: float) -> PairedLatency:
        if self.fails is not None:
            raise self.fails
        a, b = self.beside_ms
        return PairedLatency(b / a, 0.001, b, a, 7)


def test_what_cannot_be_measured_is_said_and_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delivered, "Clock", Told)

    def why(**more: Any) -> str:
        found = fxprune.compile(perceptron(), INPUT, flops=0.5, out=tmp_path / "a", **{"seconds": 1.0, **QUIET, **more})
        assert found.report["measured"]["rows"] == []
        assert read_valid(tmp_path / "a")["measured"] == found.report["measured"]
        return str(found.report["measured"]["why"])

    monkeypatch.setattr(Told, "beside_ms", (2500.0, 2000.0))
    assert why() == "one call of the dense model takes 2.5 s, 1 s is the limit here"
    monkeypatch.setattr(Told, "beside_ms", (10.0, 8.0))
    monkeypatch.setattr(Told, "fails", LoweringError("no kernel", why="of this kind"))
    assert why() == "no kernel: of this kind"
    monkeypatch.setattr(Told, "fails", RuntimeError("lost\nmore"))
    assert why() == "RuntimeError: lost"
    monkeypatch.setattr(delivered, "LARGEST", 1000)
    assert "the dense weights take" in why()
    with pytest.raises(OptionError, match="cannot be negative"):
        fxprune.compile(perceptron(), INPUT, flops=0.5, seconds=-1, **QUIET)


def test_memory_that_is_scarce_is_left_alone() -> None:
    program = capture(nn.Linear(512, 512).eval(), (torch.randn(2, 512),))
    assert delivered._too_large(program) == ""
    with memory_limit("1MiB"):
        assert "more than memory= allows" in delivered._too_large(program)


@needs_no_gpu
def test_an_unfinished_artefact_says_why_it_was_not_timed(small: Path) -> None:
    with pytest.warns(fxprune.FxpruneWarning, match="not finished"):
        made = fxprune.lower(small, target="inductor{device=cuda}", seconds=0.02)
    assert made.report["measured"]["rows"] == []
    assert made.report["measured"]["why"].startswith("not finished: a CUDA device")
    assert "Latency was not measured: not finished" in page_of(small)


# ------------------------------------------------------------ budgets of time


@pytest.mark.parametrize(
    ("asked", "ratio", "achieved", "met"),
    [
        ({"latency": 0.6}, 0.61, 0.61, True),
        ({"latency": 0.6}, 0.7, 0.7, False),
        ({"latency_ms": 14.0}, 0.5, 14.4, True),
        ({"flops": 0.5, "expect_latency": True}, 0.7, 0.7, None),
    ],
)
def test_a_budget_is_held_against_the_delivered_file(
    asked: dict[str, Any], ratio: float, achieved: float, met: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clock, "Clock", Told)
    monkeypatch.setattr(Told, "time", staticmethod(fixed_and_work(4000.0)))
    monkeypatch.setattr(Told, "beside_ms", (14.4 / ratio, 14.4))
    torch.manual_seed(0)
    fxprune.compile(Feet(), INPUT, out=tmp_path / "a", seconds=0.5, batch=5, **asked, **QUIET)
    latency = read_valid(tmp_path / "a")["latency"]
    last = latency["delivered"]
    assert last["achieved_ms"] == pytest.approx(achieved * (1 if "latency_ms" in asked else latency["dense_ms"]))
    assert (last["ratio"], last["met"], last["rounds"]) == (pytest.approx(ratio), met, 7)
    text = page_of(tmp_path / "a")
    for wanted in (
        "achieved by the delivered file",
        f"{last['achieved_ms']:.3f} ms",
        f"{latency['predicted_ms'] / last['achieved_ms']:.3f}",
    ):
        assert wanted in text
    assert ("missed by the delivered file" in text) == (met is False)
    assert ("met by the delivered file" in text) == (met is True)


@pytest.mark.parametrize(("error", "said"), [(0.001, False), (0.2, True)])
def test_a_busy_machine_is_named(error: float, said: bool, made: Path) -> None:
    from fxprune.report.latency import speed_lines

    found = read_valid(made)
    found["measured"]["rows"][0].update(ratio=0.5, error=error, speedup=2.0)
    page = words(parsed(render.render(found, Artifact.read(made).plan, {})))
    for text in (page, "\n".join(speed_lines(found))):
        assert ("the ratio is known to 40 % only" in text) == said
        assert "2.00x" in text


@pytest.mark.parametrize(("dense_ms", "said"), [(10.5, False), (16.0, True), (6.0, True)])
def test_medians_that_tell_another_story_are_named(dense_ms: float, said: bool, made: Path) -> None:
    """Slow spells that hit only some rounds move a median of times, and not the median of the rounds' ratios."""
    from fxprune.report.latency import speed_lines

    found = read_valid(made)
    found["measured"]["rows"][0].update(ratio=0.5, error=0.001, speedup=2.0, dense_ms=dense_ms, compressed_ms=5.0)
    page = words(parsed(render.render(found, Artifact.read(made).plan, {})))
    for text in (page, "\n".join(speed_lines(found))):
        assert (f"the two medians alone would say {dense_ms / 5:.2f}x" in text) == said
        assert ("the machine was busy" in text) == said
        assert "2.00x" in text


def test_export_times_every_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fxprune.workflows.export import export
    from fxprune.workflows.verify import verify

    monkeypatch.setattr(delivered, "SECONDS", 0.02)
    np.savez(tmp_path / "data.npz", input=INPUT.repeat(4, 1).numpy())
    plan = fxprune.plan(perceptron(), INPUT, flops=0.5, **QUIET).need("plan")
    export(
        perceptron(),
        plan,
        INPUT,
        targets=("eager",),
        verify=tmp_path / "data.npz",
        out=tmp_path / "out",
        on_event=lambda _: None,
    )
    (row,) = told(tmp_path / "out" / "eager")["rows"]
    assert (row["by"], row["dense_ms"] > 0) == ("export", True)
    assert verify(tmp_path / "out", on_event=lambda _: None)["status"] == "passed"
    one = Artifact.read(tmp_path / "out" / "eager")
    with pytest.raises(OptionError, match="signed off"):
        record(tmp_path / "out" / "eager", [row], one.backend, one.program)


# ------------------------------------------------------------ bench --record


def test_bench_records_into_the_artefact(small: Path, dense: Path) -> None:
    before = files(small)
    argv = ["bench", str(small), "--against", str(dense), "--threads", "1", "--seconds", "0.02", "-q"]
    assert main([*argv, "--batch", "1,3"]) == OK
    assert files(small) == before
    assert main([*argv, "--batch", "1,3", "--record"]) == OK
    rows = told(small)["rows"]
    assert [(r["batch"], r["threads"], r["by"]) for r in rows] == [(1, 1, "bench"), (3, 1, "bench")]
    after = files(small)
    assert {n for n in after if after[n] != before[n]} == {"report.json", "report.html"}
    Artifact.read(small)  # every hash fits
    assert f"{rows[1]['dense_ms']:.3f} ms" in page_of(small)
    assert main([*argv, "--batch", "2", "--record"]) == OK
    assert [r["batch"] for r in told(small)["rows"]] == [1, 2, 3]


def test_what_must_not_be_recorded_changes_nothing(
    small: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(small)
    torch.save(perceptron(48), tmp_path / "other.pt")
    argv = ["bench", str(small), "--batch", "1", "--seconds", "0.02", "--record", "-q"]
    for more, said in (
        ([], "name it with --against"),
        (["--against", str(tmp_path / "other.pt")], "not the dense model of the artefact"),
        (["--against", str(small)], "not the dense model of the artefact"),
    ):
        assert main([*argv, *more]) == USER_ERROR
        assert said in capsys.readouterr().err.replace("\n", " ")
    one, row = Artifact.read(small), told(small)["rows"][0]

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(render, "render", full)
    with pytest.raises(FxpruneError, match="nothing was changed"):
        record(small, [row], one.backend, one.program)
    assert files(small) == before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


# ------------------------------------------------------------ lower


def test_lower_keeps_what_is_known_of_earlier_targets(small: Path, dense: Path) -> None:
    first = read_valid(small)
    argv = ["lower", str(small), "--threads", "1", "--seconds", "0.02", "-q"]
    assert main([*argv, "--target", "onnx", "--against", str(dense), "--batch", "4"]) == OK
    second = read_valid(small)
    assert [(r["batch"], r["by"], r["dense_ms"] is None) for r in second["measured"]["rows"]] == [(4, "lower", False)]
    assert second["measured"]["target"] == "onnx"
    assert second["earlier"] == [
        {"target": "eager", "payload": "model.pt2", "parity": first["parity"], "measured": first["measured"]}
    ]
    assert first["parity"]["versions"]["torch"] == torch.__version__
    text = page_of(small)
    for wanted in (
        "eager: model.pt2 against the sliced graph (an earlier target, its file is not here)",
        "onnx: model.onnx against the sliced graph",
        "Earlier targets",
        "at batch 3, 1 thread",
    ):
        assert wanted in text
    # back again: without the dense model the result is timed alone, and the report says so
    assert main([*argv, "--target", "eager"]) == OK
    third = read_valid(small)
    (row,) = third["measured"]["rows"]
    assert row["dense_ms"] is row["realised"] is None
    assert row["compressed_ms"] > 0
    assert "name it with --against" in third["measured"]["why"]
    assert "No dense figure" in page_of(small)
    assert [one["target"] for one in third["earlier"]] == ["onnx"]
    artifact = Artifact.read(small)  # other weights: what was found before is not about them
    with torch.no_grad():
        next(artifact.module.parameters()).mul_(2)
    want = artifact.module(INPUT)
    artifact.save(small)
    assert read_valid(small)["earlier"] == []
    torch.testing.assert_close(fxprune.load(small)(INPUT), want, rtol=0, atol=0)


def test_lower_refuses_another_dense_model(small: Path, tmp_path: Path) -> None:
    before = files(small)
    with pytest.raises(OptionError, match="not the dense model"):
        fxprune.lower(small, target="eager", against=perceptron(48), on_event=lambda _: None)
    assert files(small) == before


@needs_no_gpu
def test_lower_gives_data_to_the_check_of_float16(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tame, wild = tmp_path / "tame.npz", tmp_path / "wild.npz"
    rows = INPUT.repeat(3, 1).numpy()
    np.savez(tame, input=rows)
    np.savez(wild, input=rows * np.float32(1e6))
    argv = ["lower", str(small), "--target", "trt{dtype=fp16}", "-q", "--samples", "5"]
    before = files(small)
    assert main([*argv, "--data", str(wild)]) == USER_ERROR
    said = capsys.readouterr().err.replace("\n", " ")
    assert "float16 overflows" in said
    assert "on 5 samples" in said
    assert files(small) == before
    assert main([*argv, "--data", str(tame)]) == 4  # no GPU to build for; what could be written was
    seen = read_valid(small)["lowering"]["float16"]
    assert seen["samples"] == 5
    assert seen["headroom"] > 100


# ------------------------------------------------------------ side by side


def test_side_by_side_shows_what_was_measured(made: Path, small: Path, dense: Path) -> None:
    bench(small, against=dense, batches=(1,), seconds=0.02, recorded=True, on_event=lambda _: None)
    rows = {cells[0]: cells[1:] for cells in rows_of(compare([made, small]))}
    at_three, at_one = rows["batch 3, 1 thread, ms (speed-up)"], rows["batch 1, ms (speed-up)"]
    assert at_three[0] == at_three[1] != ""
    assert at_one[0] == ""
    assert at_one[1].endswith("x)")
    assert rows["measured on"] == [told(made)["device"]] * 2
    assert json.dumps(compare([made])["artifacts"][0]["measured"]) == json.dumps(told(made))
