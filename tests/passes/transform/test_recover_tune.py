"""Tuning: bounded optimiser steps after the closed form, kept only where held-out samples say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.blocks import Encoder, Tied
from support.recovering import analysed, flat, laws_hold, planned, recovered, texts
from torch import nn

from fxprune.cli.demo import Digits, DigitsViT
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.ir.program import Program
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.outputs import Output, class_rows, divergence, floating, run
from fxprune.passes.transform.recovery.tune import Tuner, output_loss, schedule, trainable
from fxprune.passes.transform.resize import resize
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.testing import keep_of, run_flat


def pruned_of(program: Program) -> Program:
    return program.without_facts(exported=resize(program, keep_of(program, program.need("plan"))))


def digits_calibration(data: Digits, count: int = 256) -> Calibration:
    return Calibration(tuple(Batch((x,)) for x in data.train_images[:count].split(32)), "digits")


def test_tuning_beats_the_closed_form_on_held_out_samples(trained: DigitsViT, digit_data: Digits) -> None:
    data = digits_calibration(digit_data)
    program = planned(analysed(trained, data), 0.35)
    after, report = recovered(program, data, "tune", steps=24, lr=1e-3)
    tuning = report.tuning
    assert report.asked == report.method == report.chosen == "tune"
    assert tuning.kept
    assert 0 < tuning.at <= tuning.steps == 24
    assert tuning.best["mixed"] > tuning.start["mixed"]
    assert tuning.best["kl"] < tuning.start["kl"]
    assert tuning.losses["best"] <= tuning.losses["last"] < tuning.losses["first"]
    assert report.guard["tune"] == tuning.best
    assert report.guard["tune"]["mixed"] > max(v["mixed"] for n, v in report.guard.items() if n != "tune")
    assert report.steps  # of the closed form that it began with
    assert report.samples == 192  # what it judged itself by, it did not learn from
    assert not report.refitted
    assert report.record()["tuning"]["parameters"] > 0
    assert f"{tuning.at} steps of tuning" in str(report)
    laws_hold(program, after, Calibration((Batch((digit_data.test_images[:64],)),), "test"))
    unseen = [digit_data.test_images]
    dense = run_flat(program, unseen)[0].argmax(1)
    closed, _ = recovered(program, data, "auto")
    right = [
        float((run_flat(SliceAxes().run(p), unseen)[0].argmax(1) == dense).float().mean())
        for p in (program, closed, after)
    ]
    assert right[0] < right[2]
    assert right[1] < right[2] + 0.03


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_tuning_changed_is_what_slicing_finds(norm: str) -> None:
    """Biases, norms and kept entries all come back; entries that will be cut, and tables, keep their values."""
    data = texts(128, batch=32)
    program = planned(analysed(Encoder(norm, depth=1), data))
    after, report = recovered(program, data, "tune", steps=8, lr=3e-3)
    assert report.tuning.steps == 8
    laws_hold(program, after, texts(16, seed=9))
    assert torch.equal(after.tensors["embed.weight"], program.tensors["embed.weight"])
    if report.tuning.kept:
        changed = {n for n, t in after.tensors.items() if not torch.equal(t, program.tensors[n])}
        assert {"layers.0.norm1.weight", "layers.0.fc1.bias", "layers.0.q.weight", "last.bias"} <= changed
        keep = keep_of(program, program.need("plan"))
        small = SliceAxes().run(program)
        for name in changed:
            moved = int((after.tensors[name] != program.tensors[name]).sum())
            assert moved <= small.tensors[name].numel(), name
        assert keep


def test_the_same_seed_gives_the_same_weights(trained: DigitsViT, digit_data: Digits) -> None:
    data = digits_calibration(digit_data, 160)
    program = planned(analysed(trained, data), 0.35)
    one, two = (recovered(program, data, "tune", steps=4, lr=1e-3) for _ in range(2))
    assert one[1].record() == two[1].record()
    assert all(torch.equal(t, two[0].tensors[n]) for n, t in one[0].tensors.items())


def test_tuning_that_harms_is_dropped(trained: DigitsViT, digit_data: Digits) -> None:
    data = digits_calibration(digit_data)
    program = planned(analysed(trained, data), 0.5)
    after, report = recovered(program, data, "tune", steps=3, lr=30.0)
    closed, auto = recovered(program, data, "auto")
    assert not report.tuning.kept
    assert report.tuning.at == 0
    assert "closed form" in report.tuning.why or "not finite" in report.tuning.why
    assert report.chosen == auto.chosen
    assert report.refitted
    assert all(torch.equal(t, closed.tensors[n]) for n, t in after.tensors.items())


def test_too_few_samples_are_not_tuned_on() -> None:
    program = planned(analysed(Encoder(depth=1), texts(16)))
    after, report = recovered(program, texts(2, batch=2), "tune")
    assert report.method == "none"
    assert report.asked == "tune"
    assert all(after.tensors[n] is t for n, t in program.tensors.items())


def test_tables_are_not_trained_and_a_weight_of_two_layers_is_trained_once() -> None:
    program = planned(analysed(Tied(), Calibration((Batch((torch.randint(0, 40, (4, 6)),)),), "ids")))
    pruned = pruned_of(program)
    names = {pruned.tensor_of_placeholder[n] for n in trainable(program, pruned)}
    assert names == {"norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"}
    model = Encoder(width=8, hidden=8, heads=2)
    model.layers[1].fc2.weight = model.layers[0].fc2.weight
    program = planned(analysed(model, texts(16)))
    pruned = pruned_of(program)
    names = {pruned.tensor_of_placeholder[n] for n in trainable(program, pruned)}
    assert "layers.0.q.weight" in names
    assert "embed.weight" not in names
    assert len(names & {"layers.0.fc2.weight", "layers.1.fc2.weight"}) == 1


class Detached(nn.Module):
    """Nothing flows back through it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": (self.b(torch.relu(self.a(x))) * 4).round()}


