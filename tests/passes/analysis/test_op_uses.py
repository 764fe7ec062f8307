"""What is not known of an op that is sliced is named: where its rule or the table of ops leaves something open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.recovering import analysed, floats, planned, recovered
from torch import Tensor, nn

import fxprune
from fxprune.extend import Args, Dims, Family, Product, Walk, declare
from fxprune.ir import dataflow
from fxprune.ir.program import Program
from fxprune.passes.analysis.walk import RULES
from fxprune.report.op_gaps import gap_lines, op_gaps

DENSE, GAIN = "optable_test::dense", "optable_test::gain"
torch.library.define(DENSE, "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
torch.library.define(GAIN, "(Tensor x, Tensor scale) -> Tensor")


@torch.library.impl(DENSE, "CompositeImplicitAutograd")
def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


@torch.library.impl(GAIN, "CompositeImplicitAutograd")
def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


class Dense(nn.Module):
    """A feed-forward layer of a residual block whose second matrix is multiplied by a library's own op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(x))
        x = x + torch.ops.optable_test.dense(inner, self.down.weight, self.down.bias)
        normed: Tensor = self.norm(x)
        return normed


def rule_that(*says: str) -> Callable[[Walk, Args], Dims]:
    """y[.., o] = x[.., i] W[o, i] + b[o], with what of its sum is said."""

    def dense(w: Walk, a: Args) -> Dims:
        w.unify(a.x[-1], a.weight[1])
        w.unify(a.bias[0], a.weight[0])
        if "contract" in says:
            w.contract(a.weight[1], ("x", len(a.x) - 1), ("weight", 1))
        if "matmul" in says:
            w.matmul(a.x[:-1], (), a.weight[1], a.weight[0], "linear")
        return [*a.x[:-1], a.weight[0]]

    return dense


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test says of ops is unsaid after it."""
    yield
    for home in (dataflow._KNOWN, dataflow._PRODUCTS, RULES):
        for name in (DENSE, GAIN, "mylib::turn"):
            home.pop(name, None)  # type: ignore[attr-defined]


def gaps(program: Program) -> dict[str, str]:
    found = op_gaps(program.need("groups"), [g.name for g in program.need("groups") if g.prunable])
    assert all(one["op"] == DENSE and one["groups"] == ["up:ffn"] for one in found)
    return {one["lacks"]: one["why"] for one in found}


def test_an_op_with_an_axis_rule_alone_is_named_and_one_line_in_the_table_has_it_recovered() -> None:
    RULES[DENSE] = rule_that("contract", "matmul")
    data = floats(16, 5, 16)
    program = planned(analysed(Dense(), data))
    assert gaps(program) == {"recovery": "the table of ops does not say what it multiplies"}
    before = recovered(program, data)[1]
    assert not before.steps
    assert before.skipped == {"dense": "the table of ops does not say what it multiplies"}

    declare(DENSE, Product("x", "weight", "bias"))
    program = planned(analysed(Dense(), data))
    assert gaps(program) == {}
    after = recovered(program, data)[1]
    assert [(step.node, step.parameter, step.weighted_by) for step in after.steps] == [
        ("dense", "down.weight", "variance")
    ]
    assert after.steps[0].after < after.steps[0].before
    assert not after.skipped


def test_the_report_has_a_line_for_it() -> None:
    RULES[DENSE] = rule_that("contract", "matmul")
    made = fxprune.compile(Dense().eval(), torch.randn(4, 5, 16), flops=0.6)
    (gap,) = made.report["gaps"]
    assert (gap["op"], gap["lacks"], gap["nodes"], gap["groups"]) == (DENSE, "recovery", ["dense"], ["up:ffn"])
    assert any(note.startswith(f"sliced but cannot be recovered: {DENSE} at dense (") for note in made.report["notes"])
    declare(DENSE, Product("x", "weight", "bias"))
    assert fxprune.compile(Dense().eval(), torch.randn(4, 5, 16), flops=0.6).report["gaps"] == []


def test_products_that_no_budget_counts_are_named() -> None:
    RULES[DENSE] = rule_that("contract")
    declare(DENSE, Product("x", "weight", "bias"))
    assert gaps(analysed(Dense(), floats(4, 5, 16))) == {"cost": "its axis rule states no product (w.matmul)"}


class Twice(Dense):
    """The neurons are read by a layer that is known, as well."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.up(x))
        both: Tensor = self.beside(inner) + torch.ops.optable_test.dense(inner, self.down.weight, self.down.bias)
        return both


def test_sums_that_a_rule_keeps_to_itself_are_named() -> None:
    """Without ``contract`` removals do not show there: masks would be put on the other reader alone."""
    RULES[DENSE] = rule_that("matmul")
    declare(DENSE, Product("x", "weight", "bias"))
    assert gaps(analysed(Twice(), floats(4, 5, 16))) == {
        "importance": "its axis rule does not say that it sums (w.contract)"
    }


def test_what_is_known_in_full_is_not_named() -> None:
    class Known(Dense):
        def forward(self, x: Tensor) -> Tensor:
            known: Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
            return known

    program = analysed(Known(), floats(4, 5, 16))
    uses = {use.node: use for g in program.need("groups") if g.prunable for use in g.uses}
    assert list(uses) == ["linear", "linear_1"]
    assert gaps(program) == {}


class Gained(nn.Module):
    """An op of the library scales what a layer gives, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(8, 12), nn.Linear(12, 12), nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        gained: Tensor = self.down(torch.ops.optable_test.gain(self.up(x), self.gain))
        return gained


def test_an_op_that_is_element_by_element_lacks_nothing() -> None:
    RULES[GAIN] = lambda w, a: w.broadcast(*a.tensors())
    assert gaps_of_any(analysed(Gained(), floats(4, 5, 8))) == []


def gaps_of_any(program: Program) -> list[dict[str, Any]]:
    return op_gaps(program.need("groups"), [g.name for g in program.need("groups")])


def test_grouped_convolutions_are_named_as_well() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 4, 1))
    program = analysed(model, floats(2, 3, 6, 6))
    (line,) = gap_lines(gaps_of_any(program))
    assert line == (
        "sliced but cannot be recovered: conv2d at conv2d_1 (grouped and transposed convolutions are not solved for)"
    )


def test_a_plugin_says_what_its_ops_do() -> None:
    """Families are looked up when they are asked for: an op that moves elements is one that walks pass."""
    assert dataflow.family_of("mylib::turn") is None
    declare("mylib::turn", Family.PERMUTE)
    assert dataflow.family_of("mylib::turn") in dataflow.MOVES
