"""A disk that is full, Ctrl-C, a killed process and a second writer, for every command that writes a directory."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.artifact import artifact
from fxprune.artifact.manifest import read_manifest, wrong_files
from fxprune.cli.entry import INTERRUPTED, OK, USER_ERROR, main
from fxprune.errors import FxpruneError
from fxprune.process import files
from fxprune.workflows.sweep import Judging, Timing, budgets, sweep

COMMANDS = {
    "compile": "compile model.pt --input 2x8 --flops 0.5 --out out",
    "apply": "apply model.pt --input 2x8 --plan plan.json --out out",
    "lower": "lower small --target triton --out out",
    "sweep": "sweep model.pt --data x.npz --flops 0.6 --importance l2 --recover none --seconds 0 --out out",
    "export": "export model.pt --plan plan.json --target eager --verify x.npz --seconds 0.02 --out out --force",
}
BOOT = "import torch; torch.set_num_threads(1); from fxprune.cli.entry import main; "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    torch.save(net, folder / "model.pt")
    fxprune.plan(net, torch.randn(2, 8), flops=0.7, out=folder / "plan.json")
    fxprune.compile(net, torch.randn(2, 8), flops=0.7, out=folder / "small")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((40, 8), dtype="f4"))
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(source: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in source.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.drawn(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_and_ctrl_c_leave_everything_as_it_was(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*COMMANDS[command].split(), "-q"]
    assert main(argv) == OK
    if command == "sweep":
        argv[argv.index("0.6")] = "0.6,0.4"  # the first point is there, the second is new
    before = contents(folder)
    for error, code in (
        (OSError(errno.ENOSPC, "No space left on device"), USER_ERROR),
        (KeyboardInterrupt(), INTERRUPTED),
    ):

        def fails(*_: Any, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(files, "_sync", fails)
            capsys.readouterr()
            assert main(argv) == code
        said = capsys.readouterr().err
        assert ("No space left" in said and "--out" in said) if code == USER_ERROR else "interrupted" in said
        assert contents(folder) == before
        assert not [p for p in folder.rglob("*") if "partial" in p.name], "nothing is left aside"
    assert main(argv) == OK


@pytest.mark.parametrize("command", ["export"])
def test_killed_while_it_writes_the_old_one_is_whole(command: str, folder: Path) -> None:
    argv = [*COMMANDS[command].split(), "-q"]
    assert main(argv) == OK
    before = contents(folder / "out")
    kill = (
        "import importlib, os; export = importlib.import_module('fxprune.workflows.export'); "
        "export.write_manifest = lambda *_: os.kill(os.getpid(), 9); "
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{BOOT}{kill}main({argv!r})"],
        timeout=300,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(folder / "out") == before
    assert main(["verify", "out", "-q"]) == OK
    assert main(argv) == OK, "and the place can be written again"


def test_two_processes_that_write_one_place_leave_one_whole_result(folder: Path) -> None:
    argv = [*COMMANDS["export"].split(), "-q"]
    code = f"{BOOT}import sys; sys.exit(max(main({argv!r}) for _ in range(2)))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for _ in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == OK, said
    assert wrong_files(folder / "out", read_manifest(folder / "out")) == ""
    assert not [p for p in folder.iterdir() if p.name.startswith(".out")]


def batches() -> Iterator[torch.Tensor]:
    yield torch.randn(8, 8)
    raise ConnectionResetError("the data server went away")


def test_a_loader_that_fails_in_the_middle_of_a_sweep_or_a_plan(folder: Path) -> None:
    net = torch.load("model.pt", weights_only=False)
    for call in (
        lambda: sweep(net, ratios=budgets({"flops": "0.5"}), data=batches(), out="out"),
        lambda: fxprune.plan(net, data=batches(), flops=0.5, out="new.json"),
    ):
        with pytest.raises(FxpruneError, match="the data server went away"):
            call()
    assert not Path("out").exists()
    assert not Path("new.json").exists()


def test_a_finished_point_of_a_sweep_that_is_damaged_is_made_again(folder: Path) -> None:
    net = torch.load("model.pt", weights_only=False)

    def again() -> dict[str, Any]:
        return sweep(
            net,
            ratios=budgets({"flops": "0.5"}),
            data=[torch.ones(8, 8) * i for i in range(4)],
            out="out",
            importance="l2",
            recover="none",
            judging=Judging(),
            timing=Timing(seconds=0),
            on_event=lambda event: notes.append(event.text),
        )

    notes: list[str] = []
    whole = again()["points"]
    program, report = Path("out/0.5") / artifact.PROGRAM, Path("out/0.5") / artifact.REPORT
    good = program.read_bytes(), report.read_bytes()
    for path, content in ((program, good[0][:-100]), (report, good[1].replace(b'"figures"', b'"figurs"'))):
        path.write_bytes(content)
        notes.clear()
        assert again()["points"] == whole
        assert not [n for n in notes if "finished before" in n]
        assert program.read_bytes() == good[0]
    notes.clear()
    assert again()["points"] == whole
    assert [n for n in notes if "finished before" in n]
