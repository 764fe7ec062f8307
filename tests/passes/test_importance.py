"""Criteria: norms against brute force, mask gradients against finite differences, and the laws of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Batch, Calibration
from fxprune.errors import FxpruneError, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.tiles import TileCriterion
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.registry import CRITERIA, lookup

OF_ELEMENTS = sorted(
    name
    for name in set(CRITERIA) - {"random"}
    if not (issubclass(lookup("criterion", name), TileCriterion) or lookup("criterion", name).only)
)

torch.set_num_threads(1)


class Block(nn.Module):
    """A ViT block with a classifier; masks multiply what enters the consumers, written by hand."""

    def __init__(self, heads: int = 3, dim: int = 4, hidden: int = 5, classes: int = 4) -> None:
        super().__init__()
        width = heads * dim
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, heads: Tensor | None = None, neurons: Tensor | None = None) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        if heads is not None:
            y = y * heads.view(1, -1, 1, 1)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, width))
        y = functional.gelu(self.fc1(self.norm2(x)))
        if neurons is not None:
            y = y * neurons
        return self.head((x + self.fc2(y)).mean(1))


class Convolutions(nn.Module):
    """conv, batch norm, depthwise conv with a bias, 1x1 conv, pooling, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.point = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, inner: Tensor | None = None, outer: Tensor | None = None) -> Tensor:
        y = functional.relu(self.depthwise(functional.silu(self.norm(self.first(x)))))
        if inner is not None:
            y = y * inner.view(1, -1, 1, 1)
        y = functional.silu(self.point(y)).mean((2, 3))
        return self.head(y if outer is None else y * outer)


class Merged(nn.Module):
    """nn.MultiheadAttention that returns its weights: batch and heads share a dimension, tokens come first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(12, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.head(y.mean(0)) + 0 * weights.sum()


class Hidden(nn.Module):
    """No logits: hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.fc2(torch.relu(self.fc1(x)))}


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn_like(tensor) * 0.5
    for name, tensor in model.named_buffers():
        if name.endswith("running_var"):
            tensor.data = tensor.abs() + 0.5
    return model.double().eval()


def analysed(model: nn.Module, *args: Tensor, **options: Any) -> Program:
    program = capture(model, args)
    return Pipeline((PropagateAxes(), FindGroups(align=1, floor=0.0, **options))).run(program)


def scores(program: Program, criterion: Any, data: Calibration | None = None, seed: int = 0) -> dict[str, Tensor]:
    scored = Pipeline((ScoreGroups(criterion, data, seed),), start=("axes", "groups")).run(program)
    return {name: s.values for name, s in scored.need("scores").items()}


def by_kind(program: Program, kind: Kind) -> PruneGroup:
    found = [g for g in program.need("groups") if g.kind == kind and g.prunable]
    assert len(found) == 1, [g.name for g in found]
    return found[0]


def reaching(program: Program, parameter: str, position: int = 0) -> PruneGroup:
    return next(
        g
        for g in program.need("groups")
        if g.prunable and any(s.parameter == parameter and s.position == position for s in g.slots)
    )


def calibration(x: Tensor, labels: Tensor | None = None, sizes: tuple[int, ...] | None = None) -> Calibration:
    pieces = x.split(sizes or (len(x),))
    split = labels.split(sizes or (len(x),)) if labels is not None else [None] * len(pieces)
    return Calibration(tuple(Batch((p,), labels=y) for p, y in zip(pieces, split, strict=True)), "test")


def finite_difference(loss: Callable[[Tensor], Tensor], size: int, step: float = 1e-5) -> Tensor:
    """d loss[b] / d mask[i] at mask = 1. [batch, size]"""
    columns = []
    for i in range(size):
        bump = torch.zeros(size, dtype=torch.float64)
        bump[i] = step
        columns.append((loss(1 + bump) - loss(1 - bump)) / (2 * step))
    return torch.stack(columns, 1)


