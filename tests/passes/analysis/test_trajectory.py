"""Trajectory importance: the distillation loss in every form, the probe against exact removal, and its laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.data.batch import Batch, Calibration
from fxprune.data.metrics import spearman
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.consumers import consumers
from fxprune.passes.analysis.importance.distance import map_change
from fxprune.passes.analysis.importance.features import Tap, find_taps, views
from fxprune.passes.analysis.importance.terms import balance, combine
from fxprune.passes.analysis.importance.trajectory import Trajectory, borderline
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.refine_scores import RefineScores
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.testing import masked

WIDTH, HEADS, HIDDEN, DEPTH, TOKENS = 12, 3, 10, 3, 5


class Layers(nn.Module):
    """Pre-norm blocks; the outputs of the feed-forward parts are outputs of the model too, to be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH)) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(DEPTH))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.fc1 = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(DEPTH))
        self.fc2 = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for i in range(DEPTH):
            b, t, _ = x.shape
            q, k, v = self.qkv[i](self.norm1[i](x)).reshape(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out[i](y.transpose(1, 2).reshape(b, t, -1))
            outputs[f"tap{i}"] = self.fc2[i](functional.gelu(self.fc1[i](self.norm2[i](x))))
            x = x + outputs[f"tap{i}"]
        return {"hidden": x, **outputs}


def model() -> Layers:
    torch.manual_seed(3)
    made = Layers()
    for weight in made.parameters():
        weight.data = torch.randn_like(weight) * 0.4
    return made.double().eval()


def analysed(module: nn.Module, x: Tensor) -> Program:
    return Pipeline((PropagateAxes(), FindGroups(align=1, floor=0.0))).run(capture(module, (x[:2],)))


def data(count: int = 4, seed: int = 0) -> Calibration:
    x = torch.randn(count, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Calibration((Batch((x,)),), "normal")


def scores(program: Program, criterion: Trajectory, calibration: Calibration, seed: int = 0) -> dict[str, Tensor]:
    found = ScoreGroups(criterion, calibration, seed).run(program).need("scores")
    return {name: s.values for name, s in found.items()}


def group(program: Program, layer: int, kind: Kind = Kind.FFN) -> str:
    names = [g.name for g in program.need("groups") if g.kind is kind and g.prunable]
    stem = {Kind.FFN: f"fc1.{layer}", Kind.HEAD: f"qkv.{layer}"}[kind]
    return next(n for n in names if stem in n)


def taps(outputs: list[Tensor]) -> list[Tensor]:
    return [functional.normalize(o.reshape(-1, WIDTH), dim=1) for o in outputs[1:]]


def exact(program: Program, calibration: Calibration, name: str) -> Tensor:
    """The loss itself, by removing each element of a group: sum over later taps, the last layer its own. [size]"""
    flat = list(calibration.batches[0].args)
    g = program.group_by_name[name]
    layer = int(next(c for c in name if c.isdigit()))
    later = range(min(layer + 1, DEPTH - 1), DEPTH)
    dense, values = taps(masked(program, {}, flat)), []
    for i in range(g.size):
        rest = torch.tensor([j for j in range(g.size) if j != i])
        now = taps(masked(program, {g.axis: rest}, flat))
        values.append(sum(map_change(now[z], dense[z]) for z in later))
    return torch.stack(values)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the loss


def test_vectors_of_the_specification() -> None:
    """methods 11.1"""
    dense, changed = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 2], [3, 0]])
    assert float(map_change(changed, dense)) == pytest.approx(384)
    rows = [functional.normalize(t, dim=1) for t in (changed, dense)]
    assert float(map_change(*rows)) == pytest.approx(0.576, abs=1e-3)
    assert float(map_change(torch.tensor([[0.0, 0], [0, 1]]), torch.eye(2))) == pytest.approx(1)
    assert float(map_change(dense, dense)) == 0


