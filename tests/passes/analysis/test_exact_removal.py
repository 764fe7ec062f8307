"""Exact trajectory importance: brute force, suffix runs and stacked suffix runs agree, on transformers and on a CNN."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from support import brute, zoo
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Batch
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.consumers import consumers
from fxprune.passes.analysis.importance.distance import Measure
from fxprune.passes.analysis.importance.exact import Removals
from fxprune.passes.analysis.importance.features import find_taps, views
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline

KINDS = (Kind.HEAD, Kind.KV, Kind.FFN, Kind.CHANNEL)
MANY, ONE = 2**30, 1


def analysed(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor] | None = None) -> Program:
    return Pipeline((Clean(), Inline(), PropagateAxes(), FindGroups(align=1))).run(capture(module, args, kwargs or {}))


@cache
def model(name: str) -> tuple[Program, Batch]:
    module, args, kwargs = zoo.build(name)
    program = analysed(module.double(), *((tuple(a.double() for a in args), kwargs) if args else (args, kwargs)))
    given, named = zoo.other_inputs(args, kwargs, 3)
    return program, Batch(tuple(a.double() for a in given), named)


def chosen(program: Program) -> dict[PruneGroup, Tensor]:
    groups = [g for g in program.need("groups") if g.prunable and g.kind in KINDS]
    return {g: torch.arange(g.size)[:: max(1, g.size // 3)][:3] for g in groups}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "convnext", "resnet18"])
def test_brute_force_suffix_and_stacked_suffix_agree(name: str) -> None:
    program, batch = model(name)
    wanted, measure = chosen(program), Measure(reduction="mean")
    taps, seen = find_taps(program), views(consumers(program), find_taps(program), "later")
    stacked, single = Removals(program, [batch], measure, MANY), Removals(program, [batch], measure, ONE)
    (features, output), alone = stacked("stacked", wanted), single("single", wanted)
    assert not stacked.notes
    dense, logits = brute.watch(program, batch, taps)
    for group, elements in wanted.items():
        for i, element in enumerate(elements.tolist()):
            now, out = brute.watch(program, batch, taps, group, element)
            want = brute.features_moved(taps, seen[group.name], now, dense)
            assert float(features[group.name][i]) == pytest.approx(want, rel=1e-5, abs=1e-14)
            moved = brute.logits_moved(*(t[0].reshape(-1, t[0].shape[-1]) for t in (out, logits)), temperature=4.0)
            assert float(output[group.name][i]) == pytest.approx(moved, rel=1e-5, abs=1e-14)
    for one, two in zip((features, output), alone, strict=True):
        assert all(torch.allclose(one[n], two[n], rtol=1e-6, atol=1e-15) for n in one)
        assert sum(float(v.max()) > 0 for v in one.values()) > len(one) // 2


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("location", "norm"),
        ("location", "inner"),
        ("taps", "own"),
        ("taps", "next"),
        ("taps", "from"),
        ("normalised", False),
    ],
)
def test_every_ablation_equals_brute_force(option: str, value: object) -> None:
    program, batch = model("vit")
    measure = replace(Measure(reduction="mean", output=False), **{option: value})  # type: ignore[arg-type]
    taps = find_taps(program, measure.location)
    seen = views(consumers(program), taps, measure.taps)
    wanted = chosen(program)
    got, _ = Removals(program, [batch], measure, MANY)("x", wanted)
    dense, _ = brute.watch(program, batch, taps)
    for group, elements in wanted.items():
        for i, element in enumerate(elements.tolist()):
            now, _ = brute.watch(program, batch, taps, group, element)
            want = brute.features_moved(taps, seen[group.name], now, dense, normalised=measure.normalised)
            assert float(got[group.name][i]) == pytest.approx(want, rel=1e-5, abs=1e-14)


def test_scores_do_not_depend_on_what_else_is_scored_or_in_which_order() -> None:
    program, batch = model("vit")
    wanted = chosen(program)
    together, _ = Removals(program, [batch], Measure(), MANY)("x", wanted)
    for group, elements in reversed(wanted.items()):
        alone, _ = Removals(program, [batch], Measure(), MANY)("x", {group: elements.flip(0)})
        assert torch.allclose(alone[group.name].flip(0), together[group.name], rtol=1e-6, atol=1e-15)


def test_a_batch_twice_leaves_the_scores() -> None:
    program, batch = model("vit")
    wanted = chosen(program)
    doubled = Batch(tuple(torch.cat([a, a]) for a in batch.args))
    for measure in (Measure(reduction="mean"), Measure()):
        one, two = (Removals(program, [b], measure, MANY)("x", wanted) for b in (batch, doubled))
        factor = 1 if measure.reduction == "mean" else 4  # four blocks of the same map, summed
        assert all(torch.allclose(factor * one[0][n], two[0][n]) for n in one[0])
        assert all(torch.allclose(one[1][n], two[1][n]) for n in one[1])


def test_a_fixed_batch_runs_one_by_one_and_says_so() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).eval()

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y = (x + self.net(x)).reshape(2, 30)  # bakes the batch in
            return y.reshape(2, 5, 6)

    x = torch.randn(2, 5, 6)
    program = analysed(Fixed().eval(), (x,))
    group = next(g for g in program.need("groups") if g.kind is Kind.FFN)
    removals = Removals(program, [Batch((x,))], Measure(), MANY)
    features, _ = removals("x", {group: torch.arange(4)})
    assert any("fixed batch" in note for note in removals.notes)
    assert float(features[group.name].min()) > 0


class Padded(nn.Module):
    """Two feed-forward layers; rows do not mix, so that padding can only matter through the loss."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.fc3, self.fc4 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, classes) if classes else None

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = x + self.fc2(functional.gelu(self.fc1(x)))
        x = x + self.fc4(functional.gelu(self.fc3(x)))
        x = x * attention_mask[..., None]
        return {"hidden": x} if self.head is None else {"logits": self.head(x.sum(1) / attention_mask.sum(1)[:, None])}