@pytest.fixture(scope="module")
def block() -> tuple[Block, Program, Tensor, Tensor]:
    model = Block()
    scrambled(model)
    x, labels = torch.randn(5, 7, 12, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    return model, analysed(model, x[:2]), x, labels


@pytest.fixture(scope="module")
def convolutions() -> tuple[Convolutions, Program, Tensor, Tensor]:
    model = Convolutions()
    scrambled(model)
    x, labels = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    return model, analysed(model, x[:2]), x, labels


# ---------------------------------------------------------------- magnitude


@torch.no_grad()
def test_magnitude_equals_brute_force(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    model, program, _, _ = block
    heads, neurons = by_kind(program, Kind.HEAD), by_kind(program, Kind.FFN)
    weights = torch.cat([model.fc1.weight, model.fc1.bias[:, None], model.fc2.weight.T], 1)
    assert torch.allclose(scores(program, "l2")[neurons.name], weights.norm(dim=1))
    assert torch.allclose(scores(program, "l1")[neurons.name], weights.abs().sum(1))
    parts = [
        model.qkv.weight.view(3, 3, 4, 12).transpose(0, 1).reshape(3, -1),
        model.qkv.bias.view(3, 3, 4).transpose(0, 1).reshape(3, -1),
        model.proj.weight.view(12, 3, 4).transpose(0, 1).reshape(3, -1),
    ]
    assert torch.allclose(scores(program, "l2")[heads.name], torch.cat(parts, 1).norm(dim=1))


@torch.no_grad()
def test_activation_equals_brute_force(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    model, program, x, _ = block
    seen: list[Tensor] = []
    hook = model.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    hook.remove()
    expected = (seen[0].square().mean((0, 1)) * model.fc2.weight.square().sum(0)).sqrt()
    for sizes in ((5,), (2, 3)):
        got = scores(program, "activation", calibration(x, sizes=sizes))
        assert torch.allclose(got[by_kind(program, Kind.FFN).name], expected)


@torch.no_grad()
def test_activation_of_convolutions(convolutions: tuple[Convolutions, Program, Tensor, Tensor]) -> None:
    model, program, x, _ = convolutions
    seen: list[Tensor] = []
    hook = model.point.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    hook.remove()
    expected = (seen[0].square().mean((0, 2, 3)) * model.point.weight.square().sum((0, 2, 3))).sqrt()
    got = scores(program, "activation", calibration(x))[reaching(program, "first.weight").name]
    assert torch.allclose(got, expected)


# ---------------------------------------------------------------- mask gradients


def test_gradients_of_a_transformer_block_equal_finite_differences(
    block: tuple[Block, Program, Tensor, Tensor],
) -> None:
    model, program, x, labels = block
    data = calibration(x, labels)
    cases = [(Kind.HEAD, 3, lambda m: model(x, heads=m)), (Kind.FFN, 5, lambda m: model(x, neurons=m))]
    for kind, size, run in cases:
        with torch.no_grad():
            g = finite_difference(lambda m, run=run: functional.cross_entropy(run(m), labels, reduction="none"), size)
        name = by_kind(program, kind).name
        assert torch.allclose(scores(program, "fisher", data)[name], 0.5 * g.square().mean(0), rtol=1e-6)
        assert torch.allclose(scores(program, "taylor", data)[name], g.abs().mean(0), rtol=1e-6)


def test_gradients_of_convolutions_equal_finite_differences(
    convolutions: tuple[Convolutions, Program, Tensor, Tensor],
) -> None:
    """The depthwise convolution hands channels on: their mask acts once, at the 1x1 convolution."""
    model, program, x, labels = convolutions
    cases = [("first.weight", 6, lambda m: model(x, inner=m)), ("point.weight", 5, lambda m: model(x, outer=m))]
    for parameter, size, run in cases:
        with torch.no_grad():
            g = finite_difference(lambda m, run=run: functional.cross_entropy(run(m), labels, reduction="none"), size)
        name = reaching(program, parameter).name
        assert torch.allclose(scores(program, "fisher", calibration(x, labels))[name], 0.5 * g.square().mean(0))


def test_squared_error_for_float_labels(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    model, program, x, _ = block
    target = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        g = finite_difference(lambda m: (model(x, neurons=m) - target).square().mean(1), 5)
    got = scores(program, "fisher", calibration(x, target))[by_kind(program, Kind.FFN).name]
    assert torch.allclose(got, 0.5 * g.square().mean(0), rtol=1e-6)


def test_without_labels_probes_average_to_the_true_fisher(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    model, program, x, _ = block
    with torch.no_grad():
        p = model(x).softmax(1)
        g = torch.stack(
            [finite_difference(lambda m, c=c: model(x, neurons=m).log_softmax(1)[:, c], 5) for c in range(4)], 1
        )
    expected = 0.5 * (p[:, :, None] * g.square()).sum(1).mean(0)
    name = by_kind(program, Kind.FFN).name
    got = torch.stack([scores(program, "fisher", calibration(x), seed)[name] for seed in range(60)]).mean(0)
    assert torch.allclose(got, expected, rtol=0.25)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("which", ["block", "merged", "hidden"])
def test_batching_does_not_matter(criterion: str, labelled: bool, which: str) -> None:
    """One batch of six equals six of one exactly: also where the batch shares a dimension with heads."""
    model = scrambled({"block": Block, "merged": Merged, "hidden": Hidden}[which]())
    x = torch.randn(6, 5, 6 if which == "hidden" else 12, dtype=torch.float64)
    labels = torch.randint(0, 4, (6, 5) if which == "hidden" else (6,)) if labelled else None
    program = analysed(model, x[:2])
    assert all(
        g.kind in (Kind.HEAD, Kind.QKV, Kind.QK, Kind.V, Kind.FFN, Kind.WIDTH)
        for g in program.need("groups")
        if g.prunable
    )
    whole, single = (scores(program, criterion, calibration(x, labels, sizes)) for sizes in (None, (1,) * 6))
    assert whole.keys() == single.keys()
    assert whole
    for name, values in whole.items():
        assert values.max() > 0
        assert torch.allclose(values, single[name], rtol=1e-9, atol=1e-14), name


@pytest.mark.drawn(3)
@pytest.mark.parametrize("criterion", OF_ELEMENTS)
def test_relabelling_elements_relabels_scores(criterion: str) -> None:
    torch.manual_seed(1)
    order, x = torch.randperm(5), torch.randn(4, 7, 12, dtype=torch.float64)
    model, moved = Block(), Block()
    moved.load_state_dict(scrambled(model).state_dict())
    moved.double().eval()
    with torch.no_grad():
        moved.fc1.weight.copy_(model.fc1.weight[order])
        moved.fc1.bias.copy_(model.fc1.bias[order])
        moved.fc2.weight.copy_(model.fc2.weight[:, order])
    got = []
    for one in (model, moved):
        program = analysed(one, x[:2])
        got.append(scores(program, criterion, calibration(x))[by_kind(program, Kind.FFN).name])
    assert torch.allclose(got[0][order], got[1], rtol=1e-9)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation"])
def test_an_element_that_nothing_reads_scores_zero(criterion: str) -> None:
    model = Block()
    scrambled(model)
    with torch.no_grad():
        model.fc2.weight[:, 2] = 0
        model.proj.weight[:, 4:8] = 0
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    program = analysed(model, x[:2])
    got = scores(program, criterion, calibration(x))
    assert (got[by_kind(program, Kind.FFN).name] == 0).tolist() == [False, False, True, False, False]
    assert (got[by_kind(program, Kind.HEAD).name] == 0).tolist() == [False, True, False]


def test_a_dead_element_has_no_magnitude() -> None:
    model = Hidden()
    with torch.no_grad():
        for tensor in (model.fc1.weight[3], model.fc1.bias[3], model.fc2.weight[:, 3]):
            tensor.zero_()
    program = analysed(model, torch.randn(2, 5, 6))
    for criterion in ("l1", "l2"):
        values = scores(program, criterion)[reaching(program, "fc1.weight").name]
        assert (values == 0).nonzero().flatten().tolist() == [3]


def test_the_seed_decides() -> None:
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    program = analysed(scrambled(Block()), x[:2])
    for criterion in ("random", "fisher", "taylor"):
        one, same, other = (scores(program, criterion, calibration(x), seed) for seed in (1, 1, 2))
        assert all(torch.equal(one[n], same[n]) for n in one)
        assert any(not torch.equal(one[n], other[n]) for n in one)


def test_weights_and_their_gradients_are_left_alone() -> None:
    model = scrambled(Block())
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    program = analysed(model, x[:2])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores(program, "fisher", calibration(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_groups_without_a_sample_axis_are_scored_per_batch_and_said_so() -> None:
    class Table(nn.Module):
        """A table of positions goes through a hidden layer before it meets the samples (Swin v2)."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(5, 2))
            self.fc1, self.fc2, self.head = nn.Linear(2, 6), nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x * self.fc2(torch.relu(self.fc1(self.table)))).mean(1))

    torch.manual_seed(0)
    x = torch.randn(4, 5, 12)
    program = analysed(Table(), x[:2])
    name = reaching(program, "fc1.weight").name
    scored = ScoreGroups("fisher", calibration(x)).run(program)
    assert scored.need("scores")[name].values.max() > 0
    assert any("per batch" in note and name in note for note in scored.notes)


# ---------------------------------------------------------------- bad input


def test_unknown_criterion_names_the_nearest() -> None:
    program = analysed(Hidden(), torch.randn(2, 5, 6))
    with pytest.raises(OptionError, match="did you mean 'fisher'"):
        scores(program, "fischer")


def test_a_criterion_that_needs_data_says_so() -> None:
    program = analysed(Hidden(), torch.randn(2, 5, 6))
    for criterion in ("fisher", "taylor", "activation"):
        with pytest.raises(OptionError, match="needs data"):
            scores(program, criterion)


def test_generated_data_is_said_loudly() -> None:
    program = analysed(Hidden(), torch.randn(2, 5, 6))
    data = Calibration((Batch((torch.randn(2, 5, 6),)),), "random normal", generated=True)
    assert any("generated inputs" in note for note in ScoreGroups("activation", data).run(program).notes)
    assert not ScoreGroups("l2", data).run(program).notes


@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_a_nan_activation_names_its_node(criterion: str) -> None:
    class Overflow(Hidden):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": self.fc2(torch.log(self.fc1(x)))}

    program = analysed(Overflow(), torch.randn(2, 5, 6))
    with pytest.raises(FxpruneError, match=r"(?s)not a number.*at +log"):
        scores(program, criterion, calibration(torch.randn(2, 5, 6)))


@pytest.mark.parametrize("criterion", ["l2", "fisher"])
def test_a_nan_weight_is_named(criterion: str) -> None:
    model = Hidden()
    with torch.no_grad():
        model.fc1.weight[1, 2] = float("nan")
    program = analysed(model, torch.randn(2, 5, 6))
    with pytest.raises(FxpruneError, match=r"(?s)not a finite number.*fc1\.weight"):
        scores(program, criterion, calibration(torch.randn(2, 5, 6)))


def test_labels_that_do_not_fit(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    _, program, x, _ = block
    with pytest.raises(FxpruneError, match=r"(?s)label is out of range.*found 9.*4 classes"):
        scores(program, "fisher", calibration(x, torch.tensor([0, 1, 9, 0, 0])))
    with pytest.raises(FxpruneError, match="labels do not fit"):
        scores(program, "fisher", calibration(x, torch.zeros(5, 7, 3, dtype=torch.long)))


def test_data_of_another_shape_names_the_node(block: tuple[Block, Program, Tensor, Tensor]) -> None:
    _, program, _, _ = block
    with pytest.raises(FxpruneError, match=r"(?s)failed on the calibration data"):
        scores(program, "fisher", calibration(torch.randn(2, 7, 13, dtype=torch.float64)))
