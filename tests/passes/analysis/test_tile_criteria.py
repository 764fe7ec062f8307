"""Criteria of tiles against their definitions: per-sample gradients by autograd, the quadratic form, OBS by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiled
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Batch, Calibration
from fxprune.data.fingerprint import fingerprint
from fxprune.errors import InternalError, OptionError
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.ir.sparsity import tile_areas, tile_sums, two_of_four
from fxprune.passes.analysis.importance.distortion import distortion, isotonic
from fxprune.passes.analysis.importance.obert import _one_row, left_to_right
from fxprune.passes.analysis.importance.tile_products import tile_products
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.process import jobs
from fxprune.process.journal import Journal

CRITERIA = ("lsp", "lsp{order=taylor}", "lsp{curve=taylor2}", "magnitude", "wanda", "obert")


def labelled(given: Calibration) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(
        tuple(Batch(b.args, labels=torch.randint(0, 3, (b.size,), generator=generator)) for b in given.batches),
        "labelled",
    )


def scored(program: Program, criterion: str, given: Calibration | None) -> dict[str, Any]:
    return dict(Pipeline((ScoreGroups(criterion, data=given),), start=("axes", "groups")).run(program).need("scores"))


def gradients(model: nn.Module, given: Calibration, name: str) -> Tensor:
    """dL_n/dW of every sample, by autograd. [samples, out, in]"""
    found = []
    for batch in given.batches:
        assert batch.labels is not None
        for x, y in zip(batch.args[0], batch.labels, strict=True):
            loss = functional.cross_entropy(model(x[None]), y[None])
            found.append(torch.autograd.grad(loss, model.get_parameter(name))[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["qkv.weight", "down.weight"])
def test_tile_products_are_sums_of_weight_times_per_sample_gradient(name: str) -> None:
    model, given = tiled.model(), labelled(tiled.data())
    program = tiled.analysed(model, given)
    group = tiled.live(program)[name]
    found = tile_products(program, list(tiled.live(program).values()), given, 0, 3)[group.name]
    g, w = gradients(model, given, name), tiled.weight(program, name)
    torch.testing.assert_close(found.products, tile_sums(g * w, group.tile).flatten(1), rtol=1e-4, atol=1e-7)
    slope = (w * g.mean(0)).abs().double()
    taylor = tile_sums(slope, group.tile) / tile_areas(group.matrix.shape, group.tile)
    torch.testing.assert_close(found.taylor, taylor.flatten(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found.energy, tile_sums(w.double().square(), group.tile).flatten())


class Merged(nn.Module):
    """Samples merged with tokens before the layer, tokens first: [b, t, c] -> [t * b, c]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = torch.relu(self.embed(x)).transpose(0, 1).reshape(t * b, 8)
        return self.head(torch.relu(self.mix(y)).view(t, b, 8).mean(0))


def test_samples_are_told_apart_where_they_are_merged_with_tokens() -> None:
    torch.manual_seed(0)
    model = Merged()
    given = labelled(Calibration(tuple(Batch((torch.randn(4, 5, 6),)) for _ in range(2)), "normal"))
    program = tiled.analysed(model, given, "4x4")
    group = tiled.live(program)["mix.weight"]
    found = tile_products(program, [group], given, 0, 1)[group.name].products
    want = tile_sums(gradients(model, given, "mix.weight") * tiled.weight(program, "mix.weight"), (4, 4)).flatten(1)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)


