"""One budget for caches, and what happens when memory runs out all the same."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from torch import Tensor, nn

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.data import memory
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import FxpruneError, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.program import Program
from fxprune.passes.analysis.importance.fisher import Fisher
from fxprune.passes.analysis.importance.mask_gradients import TappedRun
from fxprune.process.events import Event
from fxprune.process.jobs import run_jobs


def calibration(digits: Digits, count: int = 64, batch: int = 32) -> Calibration:
    return Calibration(tuple(Batch((x,)) for x in digits.train_images[:count].split(batch)), "digits")


@pytest.mark.parametrize("amount", ["much", "0.5", "12", "-1GiB", "100KiB", 0])
def test_amounts_that_are_none(amount: Any) -> None:
    with pytest.raises(OptionError, match="memory"), memory.memory_limit(amount):
        raise AssertionError


def test_a_cache_takes_its_share_and_never_more_than_it_used_to() -> None:
    assert memory.share(2**30, 0.5) == 2**30
    with memory.memory_limit("1GiB"):
        assert memory.share(2**30, 0.5) == 2**29
        assert memory.share(2**20, 0.5) == 2**20
        with memory.memory_limit(None):
            assert memory.share(2**30, 0.5) == 2**30
    assert memory.share(2**30, 0.5) == 2**30


def test_what_is_alive_of_one_sample() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()  # [10] is alive until the sum
            return (torch.cat([y, y, y], 1).sin().sum(1, keepdim=True) + y).cos()

    program = capture(Two(), (torch.randn(4, 10),))
    # in front of the sum: y (40 bytes), the cat (120), its sine (120)
    assert memory.alive(program) == 280


def test_as_many_samples_as_fit_evenly_chosen(trained: DigitsViT, digit_data: Digits) -> None:
    program, data = capture(trained, (digit_data.test_images[:2],)), calibration(digit_data, 64, 20)
    assert memory.subsample_to_fit(program, data) is data
    one = memory.alive(program)
    with memory.memory_limit(f"{2 * 2 * one * 48}"):
        some = memory.subsample_to_fit(program, data)
    assert some.samples == 48
    assert len(some.batches) == 4
    images = torch.cat([b.args[0] for b in some.batches])
    assert torch.equal(images[0], digit_data.train_images[0])
    assert torch.equal(images[-1], digit_data.train_images[63])


def test_what_runs_through_one_sample_counts_values_and_no_views() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp().view(2, 5, -1).transpose(1, 2).sum(1)  # 40 bytes a sample, two views of it, and 20

    program = capture(Three(), (torch.randn(2, 10),))
    assert memory.through(program) == 60


@pytest.mark.parametrize(("room", "sizes"), [(64, [20, 20, 20, 4]), (20, [20, 20, 20, 4]), (7, [7, 7, 6] * 3 + [4])])
def test_a_batch_on_its_way_fits_the_budget(
    room: int, sizes: list[int], trained: DigitsViT, digit_data: Digits
) -> None:
    program, data = capture(trained, (digit_data.test_images[:2],)), calibration(digit_data, 64, 20)
    assert memory.split_to_fit(program, data) is data
    with memory.memory_limit(2 * 3 * memory.through(program) * room):
        less = memory.split_to_fit(program, data)
    assert [b.size for b in less.batches] == sizes
    assert torch.equal(torch.cat([b.args[0] for b in less.batches]), digit_data.train_images[:64])


@pytest.mark.parametrize(("heap", "most"), [(2**12, 4), (2**16, 10), (2**30, 20)])
def test_values_of_a_batch_stay_on_the_heap(heap: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample's largest value is 4096 bytes; a few samples stay together for scores that compare them."""
    model = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 2)).eval()
    program = capture(model, (torch.randn(2, 8),))
    assert memory.largest(program) == 4096
    monkeypatch.setattr(memory, "HEAP", heap)
    data = Calibration(tuple(Batch((x,)) for x in torch.randn(50, 8).split(20)), "normal")
    less = memory.split_to_fit(program, data)
    assert max(b.size for b in less.batches) == most
    assert torch.equal(torch.cat([b.args[0] for b in less.batches]), torch.cat([b.args[0] for b in data.batches]))


def test_a_fixed_batch_size_stays(digit_data: Digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 10)).eval()
    program = Program(torch.export.export(model, (digit_data.test_images[:32],)))
    data = calibration(digit_data)
    with memory.memory_limit(memory.LEAST):
        assert memory.split_to_fit(program, data) is data


def test_batches_in_halves_hold_the_same_samples(digit_data: Digits) -> None:
    data = Calibration((Batch((torch.arange(5),), labels=torch.arange(5) * 2), Batch((torch.arange(1),))), "x")
    less = memory.halve_batches(data)
    assert less is not None
    assert [b.size for b in less.batches] == [3, 2, 1]
    assert torch.equal(torch.cat([b.args[0] for b in less.batches]), torch.tensor([0, 1, 2, 3, 4, 0]))
    assert less.batches[1].labels is not None
    assert less.batches[1].labels.tolist() == [6, 8]
    assert memory.halve_batches(Calibration((Batch((torch.arange(1),)),), "x")) is None


