"""No pass leaves a program that takes less than before, and what torch asks on the way binds nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxprune.errors import PluginError
from fxprune.intake.archive import read_program, write_program
from fxprune.intake.capture import capture
from fxprune.ir.fake_run import asked_sizes, run_fake
from fxprune.ir.open_sizes import open_sizes
from fxprune.ir.pipeline import Pipeline, Transform
from fxprune.ir.program import Program
from fxprune.ir.rebuild import copy_graph, rebuild
from fxprune.ir.signature import all_other, refused_by, sizes_to_try, stuck

aten = torch.ops.aten


def picture_net() -> Program:
    return capture(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval(), (torch.randn(2, 3, 8, 8),))


def convolve_with_new_weights(program: Program) -> Tensor:
    """What torch does with a convolution whose weights a pass has made: it asks for the batch to choose a kernel."""
    x = next(n.meta["val"] for n in program.placeholders() if n.name in program.user_inputs)
    weight = x.fake_mode.from_tensor(torch.randn(4, 3, 3, 3), static_shapes=True)
    made = run_fake(program.graph, aten.conv2d.default, (x, weight))
    assert isinstance(made, Tensor)
    return made


def test_the_choice_of_a_kernel_is_no_condition_of_the_program() -> None:
    program = picture_net()
    before = open_sizes(program)
    made = convolve_with_new_weights(program)
    assert str(made.shape[0]) == before.inputs["input"][0], "the batch is still a symbol"
    assert open_sizes(program) == before
    assert [str(c).split()[1:] for c in asked_sizes(program.graph).values()] == [["<", "16"]]


def test_verification_tries_sizes_on_both_sides_of_what_chose_a_kernel() -> None:
    program = picture_net()
    assert {max(t.values()) for t in sizes_to_try(program)} == {2, 1, 3}
    convolve_with_new_weights(program)
    copied = program.but(exported=rebuild(program.exported, copy_graph(program.exported)))
    assert {max(t.values()) for t in sizes_to_try(copied)} == {2, 1, 3, 16}


@dataclass(frozen=True)
class Halves(Transform):
    """A pass that looks at an open size the way Python tempts one to."""

    def run(self, program: Program) -> Program:
        size = next(n.meta["val"].shape[0] for n in program.placeholders() if n.name in program.user_inputs)
        module = copy_graph(program.exported)
        if size > 1 and size < 7:
            relu = next(n for n in module.graph.nodes if n.target is aten.relu.default)
            relu.target = aten.sigmoid.default
        return program.without_facts(exported=rebuild(program.exported, module))


def test_a_pass_that_narrows_an_open_size_is_an_error_when_it_does() -> None:
    with pytest.raises(PluginError, match=r"after 'halves': an open size was narrowed: .* < 7"):
        Pipeline((Halves(),)).run(picture_net())


@dataclass(frozen=True)
class Ties(Transform):
    """A pass that reads an open size as a number."""

    def run(self, program: Program) -> Program:
        int(next(n.meta["val"].shape[0] for n in program.placeholders() if n.name in program.user_inputs))
        return program


def test_a_pass_that_ties_an_open_size_names_the_input() -> None:
    with pytest.raises(PluginError, match=r"dimension 0 of input 'input' was s[0-9]+ and is 2"):
        Pipeline((Ties(),)).run(picture_net())


class Even(nn.Module):
    """Takes lengths from 4 on, in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        torch._check(ids.shape[1] >= 4)
        return self.table(ids).view(ids.shape[0], 2, ids.shape[1] // 2, 4).sum(2)


def test_what_a_program_came_with_stays_through_files_and_passes(tmp_path: Path) -> None:
    lengths = {0: Dim.AUTO, 1: Dim.AUTO}
    exported = torch.export.export(Even(), (torch.ones(2, 8, dtype=torch.long),), dynamic_shapes=(lengths,))
    demands = list(exported._guards_code)
    assert demands
    write_program(exported, tmp_path / "model.pt2")
    loaded = read_program(tmp_path / "model.pt2")
    again = rebuild(loaded, copy_graph(loaded))
    assert again._guards_code == demands
    assert again.module()(torch.ones(3, 6, dtype=torch.long)).shape == (3, 2, 4)
    with pytest.raises(AssertionError, match="Guard failed"):
        again.module()(torch.ones(3, 5, dtype=torch.long))


def test_other_sizes_meet_what_the_program_demands() -> None:
    program = capture(Even(), (torch.ones(2, 8, dtype=torch.long),))
    sizes = all_other(program)
    assert sorted(sizes.values()) == [3, 4], "five is no pair"
    assert refused_by(program, sizes) is None
    assert stuck(program) == {}


def test_a_size_without_another_legal_value_is_stuck() -> None:
    lengths = {0: Dim.AUTO, 1: Dim.AUTO}

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unfold(1, 4, 4).sum(3) if x.shape[1] // 4 == 3 else x

    exported = torch.export.export(Square(), (torch.randn(2, 12, 5),), dynamic_shapes=(lengths,))
    program = Program(exported)
    (symbol,) = stuck(program)
    assert symbol == str(next(n.meta["val"].shape[1] for n in program.placeholders()))
