"""Which layers are cut into tiles, which stay dense and why, and what a tile costs."""

from __future__ import annotations

import pytest
import torch
from support import blocks, tiled, zoo
from torch import nn

from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.cost import CostModel
from fxprune.ir.linear_layers import matrices
from fxprune.ir.pipeline import Pipeline
from fxprune.passes.analysis.find_blocks import FindBlocks
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline


def test_every_inner_layer_has_tiles_and_the_ends_stay_dense() -> None:
    program = tiled.analysed(tiled.model(), tiled.data())
    groups = {g.matrix.parameter: g for g in program.need("groups")}
    assert list(tiled.live(program)) == ["qkv.weight", "proj.weight", "up.weight", "down.weight"]
    assert groups["embed.weight"].frozen.startswith("a patch embedding")
    assert groups["head.weight"].frozen.startswith("a classifier")
    assert groups["qkv.weight"].size == 5 * 3
    assert groups["up.weight"].size == 3 * 3
    assert groups["down.weight"].matrix.rows == 5
    assert groups["head.weight"].matrix.rows == 1
    attention = 2 * 3 * 5 * 5 * 4
    assert sum(g.matrix.macs for g in groups.values()) + attention == CostModel(program)().flops


def test_ends_floor_and_freeze_are_options() -> None:
    program = tiled.analysed(tiled.model(), tiled.data(), ends=True, floor=0.5, freeze=("u*.weight",))
    live = tiled.live(program)
    assert set(live) == {"embed.weight", "qkv.weight", "proj.weight", "down.weight", "head.weight"}
    assert live["qkv.weight"].floor == 8
    frozen = {g.matrix.parameter: g.frozen for g in program.need("groups")}
    assert frozen["up.weight"] == "asked to freeze 'u*.weight'"
    for options, message in (
        ({"freeze": ("nothing*",)}, "matches no parameter"),
        ({"floor": 1.0}, "below 1"),
        ({"pattern": "big"}, "is no tile"),
    ):
        with pytest.raises(OptionError, match=message):
            tiled.analysed(tiled.model(), tiled.data(), **{"pattern": "8x4", **options})


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("name", "weights", "dense"),
    [
        ("vit", 8, "head.weight"),
        ("bert", 14, "classifier.weight"),
        ("swin", 17, "head.fc.weight"),
        ("transposed_weights", 4, ""),
        ("llama", 14, "lm_head.weight"),
    ],
)
def test_real_models_have_tiles_where_expected(name: str, weights: int, dense: str) -> None:
    module, args, kwargs = zoo.build(name)
    passes = (Clean(), Inline(), PropagateAxes(), FindBlocks("16x16"))
    program = Pipeline(passes).run(capture(module, args, kwargs))
    frozen = {g.matrix.parameter: g.frozen for g in program.need("groups") if g.frozen}
    assert len(program.need("groups")) - len(frozen) >= weights - 3
    if dense:
        assert dense in frozen
    for m in matrices(program):
        tensor = program.tensors[m.parameter]
        assert m.matrix(tensor).shape == m.shape
        assert torch.equal(m.store(m.matrix(tensor)), tensor)


def test_a_shared_weight_stays_dense() -> None:
    program = Pipeline((PropagateAxes(), FindBlocks("8x8"))).run(
        capture(blocks.Tied(), (torch.randint(0, 40, (2, 6)),))
    )
    frozen = {g.matrix.parameter: g.frozen for g in program.need("groups")}
    assert "its weight is shared" in frozen.values()


class Constant(nn.Module):
    """A layer whose input is a constant: no sample moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias, self.a = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 12), nn.Linear(12, 12)
        self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.a(torch.relu(self.first(x)) + self.bias(self.table))).mean(1))


def test_a_layer_that_reads_no_sample_stays_dense() -> None:
    program = Pipeline((PropagateAxes(), FindBlocks("4x4"))).run(capture(Constant(), (torch.randn(2, 5, 12),)))
    frozen = {g.matrix.parameter: g.frozen for g in program.need("groups")}
    assert frozen["bias.weight"] == "its input does not depend on the samples"
    assert not frozen["a.weight"]