def test_what_counts_as_a_lack_of_memory() -> None:
    allocator = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried")
    wrapped = FxpruneError("the model failed on the calibration data")
    wrapped.__cause__ = allocator
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), allocator, wrapped):
        assert memory.ran_out(error)
    for other in (ValueError("not enough memory"), RuntimeError("shapes do not match"), None):
        assert not memory.ran_out(other)


def test_a_batch_that_is_too_large_is_halved_and_the_scores_are_the_same(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses batches of more than eight samples: fisher's sums do not depend on the batching."""
    options: dict[str, Any] = {"flops": 0.6, "data": calibration(digit_data), "importance": "fisher", "recover": "none"}
    options["prune"] = "heads,ffn"
    want = fxprune.compile(trained, digit_data.test_images[:2], **options)
    told: list[Event] = []
    real = TappedRun.forward

    def refuse(self: TappedRun, *args: Any, **kwargs: Any) -> Any:
        if self.samples > 8:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TappedRun, "forward", refuse)
    got = fxprune.compile(trained, digit_data.test_images[:2], on_event=told.append, **options)
    warned = [e.text for e in told if e.kind == "warning"]
    assert [w.rpartition("batches of ")[2] for w in warned if "memory ran out" in w] == ["16 samples", "8 samples"]
    assert {n: c.keep for n, c in got.plan.choices.items()} == {n: c.keep for n, c in want.plan.choices.items()}
    assert got.report["pipeline"].count("score-groups") == 1


def test_a_command_within_a_budget_runs_small_batches(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fisher's sums do not depend on the batching."""
    sizes: list[int] = []
    real = TappedRun.forward
    monkeypatch.setattr(TappedRun, "forward", lambda self: (sizes.append(self.samples), real(self))[1])
    options: dict[str, Any] = {
        "flops": 0.6,
        "data": calibration(digit_data),
        "importance": "fisher",
        "recover": "none",
        "prune": "heads,ffn",
        "on_event": lambda _: None,
    }
    room = 2 * 3 * memory.through(capture(trained, (digit_data.test_images[:2],))) * 8
    want, got = (fxprune.compile(trained, digit_data.test_images[:2], memory=m, **options) for m in (None, room))
    assert sizes == [32] * 2 + [8] * 8
    assert {n: c.keep for n, c in got.plan.choices.items()} == {n: c.keep for n, c in want.plan.choices.items()}


def test_where_one_sample_does_not_fit_it_says_so(
    trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Fisher, "assess", refuse)
    with pytest.raises(FxpruneError, match="memory ran out") as caught:
        fxprune.compile(
            trained,
            digit_data.test_images[:2],
            flops=0.6,
            data=calibration(digit_data, 4, 2),
            importance="fisher",
            recover="none",
            on_event=lambda _: None,
        )
    assert "fewer samples=" in str(caught.value)


def test_recovery_sees_what_fits(trained: DigitsViT, digit_data: Digits) -> None:
    whole = memory.alive(capture(trained, (digit_data.test_images[:2],)))
    options: dict[str, Any] = {
        "flops": 0.6,
        "data": calibration(digit_data),
        "importance": "fisher",
        "recover": "ridge",
    }
    for amount, samples in ((None, 64), (2**20, max(1, 2**19 // (2 * whole)))):
        made = fxprune.compile(trained, digit_data.test_images[:2], memory=amount, **options)
        assert abs(made.report["recovery"]["samples"] - samples) <= 0.2 * samples


def test_jobs_after_a_change_of_data_are_not_kept_under_the_old_name() -> None:
    from fxprune.process import jobs

    with jobs.session():
        jobs.identify(lambda: "a")
        jobs.forget_identity()
        assert run_jobs("x", 2, lambda i: {"v": torch.tensor(i)})[1]["v"] == 1


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    "options",
    [
        {"importance": "taylor"},
        {"importance": "trajectory{probes=1}"},
        {"importance": "fisher", "recover": "auto"},
        {"blocks": "16x16", "importance": "lsp"},
        {"importance": "obs"},
    ],
)
def test_a_model_that_is_gone_is_gone(options: dict[str, Any], digit_data: Digits) -> None:
    """Hooks on gradients hold what they close over where no garbage collector looks."""
    model = tiny_vit().eval()
    gone = weakref.ref(next(model.parameters()))
    made = fxprune.compile(
        model,
        digit_data.test_images[:2],
        flops=0.6,
        data=calibration(digit_data, 32, 16),
        on_event=lambda _: None,
        **{"recover": "none", **options},
    )
    del model, made
    gc.collect()
    assert gone() is None
