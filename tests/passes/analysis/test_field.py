"""Structures met in models that nobody here prepared: pruned where that is exact, else frozen with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.laws import ALL_KINDS, analysed_of, random_plan, sliced
from support.strangers import GroupsOfTheBatch
from torch import Tensor, nn

from fxprune.ir.cost import CostModel
from fxprune.ir.program import Program
from fxprune.testing import masked_run, relative_error, run_flat


def live(program: Program) -> set[str]:
    return {g.name for g in program.need("groups") if g.prunable}


def check_sliced_equals_masked(program: Program) -> None:
    """On the very inputs of the example: ids that mean something cannot be drawn."""
    plan = random_plan(program, ALL_KINDS, 0.5, seed=2)
    flat = program.flatten(*program.example_inputs)
    small = sliced(program, plan)
    assert plan.choices
    assert relative_error(run_flat(small, flat), masked_run(program, plan, flat)) < 1e-5


class Marked(nn.Module):
    """Reads two marked tokens of every text by a boolean index, and counts on finding two."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return (x + self.b(torch.relu(self.a(x))))[ids == 49].view(ids.shape[0], 2, 32)


def test_marked_tokens_are_picked_by_a_mask() -> None:
    ids = torch.randint(0, 48, (3, 12))
    ids[:, 3] = ids[:, 7] = 49
    program = analysed_of(Marked().eval(), (ids,))
    assert live(program) == {"a:ffn"}
    check_sliced_equals_masked(program)


class Detector(nn.Module):
    """Boxes and scores above a threshold: one mask picks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x).flatten(2).transpose(1, 2)[0]
        keep = y.sum(-1) > 0.3
        return self.head(y[keep]), y[keep].sigmoid()


def test_one_mask_picks_twice() -> None:
    program = analysed_of(Detector().eval(), (torch.randn(2, 3, 32, 32),))
    assert {"net.0:channel", "head.0:ffn"} <= live(program)
    check_sliced_equals_masked(program)


def test_what_a_mask_picks_costs_what_it_picked_in_the_example() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = Detector().eval()
    picked = len(model(x)[0])
    program = analysed_of(model, (x,))
    assert 0 < picked < 64
    convolutions = 16 * 16 * 16 * 27 + 8 * 8 * 8 * 16 * 9
    assert CostModel(program)().flops == -(-(2 * convolutions + picked * (8 * 24 + 24 * 5)) // 2)


def test_groups_that_are_the_batch_freeze_what_they_mix() -> None:
    program = analysed_of(GroupsOfTheBatch().eval(), (torch.randn(2, 3, 16, 16),))
    assert live(program) == {"stem.0:channel", "tail.0:channel"}
    assert any("groups are counted by an open size" in g.frozen for g in program.need("groups"))
    assert program.need("axes").failed == ()
    check_sliced_equals_masked(program)


class TemporalShift(nn.Module):
    """A part of the channels moves one frame back, a part one ahead, written into zeros (TSM)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        v = x.view(x.shape[0] // 4, 4, *x.shape[1:])
        out = torch.zeros_like(v)
        out[:, :-1, :4] = v[:, 1:, :4]
        out[:, 1:, 4:8] = v[:, :-1, 4:8]
        out[:, :, 8:] = v[:, :, 8:]
        return self.c(F.relu(self.b(out.view(x.shape))).mean((2, 3)))


def test_slices_written_into_zeros_are_cut_as_a_cat_is() -> None:
    program = analysed_of(TemporalShift().eval(), (torch.randn(8, 3, 8, 8),))
    assert live(program) == {"a:channel", "a:channel#2", "a:channel#3", "b:channel"}
    check_sliced_equals_masked(program)


class Biaffine(nn.Module):
    """Scores of all pairs of words: a product of three tensors, with a constant beside each of two."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d, self.h = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(16, 20)
        self.scores = nn.Parameter(torch.randn(5, 25, 21))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        d, h = torch.relu(self.d(x)), torch.relu(self.h(x))
        one = torch.ones(*ids.shape, 1)
        return torch.einsum("bxi,oij,byj->boxy", torch.cat([d, one], -1), self.scores, torch.cat([h, one], -1))


def test_biaffine_scores_are_contracted_on_both_sides() -> None:
    program = analysed_of(Biaffine().eval(), (torch.randint(0, 50, (2, 7)),))
    assert {"d:ffn", "h:ffn"} <= live(program)
    check_sliced_equals_masked(program)


class Alibi(nn.Module):
    """Attention with a constant of slopes per head. ``form``: how the slopes are made and meet the scores."""

    def __init__(self, form: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.form, self.heads, self.e = form, heads, nn.Embedding(50, width)
        self.qkv, self.o = (nn.ModuleList(nn.Linear(width, n * width) for _ in range(2)) for n in (3, 1))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, heads + 1), persistent=False)

    def bias(self, ids: Tensor) -> Tensor:
        b, n = ids.shape
        if self.form == "batched":  # Bloom: the distances come from the mask, heads are folded into the batch
            slopes = 2.0 ** -torch.arange(1, self.heads + 1).float()
            steps = ((ids > 0).long().cumsum(-1) - 1)[:, None]
            return (slopes[None, :, None] * steps).reshape(b * self.heads, 1, n)
        places = torch.arange(n)
        slopes = 2.0 ** -torch.arange(1, self.heads + 1).float() if self.form == "computed" else self.slopes
        return slopes.view(-1, 1, 1) * -(places[None] - places[:, None]).abs()

    def forward(self, ids: Tensor) -> Tensor:
        x, bias = self.e(ids), self.bias(ids)
        b, n, w = x.shape
        for qkv, o in zip(self.qkv, self.o, strict=True):
            q, k, v = qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            if self.form == "batched":
                q, k, v = (t.reshape(b * self.heads, n, -1) for t in (q, k, v))
            x = x + o(
                (torch.softmax(q @ k.mT + bias, -1) @ v).view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, w)
            )
        return x.mean(1)


@pytest.mark.parametrize("form", ["buffer", "computed", "batched"])
def test_heads_with_slopes_of_their_own_are_cut(form: str) -> None:
    program = analysed_of(Alibi(form).eval(), (torch.randint(1, 50, (2, 7)),))
    heads = {g.name for g in program.need("groups") if str(g.kind) == "head" and g.prunable}
    assert heads == ({"qkv.0:head"} if form == "batched" else {"qkv.0:head", "qkv.1:head"})
    check_sliced_equals_masked(program)


def test_weights_that_are_transposed_at_every_call_are_no_tables() -> None:
    """``x @ weight.T``: an index in front of the weight would leave it whole."""

    class Written(Alibi):
        def forward(self, ids: Tensor) -> Tensor:
            x, bias = self.e(ids), self.bias(ids)
            b, n, w = x.shape
            for qkv, o in zip(self.qkv, self.o, strict=True):
                q, k, v = (x @ qkv.weight.T).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
                y = torch.softmax(q @ k.mT + bias, -1) @ v
                x = x + y.transpose(1, 2).reshape(b, n, w) @ o.weight.T
            return x.mean(1)

    program = analysed_of(Written("computed").eval(), (torch.randint(1, 50, (2, 7)),))
    plan = random_plan(program, ALL_KINDS, 0.5, seed=2)
    small = sliced(program, plan)
    assert small.tensors["qkv.0.weight"].numel() < program.tensors["qkv.0.weight"].numel()
    check_sliced_equals_masked(program)
