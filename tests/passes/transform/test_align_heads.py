"""AlignHeads: the same function in a basis whose last elements can go; where it stays what it is, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import blocks, laws, recovering, zoo
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.transform.align_heads import AlignHeads, Alignment
from fxprune.passes.transform.alignment.basis import balance
from fxprune.testing import relative_error, run_flat

WIDTH, HEADS, SIZE = 24, 3, 8


class Attention(nn.Module):
    """Separate projections around a product, with one thing in between that ``how`` names."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        inner = HEADS * SIZE
        self.how, self.q, self.k = how, nn.Linear(WIDTH, inner), nn.Linear(WIDTH, inner)
        self.v, self.o = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.norm, self.bias = nn.RMSNorm(SIZE), nn.Parameter(torch.randn(HEADS, 5, 5))
        self.scale, self.gain = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5), nn.Parameter(torch.rand(inner, 1) + 0.5)
        if how == "tied":
            self.k.weight = self.q.weight

    def projected(self, layer: nn.Linear, x: Tensor) -> Tensor:
        made = self.how == "made" and layer is self.q
        weight = layer.weight * self.gain if made else layer.weight
        return F.linear(x, weight, layer.bias).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.projected(layer, x) for layer in (self.q, self.k, self.v))
        if self.how == "norm":
            q, k = self.norm(q), self.norm(k)
        if self.how == "length":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.how == "squash":
            q, v = torch.tanh(q), torch.tanh(v)
        if self.how == "scaled":
            q = q * self.scale
        logits = q @ k.transpose(-2, -1) * SIZE**-0.5
        if self.how == "bias":
            logits = logits + self.bias
        y = self.o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y + q.square().sum((1, 3))[..., None] if self.how == "read" else y


class Cross(nn.Module):
    """Packed ``nn.MultiheadAttention`` whose keys and values come from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory, need_weights=False)[0]


class Pictures(nn.Module):
    """Projections that are 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(WIDTH, HEADS * SIZE, 1) for _ in range(3))
        self.o = nn.Conv2d(HEADS * SIZE, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = (layer(x).view(n, HEADS, SIZE, -1).transpose(2, 3) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, -1, height, width)
        return self.o(y)


def data(*shapes: tuple[int, ...], batches: int = 6) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    drawn = ([torch.randn(*s, generator=generator) for s in shapes] for _ in range(batches))
    return Calibration(tuple(Batch(tuple(one)) for one in drawn), "normal")


SEQUENCE = data((8, 5, WIDTH))


def prepared(model: nn.Module, given: Calibration = SEQUENCE) -> Program:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return laws.analysed_of(model.eval(), given.batches[0].args, unfuse=True)


def aligned(program: Program, given: Calibration | None = None, basis: str = "data") -> tuple[Program, Alignment]:
    one = AlignHeads(basis, given)
    after, (result,) = Pipeline((one,), start=("axes", "groups")).apply(program)
    return after, result.record


def cut(program: Program, kind: Kind, count: int) -> Program:
    """The first ``count`` elements of every width of that kind."""
    keep = tuple(range(count))
    choices = {g.name: Choice(str(kind), g.size, keep, g.basis) for g in program.need("groups") if g.kind == kind}
    assert choices
    return laws.sliced(program, CompressionPlan(choices))


def distance(one: Program, two: Program, given: Calibration = SEQUENCE) -> float:
    flat = recovering.flat(two, given.batches[0])
    return relative_error(run_flat(one, flat), run_flat(two, flat))


# ------------------------------------------------------------ the closed form


def test_two_known_grams_give_the_known_order() -> None:
    basis = balance(torch.tensor([4.0, 1, 1, 1]).diag(), torch.tensor([1.0, 9, 1, 1]).diag())
    assert basis.strengths.tolist() == pytest.approx([3, 2, 1, 1])
    assert basis.left[:2].abs().argmax(1).tolist() == [1, 0]  # the second direction first, then the first
    assert float(basis.strengths[2:].square().sum()) == pytest.approx(2)


def test_what_a_rung_loses_is_the_sum_of_the_strengths_that_go() -> None:
    """Over all pairs of queries and keys; and what is left is never worth less for keeping more."""
    torch.manual_seed(0)
    q, k = (torch.randn(n, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for n in (40, 50))
    basis = balance(q.T @ q / 40, k.T @ k / 50)
    one, two = q @ basis.left.T, k @ basis.right.T
    assert torch.dist(one @ two.T, q @ k.T) < 1e-9
    losses = [float((q @ k.T - one[:, :r] @ two[:, :r].T).square().mean()) for r in range(7)]
    assert losses == pytest.approx([float(basis.strengths[r:].square().sum()) for r in range(7)], abs=1e-9)
    assert losses == sorted(losses, reverse=True)
    for gram, turn in ((q.T @ q / 40, basis.left), (k.T @ k / 50, basis.right)):
        assert torch.dist(turn @ gram @ turn.T, basis.strengths.diag()) < 1e-9  # both are balanced
    assert (basis.left.gather(1, basis.left.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), float("nan"))])