@pytest.mark.parametrize("shape", [(40, 6), (4, 9)])
def test_the_difference_form_is_the_loss(shape: tuple[int, int]) -> None:
    dense = torch.randn(shape, dtype=torch.float64)
    changed = dense + torch.randn(shape, dtype=torch.float64)
    naive = (changed @ changed.T - dense @ dense.T).square().sum()
    s, e = changed + dense, changed - dense
    sums = (((s.T @ s) * (e.T @ e)).sum() + ((e.T @ s) * (e.T @ s).T).sum()) / 2  # methods 0.4.3, as written there
    assert float(map_change(changed, dense)) == pytest.approx(float(naive), rel=1e-9)
    assert float(map_change(changed, dense, dense.T @ dense)) == pytest.approx(float(sums), rel=1e-9)


def test_one_neuron_raw_has_a_closed_form() -> None:
    """methods 0.4.4"""
    f, a, w = (torch.randn(n, dtype=torch.float64) for n in ((30, 5), (30,), (5,)))
    u = f @ w
    s, p, q = w @ w, u @ a, a @ a
    want = 2 * (u @ u) * q + 2 * p**2 + s**2 * q**2 - 4 * s * p * q
    assert float(map_change(f - torch.outer(a, w), f)) == pytest.approx(float(want), rel=1e-9)


def test_small_changes_keep_their_digits_in_fp32() -> None:
    torch.manual_seed(0)
    dense = torch.randn(400, 32)
    changed = dense + 1e-4 * torch.randn(400, 32)
    one, two = changed.double(), dense.double()
    want = float((one @ one.T - two @ two.T).square().sum())
    assert float(map_change(changed, dense)) == pytest.approx(want, rel=1e-5)
    grams = (
        (changed.T @ changed).square().sum() + (dense.T @ dense).square().sum() - 2 * (dense.T @ changed).square().sum()
    )
    assert abs(float(grams) - want) > 0.1 * want  # the identity that this form replaces