def test_a_graph_without_gradients_keeps_its_closed_form() -> None:
    data = Calibration(tuple(Batch((torch.randn(32, 6),)) for _ in range(5)), "normal")
    program = planned(analysed(Detached(), data))
    _, report = recovered(program, data, "tune", steps=4)
    assert not report.tuning.kept
    assert report.method != "tune"


def test_losses_are_zero_on_agreement_and_follow_the_definitions() -> None:
    logits = Output(torch.tensor([[torch.tensor(3.0).log(), 0.0]]), 1)
    flat_ = Output(torch.zeros(1, 2), 1)
    assert float(divergence(flat_.value, logits.value)) == pytest.approx(0.143841, abs=1e-6)  # methods 11.2
    assert float(divergence(flat_.value, logits.value, 4.0)) == pytest.approx(0.150397, abs=1e-6)
    torch.manual_seed(0)
    for value, classes in (
        (torch.randn(5, 7), None),
        (torch.randn(5, 7), 1),
        (torch.randn(5, 3, 7), None),
        (torch.randn(5, 3, 7), 2),
        (torch.randn(5, 3, 4, 4), None),
    ):
        other = Output(value + 0.3 * torch.randn_like(value), classes)
        assert float(output_loss(Output(value, classes), Output(value.clone(), classes), None)) < 1e-6
        assert float(output_loss(Output(value, classes), other, None)) > 1e-3


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    dense, said = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    mask = torch.arange(6) < torch.tensor([[2], [3], [6], [1]])
    for classes in (None, 2):
        losses = []
        for fill in (0.0, 9.0):
            a, b = (torch.where(mask[..., None], x, fill * torch.ones(())) for x in (dense, said))
            losses.append(float(output_loss(Output(a, classes), Output(b, classes), mask)))
        assert losses[0] == pytest.approx(losses[1])
    assert class_rows(Output(dense, 2), mask).shape == (12, 5)


def test_logits_are_known_by_name_or_by_having_none(trained: DigitsViT, digit_data: Digits) -> None:
    def classes(model: nn.Module, data: Calibration) -> list[Any]:
        program = analysed(model, data)
        found = floating(program, run(program, flat(program, data.batches[0])), data.batches[0].size)
        return [o.classes for o in found]

    assert classes(trained, digits_calibration(digit_data, 32)) == [1]
    assert classes(Encoder(depth=1), texts(16)) == [None]
    assert classes(Tied(), Calibration((Batch((torch.randint(0, 40, (4, 6)),)),), "ids")) == [None]


def test_the_schedule_warms_up_and_ends_at_nothing() -> None:
    rates = [schedule(i, 100) for i in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 1
    assert 0 < rates[-1] < 0.01
    assert schedule(0, 1) == 1


def test_mistakes_are_named() -> None:
    for option in ({"steps": 0}, {"lr": 0.0}):
        with pytest.raises(OptionError, match="at least one step"):
            Recover(method="tune", **option)
    assert Recover().steps == Tuner().steps