def test_a_gram_that_says_nothing_leaves_the_basis(gram: Tensor) -> None:
    basis = balance(gram, torch.eye(3))
    assert torch.equal(basis.left, torch.eye(3, dtype=torch.float64))
    assert not basis.strengths.any()


# ------------------------------------------------------------ the rewrite

FORMS: dict[str, tuple[Callable[[], nn.Module], Calibration, int]] = {
    "separate": (Attention, SEQUENCE, 2),
    "bias on logits": (lambda: Attention("bias"), SEQUENCE, 2),
    "scaled by head": (lambda: Attention("scaled"), SEQUENCE, 2),
    "fused": (lambda: blocks.WrittenAttention("matmul"), SEQUENCE, 2),
    "einsum": (lambda: blocks.WrittenAttention("einsum"), SEQUENCE, 2),
    "transposed weights": (blocks.TransposedWeights, SEQUENCE, 2),
    "shared keys, repeated": (lambda: blocks.GroupedQueries("repeat"), SEQUENCE, 2),
    "shared keys, fused": (lambda: blocks.GroupedQueries("sdpa"), SEQUENCE, 2),
    "packed": (lambda: blocks.MultiheadViT(depth=1), data((8, 3, 32, 32)), 2),
    "packed, across": (Cross, data((8, 5, WIDTH), (8, 7, WIDTH)), 2),
    "convolutions": (Pictures, data((8, WIDTH, 3, 4)), 2),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("by", ["data", "weights"])
def test_outputs_stay_the_graph_stays_and_twice_is_once(name: str, by: str) -> None:
    make, given, count = FORMS[name]
    program = prepared(make(), given)
    after, record = aligned(program, given, by)
    assert (record.basis, len(record.strengths), record.stays) == (by, count, {})
    assert str(after.graph) == str(program.graph)
    assert distance(after, program, given) < 1e-5
    laws.rewritten_in_order(program, after)
    again, _ = aligned(after, given, by)
    for key, tensor in after.tensors.items():
        if tensor.is_floating_point():
            assert torch.dist(again.tensors[key], tensor) <= 1e-4 * tensor.norm() + 1e-6, key
    same, _ = aligned(program, given, by)
    assert all(torch.equal(t, same.tensors[n]) for n, t in after.tensors.items())


@pytest.mark.parametrize("kind", [Kind.QK, Kind.V])
def test_a_product_of_rank_two_is_cut_to_two_without_loss(kind: Kind) -> None:
    model = blocks.GroupedQueries("repeat")
    program = prepared(model)
    torch.manual_seed(1)
    low = torch.cat([torch.randn(8, 2) @ torch.randn(2, 24) for _ in range(2)]) / 24**0.5
    with torch.no_grad():
        (model.k if kind is Kind.QK else model.v).weight.copy_(low)
        (model.k if kind is Kind.QK else model.v).bias.zero_()
    program = laws.analysed_of(model, SEQUENCE.batches[0].args)
    for given in (SEQUENCE, None):
        after, record = aligned(program, given)
        strengths = next(s for n, s in record.strengths.items() if n.endswith(f":{kind}"))
        assert strengths[2] < 5e-3 * strengths[1]
        assert distance(cut(after, kind, 2), program) < 1e-4
    assert distance(cut(program, kind, 2), program) > 0.05  # in the model's own basis it is a loss


def test_by_data_the_tail_costs_less_than_by_weights_and_far_less_than_as_it_was() -> None:
    torch.manual_seed(0)
    spread = torch.linspace(1.5, -1.5, WIDTH).exp()
    given = Calibration(tuple(Batch((torch.randn(8, 5, WIDTH) * spread,)) for _ in range(8)), "skewed")
    program = prepared(Attention(), given)
    by_data, by_weights = aligned(program, given)[0], aligned(program, given, "weights")[0]
    for kind in (Kind.QK, Kind.V):
        lost = [distance(cut(p, kind, 4), program, given) for p in (by_data, by_weights, program)]
        assert lost[0] < 0.95 * lost[1]
        assert lost[0] < 0.8 * lost[2]


def test_what_is_added_to_all_keys_changes_nothing() -> None:
    model = Attention()
    program = prepared(model)
    before, _ = aligned(program, SEQUENCE)
    with torch.no_grad():
        model.k.bias.add_(torch.randn(HEADS * SIZE))
    after, _ = aligned(laws.analysed_of(model, SEQUENCE.batches[0].args), SEQUENCE)
    for name in ("q.weight", "q.bias", "k.weight"):
        assert torch.dist(before.tensors[name], after.tensors[name]) < 1e-3 * before.tensors[name].norm()
    assert torch.dist(before.tensors["k.bias"], after.tensors["k.bias"]) > 0.1


def test_keys_that_are_all_alike_leave_the_basis() -> None:
    """Rounding is no direction: by it weights would grow by powers of ten."""
    several = [Batch((b.args[0], b.args[1].expand(-1, 3, -1))) for b in data((8, 5, WIDTH), (8, 1, WIDTH)).batches]
    given = Calibration(tuple(several), "one key, three times")
    program = prepared(Cross(), given)
    after, _ = aligned(program, given)
    name = "attention.in_proj_weight"
    assert torch.equal(after.tensors[name][: 2 * WIDTH], program.tensors[name][: 2 * WIDTH])
    assert not torch.equal(after.tensors[name][2 * WIDTH :], program.tensors[name][2 * WIDTH :])


def test_padding_has_no_say() -> None:
    module, _, _ = zoo.build("bert")
    texts = recovering.texts(64)
    program = laws.analysed_of(module, (), dict(texts.batches[0].kwargs))
    wider = []
    for batch in texts.batches:
        more = {k: F.pad(v, (0, 3), value=0) for k, v in batch.kwargs.items()}
        wider.append(Batch((), more))
    one, two = (aligned(program, given)[0] for given in (texts, Calibration(tuple(wider), "padded")))
    for name, tensor in one.tensors.items():
        if tensor.is_floating_point():
            assert torch.dist(tensor, two.tensors[name]) <= 2e-3 * tensor.norm(), name


# ------------------------------------------------------------ where it stays

STAYS: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: blocks.Rotary(), "qk", "rotary positions turn its pairs, at mul"),
    (lambda: Attention("norm"), "qk", "a norm over it stands between projection and product, at"),
    (lambda: Attention("length"), "qk", "more than one product sums over it: linalg_vector_norm"),
    (lambda: Attention("read"), "qk", "more than one product sums over it"),
    (lambda: Attention("squash"), "qk", "tanh (tanh) stands between projection and product"),
    (lambda: Attention("squash"), "v", "(tanh) stands between projection and product"),
    (lambda: Attention("made"), "qk", "the weight of linear is computed, not stored"),
    (lambda: Attention("tied"), "qk", "makes both factors"),
]


