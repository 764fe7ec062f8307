"""tools/bench/gpu.py: what is there is not measured again, what fails is a record, and a dry run needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.blocks import kernel
from bench.gpu import correctness
from bench.gpu.cells import Cell, Record, Setting, Stage
from bench.gpu.gpu import AGAIN, STAGES, plan, run_stage, verdict
from bench.gpu.models import MODELS, build, call
from bench.gpu.page import write_page
from bench.gpu.results import Results
from fxprune.target.block_table import make_table

ROOT = Path(__file__).resolve().parents[2]


def stage(cells: Sequence[Cell]) -> Stage:
    return Stage("some", "Some", 60, lambda setting: cells, ("figure", "ok"), ("the GPU",))


def count_calls(name: str, calls: list[str], **record: object) -> Cell:
    def run() -> Record:
        calls.append(name)
        return dict(record)

    return Cell(name, run)


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    calls: list[str] = []
    cells = [count_calls(name, calls, figure=1.0) for name in ("one", "two", "three")]
    setting, some = Setting(tmp_path, dry=True), stage(cells)
    assert run_stage(stage(cells[:1]), setting, 60) == 0
    assert run_stage(some, setting, -1.0) == 0
    assert verdict([some], tmp_path) == ["some: 2 cells left: the time is over"]
    assert run_stage(some, setting, 60) == 0
    assert calls == ["one", "two", "three"]
    assert not verdict([some], tmp_path)


def test_what_fails_is_a_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fails() -> Record:
        raise ValueError("no such layout")

    calls: list[str] = []
    some = stage([Cell("bad", fails), count_calls("good", calls, figure=2.0, ok=False)])
    assert run_stage(some, Setting(tmp_path, dry=True), 60) == 0
    assert calls == ["good"]
    assert verdict([some], tmp_path) == ["some: bad: ValueError: no such layout", "some: good: not within its target"]


def test_a_lost_device_ends_the_process_and_not_the_stage(tmp_path: Path) -> None:
    def lost() -> Record:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls: list[str] = []
    some, setting = stage([Cell("lost", lost), count_calls("next", calls)]), Setting(tmp_path, dry=True)
    assert run_stage(some, setting, 60) == AGAIN
    assert not calls
    assert run_stage(some, setting, 60) == 0
    assert calls == ["next"]


def test_an_interrupted_cell_is_tried_again(tmp_path: Path) -> None:
    def interrupted() -> Record:
        raise KeyboardInterrupt

    calls: list[str] = []
    setting = Setting(tmp_path, dry=True)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage([count_calls("one", calls), Cell("two", interrupted)]), setting, 60)
    assert Results(tmp_path / "some.json").running == "two"
    assert run_stage(stage([count_calls("one", calls), count_calls("two", calls)]), setting, 60) == 0
    assert calls == ["one", "two"]


def test_the_page_says_what_there_is_and_what_a_dry_run_left_out(tmp_path: Path) -> None:
    some = stage([count_calls("one", [], figure=0.123456, ok=True), count_calls("two", [], skipped="no such library")])
    run_stage(some, Setting(tmp_path, dry=True), 60)
    text = write_page(tmp_path, [some], dry=True).read_text(encoding="utf-8")
    assert "| one | 0.1235 | yes |" in text
    assert "two: skipped: no such library" in text
    assert "Not exercised: the GPU." in text
    assert "Not exercised" not in write_page(tmp_path, [some], dry=False).read_text(encoding="utf-8")


def test_the_stages_fit_the_time(tmp_path: Path) -> None:
    assert sum(one.seconds for one in STAGES) <= 25 * 60
    assert next(one for one in STAGES if one.name == "correctness").seconds <= 8 * 60
    assert len(plan(Setting(tmp_path, dry=True))) == len(STAGES)
    for one in STAGES:
        for dry in (True, False):
            cells = [cell.name for cell in one.cells(Setting(tmp_path, dry))]
            assert len(set(cells)) == len(cells) > 0, f"{one.name}: a record is found by its cell's name"


@pytest.mark.parametrize("name", MODELS)
def test_toys_run(name: str) -> None:
    module, batch = build(name, dry=True)
    with torch.no_grad():
        assert len(call(module, batch(3))) == 3


@pytest.mark.parametrize("shape", correctness.TOYS)
def test_the_reference_is_within_the_kernels_tolerance(shape: str, tmp_path: Path) -> None:
    given = correctness.TOYS[shape]
    error = correctness.kernel_error(Setting(tmp_path, dry=True), (32, 32), torch.float32, *given, kernel=False)
    assert error < correctness.TOLERANCE["float32"]


def test_a_ceiling_is_of_this_device() -> None:
    tflops, tbytes = kernel.ceiling("float32", "cpu", lambda call: (call(), 1.0, 2.0), 64)  # type: ignore[arg-type]
    assert tflops == pytest.approx(2 * 64**3 / 1e9)
    assert tbytes == pytest.approx(2 * 16 * 64**2 / 1e9)
    assert make_table("here", "kernel", []).device == "here"


def test_a_dry_run_from_a_checkout_with_nothing_installed(tmp_path: Path) -> None:
    """Through a start that finds no fxprune: what is installed is hidden from it."""
    hide = (
        "import importlib.util, sys; found = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *a: None if name == 'fxprune' else found(name, *a);"
        f"sys.path.insert(0, {str(ROOT / 'tools' / 'bench')!r});"
        f"sys.argv = ['gpu.py', '--dry-run', '--only', 'environment', '--out', {str(tmp_path)!r}];"
        "import start; start.start('gpu.gpu')"
    )
    run = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "correctness: " in run.stdout.partition("Here, at toy size:")[0]
    assert "not exercised: driver and clocks of a GPU" in run.stdout
    assert Results(tmp_path / "environment.json").about["left"] == "complete"
    assert (tmp_path / "gpu.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    asked = [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py")]
    run = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert run.returncode == 4
    assert "--dry-run" in run.stderr
