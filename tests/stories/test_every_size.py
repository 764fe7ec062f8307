"""A result takes the sizes that its model takes: batches, lengths and pictures on both sides of whatever torch asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.laws import ALL_KINDS, analysed, random_plan, sliced, takes_the_sizes_of_its_capture
from torch import Tensor, nn
from torch.export import Dim

import fxprune
from fxprune.cli import main
from fxprune.intake.capture import capture


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_of_the_zoo(name: str, tmp_path: Path) -> None:
    module, args, kwargs = zoo.build(name)
    program = analysed(name)
    result = sliced(program, random_plan(program, ALL_KINDS, 0.5, seed=5))
    takes_the_sizes_of_its_capture(capture(module, args, kwargs), result, tmp_path)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


@pytest.mark.parametrize("batch", [2, 32])
def test_a_net_of_convolutions_takes_batches_on_both_sides_of_sixteen(batch: int, tmp_path: Path) -> None:
    data = [torch.randn(n, 3, 16, 16) for n in (4, 20)]
    result = fxprune.compile(
        convolutions(), torch.randn(batch, 3, 16, 16), flops=0.6, data=data, out=tmp_path / "small", seconds=0
    )
    tried = {sizes["batch"] for sizes in result.report["parity"]["tried"]}
    assert min(tried) < 16 <= max(tried)
    loaded = torch.export.load(tmp_path / "small" / "model.pt2").module()
    for module in (result.module, fxprune.load(tmp_path / "small"), loaded):
        for size in (1, 2, 3, 15, 16, 17, 33, 64):
            assert module(torch.randn(size, 3, 16, 16)).shape == (size, 10)


def test_bench_times_batches_on_both_sides(tmp_path: Path) -> None:
    fxprune.compile(convolutions(), torch.randn(2, 3, 16, 16), flops=0.6, out=tmp_path / "small", seconds=0)
    assert main(["bench", str(tmp_path / "small"), "--batch", "1,32", "--seconds", "0.01"]) == 0


def test_pictures_whose_size_is_open_stay_so_through_two_runs(tmp_path: Path) -> None:
    open_sizes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    exported = torch.export.export(convolutions(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=open_sizes)
    once = fxprune.compile(exported, flops=0.8, out=tmp_path / "once", seconds=0)
    twice = fxprune.compile(tmp_path / "once", flops=0.8, out=tmp_path / "twice", seconds=0)
    assert once.report["inputs"][0]["shape"] == twice.report["inputs"][0]["shape"] == ["batch", 3, "input_2", "input_3"]
    for module in (once.module, twice.module, fxprune.load(tmp_path / "twice")):
        for batch, height, width in ((1, 9, 33), (17, 16, 16), (3, 40, 5)):
            assert module(torch.randn(batch, 3, height, width)).shape == (batch, 10)


class Classifier(nn.Module):
    """A pre-norm vision transformer that counts its batch with ``len``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.blocks(x)[:, 0])


def test_a_batch_that_python_counts_is_open_and_data_of_any_batch_size_is_taken() -> None:
    torch.manual_seed(0)
    result = fxprune.compile(
        Classifier().eval(), torch.randn(8, 3, 16, 16), flops=0.6, data=[torch.randn(20, 3, 16, 16)], seconds=0
    )
    for batch in (1, 3, 17):
        assert result.module(torch.randn(batch, 3, 16, 16)).shape == (batch, 10)


def test_the_result_takes_the_inputs_that_were_given_and_no_others() -> None:
    model, _, kwargs = zoo.build("clip")
    given = {name: kwargs[name] for name in ("input_ids", "pixel_values")}
    result = fxprune.compile(model, given, flops=0.7, seconds=0)
    assert [entry["name"] for entry in result.report["inputs"]] == list(given)
    assert set(result.module(**given)) >= {"logits_per_image"}


def test_inputs_that_were_given_by_position_are_taken_by_position() -> None:
    model, _, kwargs = zoo.build("distilbert")
    result = fxprune.compile(model, (kwargs["input_ids"],), flops=0.7, seconds=0)
    assert [entry["name"] for entry in result.report["inputs"]] == ["input_ids"]
    assert result.module(torch.randint(3, zoo.WORDS, (5, 7)))["logits"].shape == (5, 2)


def test_the_report_holds_the_chain_of_proof() -> None:
    model, _, kwargs = zoo.build("bert")
    data: list[dict[str, Any]] = [{"input_ids": torch.randint(3, zoo.WORDS, (4, n))} for n in (5, 12)]
    masked = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in data]
    report = fxprune.compile(model, kwargs, flops=0.7, data=masked, seconds=0).report
    assert [link["compared"] for link in report["proof"]] == [
        "the module and its captured graph",
        "the module and its captured graph, on the data",
        "the captured graph and the one that is cut, with nothing removed",
        "the dense graph with masks and the sliced one",
    ]
    assert all(link["max_rel"] <= link["tolerance"] for link in report["proof"])
    first, second = report["proof"][-1]["tried"]
    assert first.keys() == second.keys()
    assert not [size for size, n in first.items() if second[size] == n], "every open size is tried at two values"
