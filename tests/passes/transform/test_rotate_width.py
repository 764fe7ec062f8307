"""A residual stream in its principal basis: the same function, cut exactly, and why other streams stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.laws import analysed_of, rotated, sliced, sliced_equals_masked
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Batch, Calibration
from fxprune.ir.cost import CostModel
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.fuse_norms import FuseNorms
from fxprune.passes.transform.rotate_width import NO_DATA, NOT_FINITE, RotateWidth, Rotations
from fxprune.testing import relative_error, run_flat

Norm = Callable[[int], nn.Module]


class Power(nn.Module):
    """RMS norm as Gemma writes it: the weight is one more than the parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Stream(nn.Module):
    """A pre-norm stream of two branches and a head. [batch, t, 5] -> [batch, t, 3]

    parallel   both branches read one norm (GPT-J);  rank: of all that is written
    """

    def __init__(self, width: int = 8, norm: Norm = nn.LayerNorm, parallel: bool = False, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parallel = parallel
        self.embed, self.norms = nn.Linear(5, width), nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 6, bias=i == 0) for i in range(2))
        self.down = nn.ModuleList(nn.Linear(6, width) for _ in range(2))
        self.place, self.scale = nn.Parameter(torch.randn(1, 4, width)), nn.Parameter(1 + 0.3 * torch.randn(width))
        self.head = nn.Linear(width, 3, bias=False)
        for one in self.norms:
            for p in one.parameters():
                nn.init.normal_(p, 1.0, 0.3)
        with torch.no_grad():
            writes = [
                self.embed.weight,
                self.embed.bias,
                self.place,
                *(t for d in self.down for t in (d.weight, d.bias)),
            ]
            basis = torch.randn(width, rank or width)
            for t in writes if rank else ():
                along = t.T if t.dim() == 2 else t
                t.copy_((along[..., :rank] @ basis.T).T if t.dim() == 2 else along[..., :rank] @ basis.T)
            if rank:
                self.scale.fill_(0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        one = self.norms[0](x)
        first = self.down[0](functional.gelu(self.up[0](one))) * self.scale
        if not self.parallel:
            x, first = x + first, torch.zeros(())
            one = self.norms[1](x)
        second = self.down[1](functional.gelu(self.up[1](one)))
        x = x + second if not self.parallel else x + first + second
        return self.head(self.norms[2](x).mean(1, keepdim=True))


def program_of(module: nn.Module, *shape: int, scale: float = 1.0) -> Program:
    return analysed_of(module.eval(), (scale * torch.randn(*(shape or (6, 4, 5))),))


def width_of(program: Program) -> PruneGroup:
    return next(g for g in program.need("groups") if g.ordered)


def first(program: Program, count: int) -> CompressionPlan:
    """Keep the first directions of the stream."""
    group = width_of(program)
    return CompressionPlan({group.name: Choice(str(group.kind), group.size, tuple(range(count)))})


def example(program: Program) -> list[Any]:
    return program.flatten(*program.example_inputs)


def turn(program: Program, **options: Any) -> tuple[Program, Rotations]:
    args, kwargs = program.example_inputs
    return RotateWidth(data=Calibration((Batch(tuple(args), kwargs),), "example"), **options).apply(program)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, Power])
@pytest.mark.parametrize("parallel", [False, True])
def test_norms_scales_and_tables_are_folded(norm: Norm, parallel: bool) -> None:
    program = program_of(Stream(norm=norm, parallel=parallel))
    turned = rotated(program)
    assert relative_error(run_flat(turned, example(program)), run_flat(program, example(program))) < 1e-5
    plan = first(turned, 3)
    sliced_equals_masked(turned, plan, sliced(turned, plan))
    assert not [n for n in turned.tensors if "norms" in n or n == "scale"]


def test_layer_norm_leaves_one_direction_empty() -> None:
    program = program_of(Stream())
    after, record = turn(program)
    (one,) = record.rotated
    assert one.energy[-2] == one.energy[-1] == 1.0
    turned = Pipeline((PropagateAxes(), FindGroups())).run(after)
    small = sliced(turned, first(turned, 7))
    assert relative_error(run_flat(small, example(program)), run_flat(program, example(program))) < 1e-6