def test_the_curve_equals_the_dense_quadratic_form() -> None:
    """delta(k) with H = kappa I + mean g g^T, formed in full for a layer of 8 x 12 in tiles of 4 x 4."""
    torch.manual_seed(0)
    weight, g, kappa = torch.randn(8, 12).double(), torch.randn(20, 8, 12).double(), 0.3
    products, energy = tile_sums(g * weight, (4, 4)).flatten(1), tile_sums(weight.square(), (4, 4)).flatten()
    removal = torch.randperm(6)
    flat = g.flatten(1)
    hessian = kappa * torch.eye(96).double() + flat.T @ flat / 20
    for kind in ("taylor2", "fisher"):
        curve = distortion(products[:, removal], energy[removal], kind, kappa)
        assert float(curve[0]) == 0
        previous = torch.zeros(96).double()
        for k in range(1, 7):
            gone = torch.zeros(6).index_fill(0, removal[:k], 1).view(2, 3)
            change = -(weight * gone.repeat_interleave(4, 0).repeat_interleave(4, 1)).flatten()
            slope = flat.mean(0) @ change
            form = change @ hessian @ change
            want = slope + 0.5 * form if kind == "taylor2" else form
            torch.testing.assert_close(curve[k], want, rtol=1e-12, atol=1e-12)
            if kind == "taylor2":  # Eq. 13: the same, step by step
                step = change - previous
                incremental = flat.mean(0) @ step + (0.5 * step + previous) @ hessian @ step
                torch.testing.assert_close(curve[k] - curve[k - 1], incremental, rtol=1e-11, atol=1e-11)
            previous = change


def test_the_vectors_of_the_specification() -> None:
    p = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert distortion(p, torch.zeros(2), "taylor2").tolist() == [0, 0.5, 0.75]
    assert distortion(p, torch.zeros(2), "fisher").tolist() == [0, 5, 6.5]
    assert isotonic(torch.tensor([0.0, -1.0, 2.0, 1.5])).tolist() == [0, 0, 2, 2]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_do_not_depend_on_the_batching(criterion: str) -> None:
    given = labelled(tiled.data(2, 8)) if "taylor" in criterion else tiled.data(2, 8)
    whole = Batch(
        (torch.cat([b.args[0] for b in given.batches]),),
        labels=None
        if given.batches[0].labels is None
        else torch.cat([b.labels for b in given.batches if b.labels is not None]),
    )
    program = tiled.analysed(tiled.model(), given)
    one, two = (scored(program, criterion, c) for c in (given, Calibration((whole,), "one batch")))
    for name, score in one.items():
        torch.testing.assert_close(score.values, two[name].values, rtol=1e-3, atol=1e-9)
        assert score.values.shape == (program.group_by_name[name].size,)


def test_scoring_can_be_interrupted_and_goes_on(tmp_path: Path) -> None:
    given = tiled.data(4)
    program = tiled.analysed(tiled.model(), given)
    want = scored(program, "lsp", given)
    seen: list[tuple[str, int, int]] = []

    def stop(name: str, done: int, total: int) -> None:
        seen.append((name, done, total))
        if done == 2 and len(seen) == 3:
            raise KeyboardInterrupt

    def once() -> dict[str, Any]:
        journal = Journal(tmp_path / "out", note=lambda _: None)
        with jobs.session(journal, progress=stop):
            jobs.identify(lambda: fingerprint(program, given, 0, ["lsp"]))
            return scored(program, "lsp", given)

    with pytest.raises(KeyboardInterrupt):
        once()
    found = once()
    assert ("tiles", 2, 4) in seen[3:], "two batches were found again"
    assert all(torch.equal(found[n].values, s.values) for n, s in want.items())


@pytest.mark.drawn(3)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_tile_of_zeros_is_worth_nothing(criterion: str) -> None:
    model = tiled.model()
    with torch.no_grad():
        model.get_parameter("up.weight")[:8, 4:8] = 0
    given = labelled(tiled.data(2)) if "taylor" in criterion else tiled.data(2)
    program = tiled.analysed(model, given)
    scores = scored(program, criterion, given)["up.weight:block"]
    assert float(scores.values[1]) <= 1e-12
    assert int(scores.values.argmin()) == 1
    if scores.order is not None:
        assert int(scores.order[-1]) == 1


def test_activation_aware_is_weight_times_root_mean_square_input() -> None:
    model, given = tiled.model(), tiled.data()
    program = tiled.analysed(model, given)
    x = model.norm1(model.embed(torch.cat([b.args[0] for b in given.batches]))).detach()
    driven = tiled.weight(program, "qkv.weight").abs() * x.square().mean((0, 1)).sqrt()
    want = tile_sums(driven, (8, 4)) / tile_areas((36, 12), (8, 4))
    got = scored(program, "wanda", given)["qkv.weight:block"].values
    torch.testing.assert_close(got, want.flatten().double(), rtol=1e-4, atol=1e-7)


