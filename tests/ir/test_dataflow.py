"""The table of ops: every op once, every rule's op in it, and no second table anywhere."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import fxprune.ops  # noqa: F401  registers them
from fxprune.intake.capture import capture
from fxprune.ir import dataflow
from fxprune.ir.dataflow import (
    Family,
    bind,
    bind_values,
    family,
    is_mutable,
    is_random,
    norm_after,
    op_name,
    ops_in,
    returns_view,
)
from fxprune.ir.open_sizes import open_sizes
from fxprune.passes.analysis import rules  # noqa: F401  fills RULES
from fxprune.passes.analysis.walk import RULES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for folder in ("fxprune", "passes", "backends") for p in sorted((ROOT / folder).rglob("*.py"))]
ELSEWHERE = ("fxprune/ir/dataflow.py", "passes/analysis/rules/", "fxprune/intake/")
"""The table; rules, which are one per op; and the names that pickles and archives may hold, which are no ops' kinds."""
aten = torch.ops.aten


def node(target: object, *args: object) -> torch.fx.Node:
    graph = Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args))  # type: ignore[arg-type]


def test_every_op_is_of_one_family() -> None:
    names = Counter(name for words in dataflow._FAMILIES.values() for name in words.split())
    assert [name for name, count in names.items() if count > 1] == []
    assert set(dataflow._FAMILIES) == set(Family)
    assert set(dataflow._PRODUCTS) <= ops_in(*dataflow.MULTIPLIES)


def test_every_name_is_an_op() -> None:
    plain = {"getitem", "one_hot", "__interpolate"}
    unknown = [n for n in ops_in(*Family) if "::" not in n and n not in plain and not hasattr(aten, n)]
    assert unknown == []


def test_every_op_with_an_axis_rule_is_in_the_table() -> None:
    """A rule alone makes an op sliceable, and nothing else."""
    assert sorted(set(RULES) - ops_in(*Family) - {"pointwise"} - set(own())) == []


def own() -> list[str]:
    """Ops that tests and plugins of tests bring."""
    return [name for name in RULES if name.startswith(("fxprune_example::", "optable_test::", "fxprune::crop"))]


@pytest.mark.parametrize("name", sorted(dataflow._PRODUCTS))
def test_products_name_arguments_that_are_there(name: str) -> None:
    if "::" in name:
        return  # its library may not be installed
    one = dataflow._PRODUCTS[name]
    packet = getattr(aten, name)
    arguments = {a.name for o in packet.overloads() for a in getattr(packet, o)._schema.arguments}
    assert {one.left, one.right, one.added} - {""} <= arguments


def test_no_file_has_a_table_of_its_own() -> None:
    """Three op names in one set, tuple or dict are a list that the table should give."""
    known = ops_in(*Family) | {f"{name}_" for name in ops_in(*Family)}
    found = []
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(ELSEWHERE):
            continue
        for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = one.elts if isinstance(one, ast.Set | ast.Tuple | ast.List) else getattr(one, "keys", ())
            words = [i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)]
            if len(words) > 2 and known.issuperset(words):
                found.append(f"{where}:{one.lineno}: {words}")  # type: ignore[attr-defined]
    assert found == []


def test_what_torch_says_is_not_repeated() -> None:
    assert family(node(aten.sinc.default)) is Family.POINTWISE
    assert family(node(aten.sinc_.default)) is None, "it writes in place"
    assert family(node(aten.linalg_inv.default)) is None
    assert is_random(node(aten.bernoulli.default))
    assert not is_random(node(aten.sin.default))
    assert returns_view(node(aten.transpose.int, 0, 1))
    assert not returns_view(node(aten.sin.default))
    assert is_mutable(node(aten.add_.Tensor))


def test_names_and_arguments() -> None:
    softmax = node(aten.softmax.int, 1)
    assert op_name(softmax) == "softmax"
    assert bind(softmax) == {"self": softmax.args[0], "dim": 1, "dtype": None}
    assert bind_values(softmax.target, (3, 4), {}) == {"self": 3, "dim": 4}
    assert op_name(node(len)) == "len"
    assert set(bind(node(len, 5))) == {"0", "1"}


def test_looking_for_a_norm_asks_nothing_of_open_sizes() -> None:
    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 16, 3), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).transpose(1, 2))

    program = capture(Sound().eval(), (torch.randn(2, 2, 20),), {}, name="sound")
    before = open_sizes(program)
    assert sum(size.startswith("s") for sizes in before.inputs.values() for size in sizes) == 2
    for one in program.graph.nodes:
        norm_after(one)
    assert not before.compare_with(open_sizes(program))


def test_rows_of_a_norm_are_not_those_of_a_picture_as_wide_as_it_has_channels() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line, self.norm = nn.Conv2d(2, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.line(self.norm(self.conv(x).permute(0, 2, 3, 1))).transpose(1, 2))

    program = capture(Mixed().eval(), (torch.randn(2, 2, 8, 8),), {}, name="mixed")
    found = {op_name(one): norm_after(one)[0] for one in program.graph.nodes}
    assert found["conv2d"] == ""
    assert found["linear"] == "variance"