@pytest.mark.parametrize(("norm", "width", "rank", "enough"), [(nn.LayerNorm, 2, 0, 1), (nn.RMSNorm, 3, 1, 1)])
def test_a_stream_of_low_rank_is_cut_without_loss(norm: Norm, width: int, rank: int, enough: int) -> None:
    """Two channels behind a layer norm are plus and minus one number; what is written along one line stays on it."""
    program = program_of(Stream(width, norm, rank=rank))
    turned = rotated(program)
    small = FuseNorms().run(sliced(turned, first(turned, enough)))
    assert relative_error(run_flat(small, example(program)), run_flat(program, example(program))) < 1e-5


@pytest.mark.parametrize("norm", [lambda n: nn.LayerNorm(n, eps=1e-5), lambda n: nn.RMSNorm(n, eps=1e-5)])
def test_eps_counts_what_the_whole_width_counted(norm: Norm) -> None:
    """Rows as small as the root of eps: one that is off by the share of the width that stays would show."""
    module = Stream(norm=norm)
    with torch.no_grad():
        for p in (*module.embed.parameters(), module.place, *module.down.parameters()):
            p.mul_(1e-3)
    program = program_of(module)
    turned = rotated(program)
    assert relative_error(run_flat(turned, example(program)), run_flat(program, example(program))) < 1e-5
    plan = first(turned, 2)
    small = sliced(turned, plan)
    sliced_equals_masked(turned, plan, small)
    fused = FuseNorms().run(small)
    assert relative_error(run_flat(fused, example(program)), run_flat(small, example(program))) < 1e-6
    (norm_node, *_) = [n for n in fused.graph.nodes if n.target is torch.ops.aten.rms_norm.default]
    assert norm_node.args[3] == pytest.approx(1e-5 * 8 / 2)