def test_obs_gives_nothing_for_one_of_two_inputs_that_say_the_same() -> None:
    """Columns 0..3 of the layer's input equal columns 4..7: either tile can take over for the other."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Linear(6, 4), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.embed(x))
            return self.head(torch.relu(self.mix(torch.cat([y, y, y.square()], -1))).mean(1))

    torch.manual_seed(0)
    given = Calibration(tuple(Batch((torch.randn(16, 5, 6),)) for _ in range(2)), "normal")
    program = tiled.analysed(Twins(), given, "8x4")
    score = scored(program, "obert{damp=1e-6}", given)["mix.weight:block"]
    assert score.curve is not None
    first = int(score.order[-1])  # type: ignore[index]
    assert first in (0, 1)
    assert float(score.values[first]) < 1e-3 * float(score.values.max())
    assert float(score.values[1 - first]) > 0.05 * float(score.values.max()), "the twin that is left is worth its all"


def test_costs_of_tiles_that_go_in_turn_add_up_to_the_joint_obs_damage() -> None:
    torch.manual_seed(0)
    x, weight, pull = torch.randn(60, 12).double(), torch.randn(4, 12).double(), torch.rand(4).double()
    inverse = torch.linalg.inv(x.T @ x / 60 + 0.1 * torch.eye(12))
    cost = _one_row(weight.clone(), inverse.clone(), pull, 3)
    order, spent = cost.argsort(), 0.0
    assert cost[order].diff().gt(0).all(), "the running maximum is not in play"
    for k in range(1, 5):
        gone = torch.cat([torch.arange(3) + 3 * int(i) for i in order[:k]])
        w = weight[:, gone]
        joint = 0.5 * ((w @ torch.linalg.inv(inverse[gone][:, gone]) * w).sum(1) * pull).sum()
        spent += float(cost[order[k - 1]])
        assert spent == pytest.approx(float(joint), rel=1e-8)


def test_left_to_right_keeps_two_of_four_and_beats_magnitude_on_its_own_objective() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16).double() @ torch.randn(16, 16).double()
    weight = torch.randn(12, 16).double()
    hessian = x.T @ x / 200

    def error(kept: Tensor) -> float:
        total = 0.0
        for row, keep in zip(weight, kept, strict=True):  # the best weights on the kept inputs
            best = torch.linalg.lstsq(x[:, keep], (x @ row)[:, None]).solution
            total += float((x[:, keep] @ best - (x @ row)[:, None]).square().sum())
        return total

    obs, magnitude = two_of_four(left_to_right(weight, hessian + 1e-6 * torch.eye(16))), two_of_four(weight.abs())
    assert obs.view(12, 4, 4).sum(-1).eq(2).all()
    assert error(obs) < error(magnitude)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "obert"])
def test_single_weights_can_be_scored_for_two_of_four(criterion: str) -> None:
    given = tiled.data(2)
    program = tiled.analysed(tiled.model(), given, "2:4")
    for name, score in scored(program, criterion, given).items():
        assert score.values.shape == (
            program.group_by_name[name].matrix.shape[0]  # type: ignore[attr-defined]
            * program.group_by_name[name].matrix.shape[1],
        )  # type: ignore[attr-defined]


def test_criteria_of_tiles_refuse_heads_and_lsp_refuses_single_weights() -> None:
    from support.recovering import analysed

    given = tiled.data(1)
    with pytest.raises(OptionError, match='blocks="32x32"'):
        scored(analysed(tiled.model(), given), "lsp", given)
    with pytest.raises(OptionError, match="single weights"):
        scored(tiled.analysed(tiled.model(), given, "2:4"), "lsp", given)
    with pytest.raises(OptionError, match="unknown curve 'fischer'"):
        scored(tiled.analysed(tiled.model(), given), "lsp{curve=fischer}", given)
    with pytest.raises(OptionError, match="damping"):
        scored(tiled.analysed(tiled.model(), given), "obert{damp=0}", given)
    with pytest.raises(InternalError, match="calibration data"):
        tile_products(tiled.analysed(tiled.model(), given), [], None, 0, 1)
