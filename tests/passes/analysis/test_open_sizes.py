"""Open lengths that are halved, padded, cut in chunks: costs are what torch counts, and slicing stays exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.laws import ALL_KINDS, analysed_of, random_plan, shapes_are_predicted, sliced
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.errors import InternalError
from fxprune.ir.axis import new_dim
from fxprune.ir.cost import CostModel
from fxprune.ir.flops import check_counts
from fxprune.ir.program import Program
from fxprune.passes.analysis.walk import RULES
from fxprune.testing import masked_run, relative_error, run_flat

BATCH, LENGTH = 4, 36


class Between(nn.Module):
    """Neurons before and behind something that changes the length of the sequence."""

    def __init__(self, change: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.embedding = nn.Embedding(50, 8)
        self.before = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        self.behind = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.mix, self.pairs = nn.Linear(8, 8), nn.Linear(16, 8)
        self.strided, self.wide = nn.Conv1d(8, 8, 3, 2, 1), nn.Conv1d(8, 8, 5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.behind(self.change(self, x + self.before(x)))


def padded(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, 0, 0, (multiple - x.shape[1] % multiple) % multiple))


def chunked(m: Between, x: Tensor) -> Tensor:
    """Chunks of 8 as gated delta rules have them: padded, and cut back to the length."""
    y = m.mix(padded(x, 8).reshape(x.shape[0], -1, 8, 8)).cumsum(2)
    return y.reshape(x.shape[0], -1, 8)[:, : x.shape[1]] + x


def of_two(m: Between, x: Tensor) -> Tensor:
    """Every two samples are one clip."""
    return m.mix(x.view(x.shape[0] // 2, 2, x.shape[1], 8)).sum(1)


CHANGES: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "every other": lambda m, x: m.mix(x[:, ::2]),
    "every third": lambda m, x: m.mix(x[:, 1::3]),
    "strided convolutions": lambda m, x: m.wide(m.strided(x.transpose(1, 2))).transpose(1, 2),
    "average pool": lambda m, x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
    "interpolated": lambda m, x: F.interpolate(x.transpose(1, 2), scale_factor=0.5).transpose(1, 2),
    "two halves": lambda m, x: m.mix(x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :][:, : x.shape[1] // 2]),
    "chunks joined": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "pairs of steps": lambda m, x: m.mix(x.view(x.shape[0], x.shape[1] // 2, 2, 8)),
    "pairs side by side": lambda m, x: m.pairs(x.reshape(x.shape[0], -1, 16)),
    "whole chunks": lambda m, x: m.mix(x[:, : x.shape[1] // 4 * 4].reshape(x.shape[0], -1, 4, 8)),
    "padded chunks": chunked,
    "windows": lambda m, x: m.mix(x.unfold(1, 4, 2).transpose(2, 3)),
    "shifted": lambda m, x: m.mix(x[:, 2:] * x[:, :-2]),
    "even and odd": lambda m, x: m.mix(x[:, ::2] + x[:, 1::2]),
    "all with half": lambda m, x: m.mix((x[:, ::2, None] + x[:, None]).flatten(1, 2)),
    "clips of two": of_two,
    "what is positive": lambda m, x: m.mix(x[x.sum(-1) > 0]),
}


@pytest.fixture(params=CHANGES)
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(3)
    return analysed_of(Between(CHANGES[request.param]).eval(), (torch.randint(0, 50, (BATCH, LENGTH)),))


@pytest.mark.drawn(5)
def test_costs_are_those_that_torch_counts(program: Program) -> None:
    flat = program.flatten(*program.example_inputs)
    with FlopCounterMode(display=False) as counter:
        run_flat(program, flat)
    assert CostModel(program)().flops == counter.get_total_flops() / 2 / BATCH
    shapes_are_predicted(program)
    check_counts(program)


@pytest.mark.drawn(5)
def test_slicing_equals_masking_at_another_length(program: Program) -> None:
    plan = random_plan(program, ALL_KINDS, 0.5, seed=1)
    assert {name for name in plan.choices if "before.0" in name}, "the neurons before the change stay prunable"
    small = sliced(program, plan)
    lengths = {LENGTH, LENGTH + 12} if any(isinstance(s, torch.SymInt) for s in _input(program).shape[1:]) else {LENGTH}
    for length in lengths:
        flat = [torch.randint(0, 50, (BATCH, length), generator=torch.Generator().manual_seed(length))]
        assert relative_error(run_flat(small, flat), masked_run(program, plan, flat)) < 1e-5


def _input(program: Program) -> Tensor:
    (node,) = (n for n in program.placeholders() if n.name in program.user_inputs)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def test_a_wrong_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the axes say of a product's cost is held against torch, node by node."""
    right = RULES["linear"]

    def wrong(w: object, a: object) -> object:
        out = right(w, a)  # type: ignore[arg-type]
        w.matmul([], (), (), new_dim(7), "linear")  # type: ignore[attr-defined]
        return out

    monkeypatch.setitem(RULES, "linear", wrong)
    program = analysed_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), (torch.randn(2, 8),))
    with pytest.raises(InternalError, match="multiply-accumulates by torch's count"):
        check_counts(program)


def test_an_op_that_no_rule_reads_still_costs_what_it_does() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.cell, self.down = nn.Linear(8, 32), nn.LSTM(8, 8, batch_first=True), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.down(torch.relu(self.up(x))))[0]

    program = analysed_of(Recurrent().eval(), (torch.randn(2, 5, 8),))
    assert program.need("axes").unknown
    assert CostModel(program)().flops == 5 * (8 * 32 + 32 * 8 + 4 * 8 * (8 + 8))  # 5 steps, four gates