class Tied(nn.Module):
    """Token embeddings that also are the head. [batch, t] -> [batch, t, 11]"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.inner = nn.LayerNorm(8)
        for one in (self.norm, self.inner):
            nn.init.normal_(one.weight, 1.0, 0.3)
            nn.init.normal_(one.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(functional.gelu(self.up(self.inner(x))))
        return self.head(self.norm(x))


def test_tied_embeddings_become_two_and_it_is_told() -> None:
    program = analysed_of(Tied().eval(), (torch.randint(0, 11, (2, 5)),))
    after, record = turn(program)
    assert record.rotated[0].untied[0][1] == 88
    assert any("is two tensors now, 88 elements more" in note for note in after.notes)
    turned = Pipeline((PropagateAxes(), FindGroups())).run(after)
    norms, shifts = 4 * 8, 11  # weights and biases of two norms are gone, the head has a bias
    assert CostModel(turned)().params == CostModel(program)().params + 88 + shifts - norms
    assert relative_error(run_flat(turned, example(program)), run_flat(program, example(program))) < 1e-5
    same, record = turn(program, untie=False)
    assert same.exported is program.exported
    assert "serves it at both ends" in record.skipped[0][1]


def test_the_order_of_channels_means_nothing() -> None:
    module, other = Stream(), Stream()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, p in other.named_parameters():
            for dim in [d for d, n in enumerate(p.shape) if n == 8]:
                p.copy_(p.index_select(dim, order))
            assert p.shape == module.get_parameter(name).shape
    x = torch.randn(6, 4, 5)
    one, two = (turn(analysed_of(m.eval(), (x,))) for m in (module, other))
    assert one[1].rotated[0].energy == pytest.approx(two[1].rotated[0].energy, abs=1e-5)
    assert relative_error(run_flat(two[0], [x]), run_flat(one[0], [x])) < 1e-5


def test_the_same_data_give_the_same_bits() -> None:
    program = program_of(Stream())
    one, two = turn(program)[0], turn(program)[0]
    assert all(torch.equal(t, two.tensors[name]) for name, t in one.tensors.items())


def test_weights_in_half_precision_are_rounded_once() -> None:
    """bf16: the rotated model is as near to the exact one as the model itself, up to a factor."""
    module = Stream(norm=nn.RMSNorm)
    x = torch.randn(6, 4, 5)
    exact = module.double()(x.double()).detach()
    half = module.to(torch.bfloat16).eval()
    program = analysed_of(half, (x.bfloat16(),))
    turned = rotated(program)
    assert {t.dtype for t in turned.tensors.values()} == {torch.bfloat16}
    (want,), (got,) = run_flat(program, example(program)), run_flat(turned, example(program))
    assert relative_error([got.double()], [exact]) < 4 * max(relative_error([want.double()], [exact]), 2**-8)


# ---------------------------------------------------------------- what stays as it is


def _gated(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0](x * functional.sigmoid(x)))


def _post_norm(x: Tensor, m: Stream) -> Tensor:
    y = m.norms[0](x)
    return m.head(m.norms[1](y + m.down[0](m.up[0](y))))


def _raw(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0](x)) + m.head(x)


def _scaled(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0]((x + m.down[0](m.up[0](m.norms[1](x)))) * m.scale))


def _bent(x: Tensor, m: Stream) -> Tensor:
    return m.head(functional.gelu(m.norms[0](x)))


def _lifted(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0](x + 1.0))


def _padded(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0](functional.pad(x, (0, 0, 0, 1), value=2.0)))


def _split(x: Tensor, m: Stream) -> Tensor:
    return m.head(m.norms[0](x).unflatten(-1, (2, 4)).flip(-2).flatten(-2))


def _mixed(x: Tensor, m: Stream) -> Tensor:
    return m.head(functional.rms_norm(x, [8])) + m.head(m.norms[0](x))


REASONS = {
    "sigmoid at": _gated,
    "post-norm": _post_norm,
    "reads the stream as it is": _raw,
    "scales the stream channel by channel": _scaled,
    "gelu at": _bent,
    "adds the same to every channel": _lifted,
    "pad at": _padded,
    "hands the channels on": _split,
    "centres its rows": _mixed,
}


class Odd(Stream):
    """A stream with one use that no rewrite of weights can follow."""

    def __init__(self, use: Callable[[Tensor, Stream], Tensor]) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.use(x + self.down[1](self.up[1](self.norms[2](x))), self)


@pytest.mark.parametrize("why", REASONS)
def test_what_cannot_be_followed_leaves_the_stream_alone(why: str) -> None:
    program = program_of(Odd(REASONS[why]))
    after, record = turn(program)
    assert not record.rotated
    assert after.exported is program.exported
    assert any(why in said for _, said in record.skipped), record.skipped
    assert any("stays in its own basis" in note for note in after.notes)


def test_without_data_nothing_is_rotated() -> None:
    program = program_of(Stream())
    after, record = RotateWidth().apply(program)
    assert after.exported is program.exported
    assert [why for _, why in record.skipped] == [NO_DATA]


def test_a_stream_that_is_not_finite_on_the_data_stays_and_others_are_rotated() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Stream(), Stream()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(y)

    x = torch.randn(3, 4, 5)
    program = analysed_of(Both(), (x, x))
    after, record = RotateWidth(data=Calibration((Batch((x, x / 0), {}),), "given")).apply(program)
    assert [one.group.partition(".")[0] for one in record.rotated] == ["one"]
    assert [(name.partition(".")[0], why) for name, why in record.skipped] == [("two", NOT_FINITE)]
    flat = program.flatten((x, x + 1), {})
    assert relative_error(run_flat(after, flat), run_flat(program, flat)) <= 1e-5
    alone, record = RotateWidth(data=Calibration((Batch((x / 0, x / 0), {}),), "given")).apply(program)
    assert alone.exported is program.exported
    assert len(record.skipped) == 2


def test_a_frozen_width_stays() -> None:
    program = program_of(Stream())
    frozen = Pipeline((FindGroups(freeze=("*:width",)),), start=("axes",)).run(program)
    _, record = turn(frozen)
    assert "asked to freeze" in record.skipped[0][1]
    assert all(g.kind is not Kind.WIDTH or g.frozen for g in frozen.need("groups"))
