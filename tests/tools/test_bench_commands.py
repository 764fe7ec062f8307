"""The commands of tools/bench: each starts the benchmark of its name, and one of them does so for real."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
SHARED = {"__init__", "lists", "record", "start"}
COMMANDS = sorted(path for path in BENCH.glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_starts_the_benchmark_of_its_name(path: Path) -> None:
    call = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    family, _, name = ast.literal_eval(call.value.args[0]).partition(".")
    assert name == path.stem
    assert (BENCH / family / "__init__.py").exists()
    text = (BENCH / family / f"{name}.py").read_text(encoding="utf-8")
    assert f"python tools/bench/{name}.py" in text, "its words say how it is called"
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(text).body)


def test_every_benchmark_has_a_command() -> None:
    mains = {p.stem for p in BENCH.glob("*/*.py") if "\ndef main(" in p.read_text(encoding="utf-8")}
    assert mains == {path.stem for path in COMMANDS}


def test_a_command_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(BENCH / "latency.py"), "--out", "nothing.json", "--check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    run = subprocess.run([sys.executable, str(BENCH / "latency.py"), "--part", "x"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "there is no 'x'; there are shares, budgets, plans" in run.stderr