@pytest.mark.parametrize(("make", "kind", "why"), STAYS)
def test_where_elements_mean_something_they_stay_and_the_report_says_why(
    make: Callable[[], nn.Module], kind: str, why: str
) -> None:
    program = prepared(make())
    after, record = aligned(program, SEQUENCE)
    (said,) = [reason for name, reason in record.stays.items() if name.endswith(f":{kind}")]
    assert why in said
    assert any(why in note and "stays what it is" in note for note in after.notes)
    assert all(not g.ordered and not g.basis for g in after.need("groups") if g.name in record.stays)
    assert distance(after, program) < 1e-5


def test_a_width_that_all_three_share_stays() -> None:
    program = laws.analysed_of(blocks.WrittenAttention("matmul").eval(), SEQUENCE.batches[0].args)
    after, record = aligned(program, SEQUENCE)
    assert "queries, keys and values share" in "".join(record.stays.values())
    assert all(torch.equal(t, after.tensors[n]) for n, t in program.tensors.items())


def test_a_frozen_width_stays_silently() -> None:
    program = prepared(Attention())
    held = tuple(replace(g, frozen="asked to freeze") if g.kind is Kind.QK else g for g in program.need("groups"))
    after, record = aligned(program.but(groups=held), SEQUENCE)
    assert [n.rpartition(":")[2] for n in record.strengths] == ["v"]
    assert not record.stays
    assert torch.equal(after.tensors["q.weight"], program.tensors["q.weight"])


def test_unknown_basis_is_an_error() -> None:
    with pytest.raises(OptionError, match="unknown basis 'date'"):
        AlignHeads("date")


def test_half_precision_keeps_its_dtype() -> None:
    model: Any = Attention()
    prepared(model)
    half = laws.analysed_of(model.bfloat16(), (SEQUENCE.batches[0].args[0].bfloat16(),))
    given = Calibration(tuple(Batch((b.args[0].bfloat16(),)) for b in SEQUENCE.batches), "bf16")
    after, record = aligned(half, given)
    assert len(record.strengths) == 2
    assert {t.dtype for t in after.tensors.values()} == {torch.bfloat16}
    assert distance(after, half, given) < 5e-2