def padded(classes: int = 0) -> tuple[Padded, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [4], [2]])).long()
    return Padded(classes).eval(), torch.randn(4, 5, 6), mask


def test_padding_rows_do_not_matter() -> None:
    net, x, mask = padded()
    program = analysed(net, (x, mask))
    other = torch.where(mask[..., None].bool(), x, torch.full_like(x, 9.0))
    wanted = {g: torch.arange(g.size) for g in program.need("groups") if g.size == 8}
    one, two = (Removals(program, [Batch((v, mask))], Measure(), MANY)("x", wanted) for v in (x, other))
    for n in one[0]:
        assert torch.allclose(one[0][n], two[0][n])
        assert float(one[0][n].min()) > 0


def test_a_single_logit_is_a_regression() -> None:
    net, x, mask = padded(1)
    program = analysed(net, (x, mask))
    group = next(g for g in program.need("groups") if g.kind is Kind.FFN)
    batch = Batch((x, mask))
    _, got = Removals(program, [batch], Measure(), MANY)("x", {group: torch.arange(3)})
    _, (dense,) = brute.watch(program, batch, [])
    for i in range(3):
        _, (now,) = brute.watch(program, batch, [], group, i)
        assert float(got[group.name][i]) == pytest.approx(float((now - dense).square().mean() / 2), rel=1e-4)


def test_dead_elements_score_exactly_zero() -> None:
    net, x, mask = padded(3)
    with torch.no_grad():
        net.fc2.weight[:, 2] = 0
        net.fc3.bias[5], net.fc3.weight[5] = -30.0, 0.0  # its gelu is zero
    program = analysed(net, (x, mask))
    groups = {g: torch.arange(g.size) for g in program.need("groups") if g.size == 8}
    features, output = Removals(program, [Batch((x, mask))], Measure(), MANY)("x", groups)
    (first, last) = features
    assert (features[first] == 0).nonzero().flatten().tolist() == [2]
    assert (output[first] == 0).nonzero().flatten().tolist() == [2]
    assert 5 in (features[last] == 0).nonzero().flatten().tolist()


def test_removing_nothing_changes_nothing() -> None:
    program, batch = model("vit")
    removals = Removals(program, [batch], Measure(), MANY)
    group = next(g for g in program.need("groups") if g.kind is Kind.HEAD)
    removals("x", {group: torch.arange(1)})
    assert list(removals._losses(removals._batch(0), group, [torch.arange(0)])) == [(0.0, 0.0)]
    (moved,) = removals._values(removals._batch(0), group, [torch.arange(0)])
    for key, value in moved.items():
        assert torch.equal(value, removals._batch(0).value(key))


def test_relabelling_elements_relabels_scores() -> None:
    net, x, mask = padded(3)
    program = analysed(net, (x, mask))
    order = torch.randperm(8)
    with torch.no_grad():
        other = padded(3)[0]
        other.load_state_dict(net.state_dict())
        other.fc1.weight.copy_(net.fc1.weight[order])
        other.fc1.bias.copy_(net.fc1.bias[order])
        other.fc2.weight.copy_(net.fc2.weight[:, order])
    found = []
    for p in (program, analysed(other, (x, mask))):
        group = next(g for g in p.need("groups") if g.kind is Kind.FFN)
        found.append(Removals(p, [Batch((x, mask))], Measure(), MANY)("x", {group: torch.arange(8)})[0][group.name])
    assert torch.allclose(found[0][order], found[1], rtol=1e-4)


def test_the_norm_of_feature_maps_may_be_taken_per_sample() -> None:
    program, batch = model("resnet18")
    wanted = chosen(program)
    mean, each = (
        Removals(program, [batch], Measure(reduction="mean", per_sample=p, output=False), MANY)("x", wanted)
        for p in (False, True)
    )
    mean, each = mean[0], each[0]
    assert all(bool((each[n] >= mean[n] * (1 - 1e-9)).all()) for n in mean)  # Jensen: what cancels in the mean
    assert any(bool((each[n] > mean[n]).any()) for n in mean)
