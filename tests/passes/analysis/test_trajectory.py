"""Trajectory importance: the distillation loss in every form, the probe against exact removal, and its laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.capture import capture
from fxprune.data import Batch, Calibration
from fxprune.group import Kind
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.consumers import consumers
from fxprune.passes.analysis.importance.trajectory import Trajectory, combine, map_change, owners, tap_nodes
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.pipeline import Pipeline
from fxprune.program import Program
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


def rank_correlation(a: Tensor, b: Tensor) -> float:
    x, y = (t.argsort().argsort().double() for t in (a, b))
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


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
def test_the_difference_form_is_the_loss_and_stays_so_for_small_changes(shape: tuple[int, int]) -> None:
    dense = torch.randn(shape)
    for size in (1.0, 1e-2, 1e-4):
        changed = dense + size * torch.randn(shape)
        one, two = changed.double(), dense.double()
        want = float((one @ one.T - two @ two.T).square().sum())
        assert float(map_change(changed, dense)) == pytest.approx(want, rel=1e-2 if size < 1e-3 else 1e-4)


# ---------------------------------------------------------------- the probe


def test_the_probe_ranks_like_exact_removal() -> None:
    calibration = data()
    program = analysed(model(), calibration.batches[0].args[0])
    got = scores(program, Trajectory(probes=256, weight=0.0), calibration)
    names = [group(program, i) for i in range(DEPTH)]
    want = {n: exact(program, calibration, n) for n in names}
    assert rank_correlation(torch.cat([got[n] for n in names]), torch.cat([want[n] for n in names])) > 0.9
    heads = [group(program, i, Kind.HEAD) for i in range(DEPTH)]
    want |= {n: exact(program, calibration, n) for n in heads}
    assert rank_correlation(torch.cat([got[n] for n in heads]), torch.cat([want[n] for n in heads])) > 0.6


def test_the_probe_is_the_squared_jacobian_on_average() -> None:
    """Against the definition: || d sum-of-maps / dm ||^2 of a small mask, over rows squared."""
    calibration = data()
    program = analysed(model(), calibration.batches[0].args[0])
    got = scores(program, Trajectory(probes=600, weight=0.0), calibration)
    net, x = model(), calibration.batches[0].args[0]
    count = x.shape[0] * TOKENS
    for layer in range(DEPTH):
        later = range(min(layer + 1, DEPTH - 1), DEPTH)
        want = []
        for j in range(HIDDEN):
            maps = []
            for step in (-1e-4, 1e-4):
                with torch.no_grad():
                    weight = net.fc2[layer].weight
                    weight[:, j] *= 1 + step
                    out = net(x)
                    weight[:, j] /= 1 + step
                rows = [functional.normalize(out[f"tap{z}"].reshape(-1, WIDTH), dim=1) for z in later]
                maps.append(torch.stack([r @ r.T for r in rows]))
            want.append(((maps[1] - maps[0]) / 2e-4).square().sum() / count**2)
        assert torch.allclose(got[group(program, layer)], torch.stack(want), rtol=0.4)


def test_the_taps_and_their_owners_are_found() -> None:
    program = analysed(model(), data().batches[0].args[0])
    watched = tap_nodes(program)
    assert len(watched) == DEPTH
    owner = owners(program, consumers(program), watched)
    for i in range(DEPTH):
        assert owner[group(program, i)] == owner[group(program, i, Kind.HEAD)] == i


def test_an_element_does_not_collect_the_tap_of_its_own_layer() -> None:
    """Later layers that ignore the stream: only their own taps could move, and those do not count."""
    net = model()
    with torch.no_grad():
        for i in (1, 2):
            net.fc1[i].weight.zero_()
    program = analysed(net, data().batches[0].args[0])
    later, whole = (scores(program, Trajectory(weight=0.0, taps=which), data()) for which in ("later", "from"))
    own, after = (scores(program, Trajectory(weight=0.0, taps=which), data()) for which in ("own", "next"))
    first, last = group(program, 0), group(program, DEPTH - 1)
    assert float(later[first].max()) < 1e-20
    assert float(after[first].max()) < 1e-20
    assert float(whole[first].min()) > 1e-6
    assert torch.allclose(own[first], whole[first])
    program = analysed(model(), data().batches[0].args[0])
    later, own = (scores(program, Trajectory(weight=0.0, taps=which), data()) for which in ("later", "own"))
    assert float(later[last].min()) > 1e-6  # with no later tap its own is all there is
    assert torch.allclose(later[last], own[last])


@pytest.mark.parametrize("normalised", [True, False])
def test_an_element_that_nothing_reads_scores_zero(normalised: bool) -> None:
    net = model()
    with torch.no_grad():
        net.fc2[1].weight[:, 4] = 0
        net.out[0].weight[:, 4:8] = 0
    program = analysed(net, data().batches[0].args[0])
    got = scores(program, Trajectory(normalised=normalised), data())
    assert (got[group(program, 1)] == 0).nonzero().flatten().tolist() == [4]
    assert (got[group(program, 0, Kind.HEAD)] == 0).tolist() == [False, True, False]


def test_batches_beyond_the_samples_only_count_for_the_output() -> None:
    program = analysed(model(), data().batches[0].args[0])
    one, more = data(), Calibration((*data().batches, *data(seed=1).batches), "two batches")
    few = Trajectory(weight=0.0, samples=4)
    a, b = scores(program, few, one), scores(program, few, more)
    assert all(torch.equal(a[n], b[n]) for n in a)
    both = Trajectory(samples=4)
    a, b = scores(program, both, one), scores(program, both, more)
    assert not all(torch.equal(a[n], b[n]) for n in a)


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


def test_the_terms_are_balanced_by_their_medians_per_mac() -> None:
    program = analysed(model(), data().batches[0].args[0])
    features, output = Trajectory().parts(program, data(), 0)
    both = combine(program, features, output, 0.5)
    macs = {g.name: g.macs for g in program.need("groups") if g.prunable}
    one, two = (torch.cat([part[n] / macs[n] for n in macs]) for part in (features, output))
    factor = 0.5 * one[one > 0].median() / two[two > 0].median()
    assert all(torch.allclose(both[n], features[n] + factor * output[n]) for n in both)
    thousand = combine(program, features, {n: 1000 * v for n, v in output.items()}, 0.5)
    assert all(torch.allclose(both[n], thousand[n]) for n in both)
    assert combine(program, features, output, 0.0).keys() == features.keys()


def test_without_feed_forward_layers_the_output_decides_and_a_note_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)).eval()
    x = torch.randn(4, 3, 8, 8)
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(net, (x[:2],)))
    scored = ScoreGroups("trajectory", Calibration((Batch((x,)),), "normal")).run(program)
    assert any("no feed-forward layer" in note for note in scored.notes)
    assert all(float(s.values.max()) > 0 for s in scored.need("scores").values())


def test_the_seed_decides_and_labels_do_not() -> None:
    program = analysed(model(), data().batches[0].args[0])
    labelled = Calibration(tuple(Batch(b.args, labels=torch.zeros(4, dtype=torch.long)) for b in data().batches), "x")
    one, same, other = scores(program, Trajectory(), data(), 1), scores(program, Trajectory(), labelled, 1), \
        scores(program, Trajectory(), data(), 2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