@pytest.mark.parametrize("normalised", [True, False])
def test_stages_weigh_alike_however_many_rows_they_have(normalised: bool) -> None:
    """methods 4.2: the same features four times over have sixteen times the map change, and count the same."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 5, 8, generator=generator)
    changed = dense + 0.1 * torch.randn(2, 5, 8, generator=generator)
    measure = Trajectory(normalised=normalised).measure
    tap = Tap("f", "f", False, True, 2)

    def change(copies: int) -> tuple[float, float]:
        a, b = (measure.feature(tap, x.repeat(1, copies, 1), None) for x in (changed, dense))
        return float(map_change(a, b)), measure.change(tap, a, b)

    (raw, one), (whole, four) = change(1), change(4)
    assert whole == pytest.approx(16 * raw, rel=1e-4)
    assert four == pytest.approx(one, rel=1e-4)


# ---------------------------------------------------------------- the probe


def test_the_probe_ranks_like_exact_removal() -> None:
    calibration = data()
    program = analysed(model(), calibration.batches[0].args[0])
    got = scores(program, Trajectory(mode="probe", probes=64, weight=0.0), calibration)
    names = [group(program, i) for i in range(DEPTH)]
    want = {n: exact(program, calibration, n) for n in names}
    assert spearman(torch.cat([got[n] for n in names]), torch.cat([want[n] for n in names])) > 0.9
    heads = [group(program, i, Kind.HEAD) for i in range(DEPTH)]
    want |= {n: exact(program, calibration, n) for n in heads}
    assert spearman(torch.cat([got[n] for n in heads]), torch.cat([want[n] for n in heads])) > 0.6


def test_the_probe_is_the_leading_term_on_average() -> None:
    """Against the definition: 2 || dF F^T ||^2 of a small mask, summed over later layers."""
    calibration = data()
    program = analysed(model(), calibration.batches[0].args[0])
    got = scores(program, Trajectory(mode="probe", probes=250, weight=0.0), calibration)
    net, x = model(), calibration.batches[0].args[0]
    for layer in range(DEPTH):
        later = range(min(layer + 1, DEPTH - 1), DEPTH)
        want = []
        for j in range(HIDDEN):
            rows = []
            for step in (-1e-4, 1e-4, 0.0):
                with torch.no_grad():
                    weight = net.fc2[layer].weight.clone()
                    net.fc2[layer].weight[:, j] *= 1 + step
                    out = net(x)
                    net.fc2[layer].weight.copy_(weight)
                rows.append([functional.normalize(out[f"tap{z}"].reshape(-1, WIDTH), dim=1) for z in later])
            want.append(sum(2 * ((b - a) / 2e-4 @ c.T).square().sum() for a, b, c in zip(*rows, strict=True)))
        assert torch.allclose(got[group(program, layer)], torch.stack(want), rtol=0.4)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["ffn", "norm", "inner"])
def test_the_taps_and_their_owners_are_found(where: str) -> None:
    program = analysed(model(), data().batches[0].args[0])
    taps = find_taps(program, where)
    assert len({t.value for t in taps}) == len(taps) == DEPTH
    seen = views(consumers(program), taps, "later")
    for i in range(DEPTH):
        for kind in (Kind.FFN, Kind.HEAD):
            view = seen[group(program, i, kind)]
            assert view.own == i
            assert view.wanted == (tuple(range(i + 1, DEPTH)) or (i,))
            assert view.masked == (where == "inner" and kind is Kind.FFN)


def test_an_element_does_not_collect_the_tap_of_its_own_layer() -> None:
    """Later layers that ignore the stream: only their own taps could move, and those do not count."""
    net = model()
    with torch.no_grad():
        for i in (1, 2):
            net.fc1[i].weight.zero_()
    program = analysed(net, data().batches[0].args[0])
    for mode in ("probe", "exact"):
        later, whole, own, after = (
            scores(program, Trajectory(mode=mode, weight=0.0, taps=which), data())
            for which in ("later", "from", "own", "next")
        )
        first, last = group(program, 0), group(program, DEPTH - 1)
        assert float(later[first].max()) < 1e-16
        assert float(after[first].max()) < 1e-16
        assert float(whole[first].min()) > 1e-6
        assert torch.allclose(own[first], whole[first])
    program = analysed(model(), data().batches[0].args[0])
    for mode in ("probe", "exact"):
        later, own = (
            scores(program, Trajectory(mode=mode, weight=0.0, taps=which), data()) for which in ("later", "own")
        )
        assert float(later[last].min()) > 1e-6  # with no later tap its own is all there is
        assert torch.allclose(later[last], own[last])


@pytest.mark.parametrize("option", [{}, {"location": "inner"}, {"location": "norm", "taps": "from"}, {"taps": "next"}])
def test_probes_follow_every_ablation(option: dict[str, str]) -> None:
    program = analysed(model(), data().batches[0].args[0])
    probe, truth = (
        scores(program, Trajectory(mode=mode, probes=100, weight=0.0, **option), data())  # type: ignore[arg-type]
        for mode in ("probe", "exact")
    )
    names = [group(program, i) for i in range(DEPTH)]
    assert spearman(*(torch.cat([s[n] for n in names]) for s in (probe, truth))) > 0.8


@pytest.mark.parametrize("mode", ["hybrid", "exact", "probe"])
@pytest.mark.parametrize("normalised", [True, False])
def test_an_element_that_nothing_reads_scores_zero(normalised: bool, mode: str) -> None:
    net = model()
    with torch.no_grad():
        net.fc2[1].weight[:, 4] = 0
        net.out[0].weight[:, 4:8] = 0
    program = analysed(net, data().batches[0].args[0])
    got = scores(program, Trajectory(mode=mode, normalised=normalised), data())
    assert (got[group(program, 1)] == 0).nonzero().flatten().tolist() == [4]
    assert (got[group(program, 0, Kind.HEAD)] == 0).tolist() == [False, True, False]


def test_batches_beyond_the_samples_only_count_for_the_output() -> None:
    program = analysed(model(), data().batches[0].args[0])
    one, more = data(), Calibration((*data(seed=1).batches, *data().batches), "two batches, the second is looked at")
    few = Trajectory(weight=0.0, samples=4, mode="probe")
    a, b = scores(program, few, one), scores(program, few, more)
    assert all(torch.equal(a[n], b[n]) for n in a)
    both = Trajectory(samples=4, mode="probe")
    a, b = scores(program, both, one), scores(program, both, more)
    assert not all(torch.equal(a[n], b[n]) for n in a)


def test_samples_are_drawn_from_all_over_the_data() -> None:
    program = analysed(model(), data().batches[0].args[0])
    each = torch.arange(12.0)[:, None, None].expand(-1, TOKENS, WIDTH) / 100
    batches = [Batch((each + i,)) for i in range(8)]
    seen = Trajectory().select_samples(program, batches)
    assert [b.size for b in seen] == [8, 8, 8, 8]
    assert [round(float(b.args[0].mean())) for b in seen] == [1, 3, 5, 7]
    assert all(len(b.args[0].unique()) == 8 for b in seen), "no sample twice"
    assert [b.size for b in Trajectory(samples=4).select_samples(program, batches)] == [4]
    assert [b.size for b in Trajectory(samples=32).select_samples(program, batches[:2])] == [12, 12], "all there are"

    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x.reshape(2, 5, WIDTH))
            return out

    fixed = capture(Fixed(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH)).eval(), (torch.randn(2, 5, WIDTH),))
    assert fixed.fixed_batch
    assert not program.fixed_batch
    assert [b.size for b in Trajectory(samples=20).select_samples(fixed, batches)] == [12, 12], "whole ones"


def test_padding_is_not_looked_at() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
            self.fc3, self.fc4 = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            x = x + self.fc2(functional.gelu(self.fc1(x)))
            x = x + self.fc4(functional.gelu(self.fc3(x)))
            return {"hidden": x * attention_mask[..., None]}

    x, mask = torch.randn(4, 5, 6), (torch.arange(5) < torch.tensor([[5], [3], [4], [2]])).long()
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(Padded().eval(), (x, mask)))
    other = torch.where(mask[..., None].bool(), x, torch.full_like(x, 9.0))
    got = [scores(program, Trajectory(weight=0.0), Calibration((Batch((v, mask)),), "x")) for v in (x, other)]
    assert all(torch.allclose(got[0][n], got[1][n]) for n in got[0])
    assert all(float(v.max()) > 0 for v in got[0].values())


# ---------------------------------------------------------------- the sum


def test_the_output_weighs_more_beside_mean_maps_than_beside_related_rows() -> None:
    rows = analysed(model(), torch.randn(2, 5, WIDTH, dtype=torch.float64))
    maps = analysed(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4, 3)),
        torch.randn(2, 3, 5, 5),
    )
    assert Trajectory().weight_of(rows) < Trajectory().weight_of(maps)
    assert Trajectory(weight=0.5).weight_of(maps) == 0.5


def test_the_terms_are_balanced_by_their_medians_per_mac() -> None:
    program = analysed(model(), data().batches[0].args[0])
    features, output = Trajectory().parts(program, data(), 0)
    factor = balance(program, features, output, 0.5)
    macs = {g.name: g.macs for g in program.need("groups") if g.prunable}
    one, two = (torch.cat([part[n] / macs[n] for n in macs]) for part in (features, output))
    assert factor == pytest.approx(float(0.5 * one[one > 0].median() / two[two > 0].median()))
    both = combine(features, output, factor)
    thousand = {n: 1000 * v for n, v in output.items()}
    assert all(
        torch.allclose(both[n], combine(features, thousand, balance(program, features, thousand, 0.5))[n]) for n in both
    )
    fixed = scores(program, Trajectory(lambda_mode="fixed", weight=2.0, mode="exact"), data())
    features, output = Trajectory(mode="exact").parts(program, data(), 0)
    assert all(torch.allclose(fixed[n], features[n] + 2 * output[n]) for n in fixed)


def test_without_layers_to_tap_the_output_decides_and_a_note_says_so() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(net, (x[:2],)))
    scored = ScoreGroups("trajectory", Calibration((Batch((x,)),), "normal")).run(program)
    assert any("no layer to tap" in note for note in scored.notes)
    assert all(float(s.values.max()) > 0 for s in scored.need("scores").values())


def test_convolutional_networks_compare_mean_maps() -> None:
    torch.manual_seed(0)
    net = (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
            nn.Linear(4 * 4, 3),
        )
        .double()
        .eval()
    )
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(net, (x[:2],)))
    calibration = Calibration((Batch((x,)),), "normal")
    scored = ScoreGroups(Trajectory(), calibration).run(program)
    assert any("maps that convolutions read" in note for note in scored.notes)
    probe, truth = (
        scores(program, Trajectory(mode=m, probes=400, weight=0.0), calibration) for m in ("probe", "exact")
    )
    first, second = (next(n for n in truth if n.startswith(f"{i}:") or n.startswith(f"{i}.")) for i in (0, 2))
    assert spearman(probe[first], truth[first]) > 0.7
    assert torch.allclose(probe[second], truth[second], rtol=0.4)  # its own map, which a removal moves linearly


# ---------------------------------------------------------------- the hybrid


def test_the_hybrid_has_exact_heads_and_calibrated_neurons() -> None:
    program = analysed(model(), data().batches[0].args[0])
    one, two = (Trajectory(mode=m, check=12).parts(program, data(), 0) for m in ("hybrid", "exact"))
    for part, truth in zip(one, two, strict=True):
        for i in range(DEPTH):
            head = group(program, i, Kind.HEAD)
            assert torch.allclose(part[head], truth[head])
        neurons = torch.cat([part[group(program, i)] / truth[group(program, i)] for i in range(DEPTH)])
        assert 0.5 < float(neurons.median()) < 2


def test_the_rank_correlation_in_the_notes_is_that_of_the_checked_elements() -> None:
    program = analysed(model(), data().batches[0].args[0])
    count = DEPTH * HIDDEN
    criterion = Trajectory(check=count, weight=0.0)
    scored = ScoreGroups(criterion, data()).run(program)
    names = [group(program, i) for i in range(DEPTH)]
    truth = scores(program, Trajectory(mode="exact", weight=0.0), data())
    want = spearman(torch.cat([scored.need("scores")[n].values for n in names]), torch.cat([truth[n] for n in names]))
    assert any(f"on {count} elements: {want:.2f}" in note for note in scored.notes)
    assert any("mode hybrid" in note for note in scored.notes)


def test_refining_changes_only_the_borderline_and_makes_it_exact() -> None:
    program = analysed(model(), data().batches[0].args[0])
    criterion = Trajectory(rescore=4)
    scored = ScoreGroups(criterion, data()).run(program)
    first, second = group(program, 0), group(program, 1)
    before = {n: s.values for n, s in scored.need("scores").items()}
    keep = tuple(sorted(torch.argsort(before[first], descending=True)[:6].tolist()))
    planned = scored.but(plan=CompressionPlan({first: Choice("ffn", HIDDEN, keep)}))
    for chosen in (criterion, Trajectory(rescore=4)):  # one that remembers its balance, and one that must find it again
        after = RefineScores(chosen, data()).run(planned).need("scores")
        assert torch.equal(after[second].values, before[second])
        moved = (after[first].values != before[first]).nonzero().flatten()
        assert moved.tolist() == borderline(before[first], 6, 4).tolist()
        features, output = Trajectory(mode="exact").parts(program, data(), 0)
        factor = balance(program, *criterion.parts(program, data(), 0), criterion.weight_of(program))
        assert torch.allclose(after[first].values[moved], (features[first] + factor * output[first])[moved])
    same = RefineScores("l2").run(planned)
    assert {n: s.values for n, s in same.need("scores").items()} == before


def test_the_borderline_is_around_the_cut() -> None:
    values = torch.tensor([5.0, 1, 4, 2, 3])
    assert borderline(values, 2, 2).tolist() == [2, 4]  # the last that stays and the first that goes
    assert borderline(values, 4, 2).tolist() == [1, 3]
    assert borderline(values, 1, 99).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "option",
    [
        {"mode": "exakt"},
        {"location": "fnn"},
        {"taps": "all"},
        {"reduction": "max"},
        {"lambda_mode": "x"},
        {"samples": 0},
        {"probes": 0},
        {"temperature": 0.0},
        {"weight": -1.0},
        {"rescore": -1},
        {"check": 2},
        {"weight": float("nan")},
    ],
)
def test_options_are_checked(option: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        Trajectory(**option)  # type: ignore[arg-type]


def test_the_seed_decides_and_labels_do_not() -> None:
    program = analysed(model(), data().batches[0].args[0])
    labelled = Calibration(tuple(Batch(b.args, labels=torch.zeros(4, dtype=torch.long)) for b in data().batches), "x")
    one, same, other = (
        scores(program, Trajectory(), data(), 1),
        scores(program, Trajectory(), labelled, 1),
        scores(program, Trajectory(), data(), 2),
    )
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
