"""The command line: exit codes, the four lines of an error, JSON on stdout, tables on stderr, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from support.digits import tiny_vit

import fxprune
from fxprune.cli.commands import build_parser
from fxprune.cli.demo import DigitsViT
from fxprune.cli.entry import INTERNAL, INTERRUPTED, OK, USER_ERROR, main

LOADING = ["--input", "2x1x8x8", "--trust-pickle"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: DigitsViT) -> Path:
    """The working directory, with ``model.pt`` in it as a user would save it."""
    monkeypatch.chdir(tmp_path)
    torch.save(trained, "model.pt")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


# ------------------------------------------------------------ what works


def test_compile_writes_an_artefact_and_says_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "compile", "model.pt", *LOADING, "--flops", "0.5", "--target", "onnx")
    assert code == OK, err
    assert out == ""
    made = Path("fxprune-out/model-onnx")
    assert {p.name for p in made.iterdir()} == {"model.onnx", "model.pt2", "plan.json", "report.html", "report.json"}
    for word in (
        "GMACs",
        "parameters",
        "ratio",
        "head in",
        "ffn in",
        "graph output 1",
        "tolerance",
        str(made),
        "fxprune.load(",
    ):
        assert word in err
    assert fxprune.load(made)(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_json_goes_to_stdout_alone_and_quiet_is_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "compile", "model.pt", *LOADING, "--params", "0.6", "--out", "small", "--json", "-q")
    assert code == OK
    assert err == ""
    result = json.loads(out)
    assert result["artifact"] == "small"
    assert result["report"] == json.loads(Path("small/report.json").read_text())


def test_plan_then_apply_equals_compile(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "model.pt", *LOADING, "--flops", "0.5", "--out", "p.json", "--json")
    assert code == OK
    planned = json.loads(out)
    assert planned["choices"] == json.loads(Path("p.json").read_text())["choices"]
    assert run(capsys, "apply", "model.pt", *LOADING, "--plan", "p.json", "--out", "a")[0] == OK
    assert run(capsys, "compile", "model.pt", *LOADING, "--flops", "0.5", "--out", "b")[0] == OK
    one, two = (json.loads(Path(f, "plan.json").read_text())["choices"] for f in "ab")
    assert one == two
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fxprune.load("a")(x), fxprune.load("b")(x), rtol=0, atol=0)


def test_calibration_data_and_its_labels_are_used(
    folder: Path, capsys: pytest.CaptureFixture[str], digit_data: Any
) -> None:
    np.savez("data.npz", images=digit_data.train_images[:32].numpy(), labels=digit_data.train_labels[:32].numpy())
    code, out, err = run(
        capsys,
        "compile",
        "model.pt",
        "--trust-pickle",
        "--data",
        "data.npz",
        "--flops",
        "0.5",
        "--out",
        "small",
        "--json",
    )
    assert code == OK, err
    report = json.loads(out)["report"]
    assert report["importance"] == "trajectory"
    assert report["recovery"]["asked"] == "auto"
    assert report["data"]["samples"] == 32
    assert report["data"]["labelled"]
    assert not report["data"]["generated"]


def test_a_criterion_without_data_warns_on_stderr_even_when_quiet(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys,
        "compile",
        "model.pt",
        *LOADING,
        "--flops",
        "0.6",
        "--importance",
        "activation",
        "--out",
        "small",
        "--quiet",
    )
    assert code == OK
    assert "warning" in err
    assert "generated inputs" in err


def test_inspect_lists_groups_and_why_the_rest_is_frozen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", "model.pt", *LOADING, "--freeze", "blocks.1.*", "--json")
    assert code == OK
    groups = {g["name"]: g for g in json.loads(out)["groups"]}
    head = groups["blocks.0.attn.qkv:head"]
    assert (head["kind"], head["size"], head["prunable"], head["exact"]) == ("head", 4, True, True)
    assert head["macs_per_element"] > 0
    assert {"parameter": "blocks.0.attn.qkv.weight", "dimension": 0} in head["slots"]
    assert groups["blocks.1.mlp.0:ffn"]["frozen"] == "asked to freeze 'blocks.1.*'"
    for word in ("blocks.0.attn.qkv:head", "blocks.0.attn: qkv[0], proj[1]", "asked to freeze", "graph output"):
        assert word in err


def test_the_coupling_graph_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "inspect", "model.pt", *LOADING, "--graph", "g.svg")[0] == OK
    root = ET.parse("g.svg").getroot()
    texts = {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"blocks.0.mlp.0:ffn  96", "blocks.0.mlp.0.weight", "prunable groups"} <= texts
    assert run(capsys, "inspect", "model.pt", *LOADING, "--graph", "g.dot")[0] == OK
    dot = Path("g.dot").read_text()
    assert dot.startswith('graph "model" {')
    assert '"group/blocks.0.mlp.0:ffn" -- "parameter/blocks.0.mlp.0.weight" [label="[0]"];' in dot
    assert dot.count("{") == dot.count("}") == 1
    code, _, err = run(capsys, "inspect", "model.pt", *LOADING, "--graph", "g.png")
    assert code == USER_ERROR
    assert ".svg or .dot" in err


def test_bench_measures_both_sides_in_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "compile", "model.pt", *LOADING, "--flops", "0.5", "--target", "onnx", "--out", "small")[0] == OK
    code, out, err = run(
        capsys,
        "bench",
        "small",
        "--against",
        "model.pt",
        *LOADING,
        "--batch",
        "1,4",
        "--seconds",
        "0.2",
        "--threads",
        "1",
        "--json",
    )
    assert code == OK, err
    result = json.loads(out)
    assert [row["batch"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert set(row["timings"]) == {"small", "model.pt"}
        for timing in row["timings"].values():
            assert timing["samples"] >= 5
            assert 0 < timing["q1_ms"] <= timing["median_ms"] <= timing["q3_ms"]
    assert "median ms" in err
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt", "small"]


def test_bench_refuses_a_damaged_artefact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "compile", "model.pt", *LOADING, "--flops", "0.5", "--out", "small")[0] == OK
    damaged = Path("small/model.pt2")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    code, _, err = run(capsys, "bench", "small")
    assert code == USER_ERROR
    assert "truncated" in err


# ------------------------------------------------------------ what does not


def bad_inputs(folder: Path) -> None:
    Path("cut.pt").write_bytes(Path("model.pt").read_bytes()[:2000])
    Path("empty.pt").write_bytes(b"")
    torch.save(tiny_vit().state_dict(), "weights.pt")
    broken = tiny_vit()
    with torch.no_grad():
        broken.blocks[0].mlp[0].weight[3, 4] = float("nan")
    torch.save(broken, "nan.pt")
    np.savez("none.npz", images=np.zeros((0, 1, 8, 8), np.float32))
    np.savez("odd.npz", images=np.zeros((4, 3, 5, 5), np.float32))
    Path("plan.json").write_text('{"fxprune_plan": 1, "groups": {"x": {"kind": "ffn", "size": 4, "keep": [9]}}}')
    Path("text.json").write_text("not json")
    with zipfile.ZipFile("zip.pt2", "w") as archive:
        archive.writestr("a/b", "c")


BAD = {
    "missing file": (["compile", "nowhere.pt", "--flops", "0.5"], "no such file"),
    "truncated file": (["compile", "cut.pt", *LOADING, "--flops", "0.5"], "cut.pt"),
    "empty file": (["compile", "empty.pt", "--flops", "0.5"], "empty"),
    "no program": (["compile", "zip.pt2", "--flops", "0.5"], "not a .pt2 program"),
    "untrusted class": (["compile", "model.pt", "--input", "2x1x8x8", "--flops", "0.5"], "--trust-pickle"),
    "state dict alone": (["compile", "weights.pt", "--flops", "0.5"], "architecture"),
    "NaN weights": (["compile", "nan.pt", *LOADING, "--flops", "0.5"], "blocks.0.mlp.0.weight"),
    "no budget": (["compile", "model.pt", *LOADING], "exactly one budget"),
    "two budgets": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--bytes", "0.5"], "exactly one budget"),
    "budget 0": (["compile", "model.pt", *LOADING, "--flops", "0"], "--flops 0"),
    "budget 1.5": (["compile", "model.pt", *LOADING, "--flops", "1.5"], "at most 1"),
    "budget -1": (["compile", "model.pt", *LOADING, "--flops=-1"], "positive"),
    "budget -1 as a word": (["compile", "model.pt", *LOADING, "--flops", "-1"], "positive"),
    "budget abc": (["plan", "model.pt", *LOADING, "--params", "abc"], "'abc' is not a budget"),
    "budget out of reach": (["compile", "model.pt", *LOADING, "--flops", "0.02"], "reachable"),
    "unknown target": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--target", "onyx"], "did you mean 'onnx'"),
    "unknown criterion": (["compile", "model.pt", "--flops", "0.5", "--importance", "tailor"], "did you mean 'taylor'"),
    "unknown kind": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--prune", "haeds"], "did you mean 'head'"),
    "unknown command": (["compil", "model.pt"], "did you mean 'compile'"),
    "unknown option": (["compile", "model.pt", "--flop", "0.5"], "did you mean '--flops'"),
    "option of another command": (["plan", "model.pt", "--graph", "x.svg", "--flops", "0.5"], "--graph"),
    "word too many": (["plan", "model.pt", "extra", "--flops", "0.5"], "extra"),
    "no number": (["compile", "model.pt", "--flops", "0.5", "--align", "many"], "--align"),
    "threads 0": (["inspect", "model.pt", "--threads", "0"], "--threads 0"),
    "samples 0": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--samples", "0"], "--samples 0"),
    "missing data": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--data", "nowhere.npz"], "nowhere.npz"),
    "empty data": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--data", "none.npz"], "none.npz"),
    "data of another shape": (["compile", "model.pt", *LOADING, "--flops", "0.5", "--data", "odd.npz"], "odd.npz"),
    "wrong input shape": (["inspect", "model.pt", "--input", "2x3x9x9", "--trust-pickle"], "[2, 3, 9, 9]"),
    "input that is no shape": (["compile", "model.pt", "--input", "2xq", "--trust-pickle", "--flops", "0.5"], "2xq"),
    "checkpoint for a pickle": (["inspect", "model.pt", *LOADING, "--checkpoint", "x.pth"], "--checkpoint"),
    "plan that is none": (["apply", "model.pt", *LOADING, "--plan", "text.json"], "not valid JSON"),
    "plan out of range": (["apply", "model.pt", *LOADING, "--plan", "plan.json"], "out of range"),
    "missing plan": (["apply", "model.pt", *LOADING, "--plan", "nowhere.json"], "nowhere.json"),
    "no artefact": (["bench", "nowhere"], "no such artefact"),
    "batch of words": (["bench", "nowhere", "--batch", "one"], "--batch one"),
    "demo over a model": (["demo", "--out", "."], "left alone"),
    "demo with no epochs": (["demo", "--out", "new", "--epochs", "0"], "--epochs 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_with_a_cure_and_leaves_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, text = BAD[name]
    bad_inputs(folder)
    before = {p.name for p in folder.iterdir()}
    code, out, err = run(capsys, *argv)
    assert code == USER_ERROR, err
    assert out == ""
    assert text in err
    assert "Traceback" not in err
    lines = err.splitlines()
    first = next(
        i
        for i, line in enumerate(lines)
        if ": " in line and line.split(":")[0].endswith(("Error", "Infeasible", "ToPrune"))
    )
    labels = {line.split()[0] for line in lines[first + 1 :] if line.startswith("  ") and line.strip()}
    assert labels & {"at", "why"}, err
    assert {p.name for p in folder.iterdir()} == before


def test_a_user_error_shows_its_traceback_only_on_demand(folder: Path) -> None:
    with pytest.raises(fxprune.OptionError):
        main(["compile", "model.pt", *LOADING, "--flops", "2", "--debug"])


def test_a_bug_exits_70_with_the_pipeline(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the moon is full")

    monkeypatch.setattr("fxprune.passes.analysis.propagate_axes.PropagateAxes.run", broken)
    code, _, err = run(capsys, "compile", "model.pt", *LOADING, "--flops", "0.5")
    assert code == INTERNAL
    assert "the moon is full" in err
    assert "pipeline  clean,inline,drop-masks,fold-weights,propagate-axes" in err
    assert "Traceback" not in err


def test_an_unexpected_exception_exits_70_with_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the moon is full")

    monkeypatch.setattr("fxprune.driver.api.compile", broken)
    code, _, err = run(capsys, "compile", "model.pt", "--flops", "0.5")
    assert code == INTERNAL
    assert "fxprune compile model.pt --flops 0.5" in err


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], *([name, "--help"] for name in build_parser()[1])):
        code, out, _ = run(capsys, *argv)
        assert code == OK
        for number in (OK, USER_ERROR, INTERNAL, INTERRUPTED):
            assert f"\n  {number:<4} " in out
    code, _, err = run(capsys)
    assert code == USER_ERROR
    assert "COMMAND" in err


def command(*argv: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fxprune", *argv],
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_interrupts,
        **options,
    )


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so would their children


def test_python_m_fxprune_is_the_same_command() -> None:
    process = command("--version")
    out, _ = process.communicate()
    assert process.returncode == OK
    assert out == f"fxprune {fxprune.__version__}\n"


SLOW = """
import time
def batches():
    print("scoring", flush=True)
    time.sleep(60)
    yield
"""


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,)])
def test_an_interrupted_run_exits_130_and_leaves_nothing(folder: Path, signals: Sequence[signal.Signals]) -> None:
    Path("slow.py").write_text(SLOW)
    process = command(
        "compile",
        "model.pt",
        *LOADING,
        "--flops",
        "0.5",
        "--data",
        "python:slow:batches",
        "--out",
        "small",
        "-q",
        cwd=folder,
    )
    try:
        deadline = time.monotonic() + 60
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "scoring"
        assert time.monotonic() < deadline
        for one in signals:
            process.send_signal(one)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED, err
    assert err.strip() == "interrupted"
    assert {p.name for p in folder.iterdir()} - {"__pycache__"} == {"model.pt", "slow.py"}
