"""Runs on another device than the CPU. Law: nothing that a run computes with lies on the CPU meanwhile, the result is
the CPU's, and it goes back to where the model lay.

Without a GPU another device does (tests/support/far_device.py): it computes in the CPU's memory, and an op that mixes
its tensors with the CPU's is an error that names the op.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import drawing
from support.runs import opened_run
from torch import nn

import fxprune
from fxprune.data.batch import Batch, Calibration
from fxprune.data.memory import pin_batches
from fxprune.driver import devices
from fxprune.errors import FxpruneError, MissingDevice, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pass
from fxprune.ir.program import Program
from fxprune.process.determinism import exact_products
from fxprune.process.events import Event, Transcript
from fxprune.request.device import read_device

TESTS = Path(__file__).resolve().parents[1]
CASES = (
    "default", "magnitude", "convolutions", "depthwise", "token ids", "widths and tuning", "layers",
    "fisher, rearranged", "obs in rounds", "taylor", "activation", "exact, scaled", "tokens", "ppt", "zero-tprune",
    "tiles by lsp", "tiles by obert", "tiles by wanda", "two of four",
)  # fmt: skip
DRAWN = drawing.of(drawing.draw("devices", CASES[1:], 1), list(CASES[1:]))
NEAR = 1e-3
"""Of the largest output: kernels of attention and convolution round otherwise there, and a fit carries that on."""
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def far() -> dict[str, dict[str, Any]]:
    """What came out of each case, in one process: the device is there for the whole of it."""
    cases = ["held apart", "placed", CASES[0], *DRAWN]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH", ""))))
    asked = [sys.executable, "-m", "support.far_run", *cases]
    run = subprocess.run(asked, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return found


def test_the_device_does_not_mix_with_the_cpu(far: dict[str, dict[str, Any]]) -> None:
    assert far["held apart"]["runs"] == "far"
    for name, said in far["held apart"]["mixed"].items():
        assert "same device" in said, name


def test_a_program_moves_with_all_that_it_names(far: dict[str, dict[str, Any]]) -> None:
    placed = far["placed"]
    assert (placed["device"], placed["still"], placed["metas"]) == ("far:0", "cpu", ["far:0"])
    one, there, back = placed["tied"]
    assert one == there == back
    assert any(len(names) > 1 for names in one), "the case has a tied weight"
    assert set(placed["parameters"]) == {"Parameter"}


@pytest.mark.parametrize("case", [CASES[0], *DRAWN])
def test_a_run_stays_on_its_device_and_comes_back(case: str, far: dict[str, dict[str, Any]]) -> None:
    assert "error" not in far[case], far[case]["error"]
    here, there = far[case]["cpu"], far[case]["far"]
    assert there["devices"] == ["cpu"]
    assert not there["failed"], "what fails on the way and is made up for is told in a note"
    assert abs(here["macs"] - there["macs"]) < NEAR
    if here["keep"] == there["keep"]:  # scores that tie may fall either way by a rounding
        most = max(map(abs, here["out"]))
        assert max(abs(a - b) for a, b in zip(here["out"], there["out"], strict=True)) < NEAR * most


def test_auto_is_here_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_device("auto") is None
    with pytest.raises(MissingDevice, match="no device 'cuda'") as caught:
        read_device("cuda")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", ["gpu", "cuda:first", "meta"])
def test_what_is_no_device_is_refused_before_the_work(text: str) -> None:
    with pytest.raises(OptionError, match=f"device={text}"):
        fxprune.compile(nn.Linear(4, 4), torch.randn(2, 4), flops=0.5, device=text)


def _small() -> Program:
    return capture(nn.Linear(4, 4), (torch.randn(2, 4),))


def test_a_model_that_the_gpu_cannot_hold_stays_on_the_cpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    program, events = _small(), list[Event]()

    def full(*_: object) -> Program:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(devices, "read_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(devices, "place", full)
    assert devices.place_on(Transcript(events.append), program, "auto") is program
    assert any("does not fit" in event.text for event in events)
    with pytest.raises(FxpruneError, match="does not fit the device"):
        devices.place_on(Transcript(events.append), program, "cuda")


def test_pinning_changes_no_batch() -> None:
    data = Calibration((Batch((torch.randn(3, 4),), {"mask": torch.ones(3, 4)}, torch.arange(3)),), "here")
    pinned = pin_batches(data)
    assert torch.equal(pinned.batches[0].args[0], data.batches[0].args[0])
    assert torch.equal(pinned.batches[0].kwargs["mask"], data.batches[0].kwargs["mask"])
    assert pinned.batches[0].args[0].is_pinned() == torch.cuda.is_available()


def test_products_are_exact_inside_and_the_callers_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32
    products.allow_tf32 = True
    try:
        with exact_products():
            assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
        assert (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32 = before


def test_what_a_failed_try_held_is_gone_before_the_next() -> None:
    data = [torch.randn(8, 16) for _ in range(4)]
    run = opened_run(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), data[0], data)
    found = run.through(Hungry(None))
    assert max(batch.size for batch in found.data.batches) == 4
    assert Hungry.held() is None


class _Memory:
    """Something large that a frame of a failed try holds."""


@dataclass(frozen=True)
class Hungry(Pass):
    """Runs out of memory on batches of more than four samples, and looks whether the last try's is free again."""

    data: Calibration | None = None
    kind: ClassVar[str] = "analysis"
    takes: ClassVar[tuple[str, ...]] = ("data",)
    held: ClassVar[Any] = staticmethod(lambda: None)

    def run(self, program: Program) -> Program:
        assert self.data is not None
        assert Hungry.held() is None, "the failed try still holds its memory"
        large = _Memory()
        Hungry.held = staticmethod(weakref.ref(large))
        if max(batch.size for batch in self.data.batches) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return program


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("importance", ["trajectory", "fisher", "obs", "l2"])
def test_on_a_gpu_the_result_is_the_cpus(importance: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).eval()
    data = [torch.randn(32, 32) for _ in range(8)]
    made = {
        device: fxprune.compile(model, data[0][:2], flops=0.5, data=data, importance=importance, device=device)
        for device in ("cpu", "cuda")
    }
    assert {t.device.type for t in made["cuda"].module.state_dict().values()} == {"cpu"}
    here, there = (one.module(data[1]) for one in made.values())
    assert float((here - there).abs().max() / here.abs().max()) < NEAR


@pytest.mark.gpu
@on_a_gpu
def test_on_a_gpu_batches_are_sent_from_pinned_memory() -> None:
    model, data = nn.Linear(4, 4).cuda(), pin_batches(Calibration((Batch((torch.randn(8, 4),)),), "here"))
    program = capture(model, (torch.randn(2, 4).cuda(),))
    (sent,) = program.flatten(data.batches[0].args)
    assert sent.is_cuda
    assert torch.equal(sent.cpu(), data.batches[0].args[0])
