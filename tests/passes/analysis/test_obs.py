"""Structured OBS: the order of removal, the damage curves, and the scores that come from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.data.batch import Batch, Calibration
from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.curves import fill, slopes, some
from fxprune.passes.analysis.importance.damage import Change, Damage
from fxprune.passes.analysis.importance.obs import Obs
from fxprune.passes.analysis.importance.readers import gather, readers
from fxprune.passes.analysis.importance.removal import Layer, removal
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.rank_within import RankWithin, order_within
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.testing import masked, run_flat


def moments(k: int, seed: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x.T @ x / rows


# ------------------------------------------------------------ the order of removal


def test_the_hand_example() -> None:
    """methods 11.8: the second column alone costs 4^2 / (2/3) = 24, the first 3^2 / (2/3) = 13.5: it goes first."""
    g, w = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    order, added = removal([Layer(g, w, torch.tensor([0, 1]))], 2, 1e-12)
    assert order == [0, 1]
    assert added[0] == pytest.approx(13.5, rel=1e-6)
    assert sum(added) == pytest.approx(float((w @ g @ w.T).sum()), rel=1e-6), "all gone: the whole output is the error"


@pytest.mark.parametrize("width", [1, 3])
def test_increments_add_up_to_the_least_squares_error(width: int) -> None:
    size, out = 8, 5
    x, g = moments(size * width, 0)
    w = torch.randn(out, size * width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = torch.arange(size).repeat_interleave(width)
    order, added = removal([Layer(g, w, unit)], size, 1e-12)
    for gone in (1, 3, 6):
        stay = ~torch.isin(unit, torch.tensor(order[:gone]))
        target = x @ w.T
        best = torch.linalg.lstsq(x[:, stay], target).solution
        error = float((target - x[:, stay] @ best).square().sum()) / len(x)
        assert sum(added[:gone]) == pytest.approx(error, rel=1e-6)
    assert min(added) >= 0


def test_a_copy_goes_before_what_nothing_replaces() -> None:
    x, _ = moments(4, 0)
    x = torch.cat([x, 2 * x[:, :1]], 1)  # the last says what the first says
    w = torch.ones(3, 5, dtype=torch.float64)
    order, added = removal([Layer(x.T @ x / len(x), w, torch.arange(5))], 5, 1e-9)
    assert order[0] in (0, 4)
    assert added[0] < 1e-6 < added[1]


def test_an_unread_element_is_free_and_layers_count_together() -> None:
    _, g = moments(6, 0)
    w = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w[:, 2] = 0
    order, added = removal([Layer(g, w, torch.arange(6))], 6, 1e-9)
    assert order[0] == 2
    assert added[0] == pytest.approx(0, abs=1e-12)
    other = torch.zeros(4, 6, dtype=torch.float64)
    other[:, 2] = 10
    order, _ = removal([Layer(g, w, torch.arange(6)), Layer(g, other, torch.arange(6))], 6, 1e-9)
    assert order[-1] == 2


def test_many_elements_go_several_at_a_time_and_all_go_once() -> None:
    _, g = moments(300, 0, 400)
    w = torch.randn(8, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order, added = removal([Layer(g, w, torch.arange(300))], 300, 1e-2)
    assert sorted(order) == list(range(300))
    single = w.square().sum(0) / torch.linalg.inv(g + 1e-2 * g.diagonal().mean() * torch.eye(300)).diagonal()
    assert order[0] == int(single.argmin())
    assert min(added) >= 0


# ------------------------------------------------------------ curves and scores


def test_slopes_follow_the_hull_and_ignore_noise() -> None:
    order = [3, 1, 0, 2]
    values = slopes(order, [(0, 10.0), (1, 4.0), (2, 4.5), (4, 0.0)])
    assert values[2] == 6.0, "the last to go is the best"
    assert values.sum() == pytest.approx(10.0)
    assert torch.equal(values[torch.tensor(order)].sort().values, values[torch.tensor(order)])


def test_a_filled_curve_never_falls_and_passes_through_the_points() -> None:
    curve = fill([(0, 3.0), (2, 1.0), (3, 1.5), (5, 0.0)], 5)
    assert curve.tolist() == pytest.approx([0, 1, 2, 2, 2.5, 3])


def test_counts_are_spread_with_both_ends() -> None:
    assert some(range(1, 5), 8) == [1, 2, 3, 4]
    chosen = some(range(8, 1024, 8), 6)
    assert chosen[0] == 8
    assert chosen[-1] == 1016
    assert len(chosen) == 6


# ------------------------------------------------------------ on graphs


class Block(nn.Module):
    def __init__(self, width: int = 12, hidden: int = 24) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 12), nn.Sequential(Block(), Block()), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean(1))
        return out


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3)))
        return out


def prepared(model: nn.Module, *shape: int) -> tuple[Program, Calibration]:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    batches = tuple(Batch((torch.randn(8, *shape),)) for _ in range(3))
    program = capture(model.eval(), batches[0].args, {}, name="net")
    return Pipeline((PropagateAxes(), FindGroups(align=1))).run(program), Calibration(batches, "random")


@pytest.fixture(scope="module")
def net() -> tuple[Program, Calibration]:
    return prepared(Net(), 5, 6)


def ffn(program: Program) -> list[str]:
    return [g.name for g in program.need("groups") if g.kind is Kind.FFN]


def test_damage_equals_a_whole_masked_run(net: tuple[Program, Calibration]) -> None:
    program, data = net
    group = program.group_by_name[ffn(program)[0]]
    keep = torch.arange(group.size) % 3 > 0
    found = Damage(program, data.batches).of([Change(group, keep), Change(group, torch.ones_like(keep))])
    assert found[1] == 0.0, "nothing changed"
    total, count = 0.0, 0
    for batch in data.batches:
        flat = program.flatten(batch.args)
        dense = run_flat(program, flat)[0].double().log_softmax(-1)
        now = masked(program, {group.axis: torch.nonzero(keep)[:, 0]}, flat)[0].double().log_softmax(-1)
        total, count = total + float((dense.exp() * (dense - now)).sum()), count + len(dense)
    assert found[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("damage", ["measured", "local"])
def test_scores_of_a_transformer_block_meet_a_budget(net: tuple[Program, Calibration], damage: str) -> None:
    program, data = net
    scored = ScoreGroups(Obs(damage=damage), data).run(program)
    for name in ffn(program):
        scores = scored.need("scores")[name]
        assert scores.comparable
        assert scores.curve is not None
        assert scores.curve[-1] > 0
    plan = SearchPlan(Budget("flops", 0.6)).run(scored).need("plan")
    assert plan.choices


def test_a_reader_solved_for_does_less_damage_than_masking(net: tuple[Program, Calibration]) -> None:
    program, data = net
    name = ffn(program)[0]
    group = program.group_by_name[name]
    found = [r for r in readers(program)[0] if r.group is group]
    inputs = gather(program, found, data.batches)
    order = Obs()._order(program, group, found, inputs)[0]
    judge = Damage(program, data.batches)
    curve = dict(Obs()._measure(program, group, order, found, inputs, judge))
    count = sorted(curve)[len(curve) // 2]
    keep = torch.zeros(group.size, dtype=torch.bool)
    keep[torch.tensor(order[group.size - count :])] = True
    assert curve[count] < judge.of([Change(group, keep)])[0]


def test_convolutions_are_read_by_their_unfolded_inputs() -> None:
    program, data = prepared(ConvNet(), 3, 9, 9)
    found, left = readers(program)
    assert left == {}
    conv = next(r for r in found if r.form == "conv")
    assert len(conv.unit) == 8 * 9
    assert conv.unit.tolist() == [i for i in range(8) for _ in range(9)]
    inputs = gather(program, found, data.batches)[conv.node]
    flat = program.flatten(data.batches[0].args)
    assert inputs.g.shape == (72, 72)
    assert torch.linalg.eigvalsh(inputs.g)[0] > -1e-9
    scores = Obs(levels=3).scores(program, data, 0)
    assert set(scores) == {g.name for g in program.need("groups") if g.prunable}
    assert len(flat) == 1


def test_scores_do_not_depend_on_the_batching(net: tuple[Program, Calibration]) -> None:
    program, data = net
    whole = Calibration((Batch((torch.cat([b.args[0] for b in data.batches]),)),), "random")
    one, two = Obs().scores(program, data, 0), Obs().scores(program, whole, 0)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-7)


def test_ranking_within_leaves_the_counts_alone(net: tuple[Program, Calibration]) -> None:
    program, data = net
    scored = ScoreGroups("fisher", data).run(program)
    ranked = RankWithin(data=data).run(scored)
    budget = Budget("flops", 0.6)
    before, after = (SearchPlan(budget).run(p).need("plan").choices for p in (scored, ranked))
    assert {k: len(c.keep) for k, c in before.items()} == {k: len(c.keep) for k, c in after.items()}
    assert any(before[k].keep != after[k].keep for k in before)
    name = ffn(program)[0]
    same = order_within(scored.need("scores")[name], torch.argsort(scored.need("scores")[name].values, descending=True))
    assert same.curve is not None
    assert same.curve[-1] == pytest.approx(float(same.values.sum()))


def test_the_order_within_is_found_once_per_graph(
    net: tuple[Program, Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, data = net
    one, many = RankWithin(data=data), ScoreGroups("fisher", data).run(program)
    first = one.run(many).need("scores")
    monkeypatch.setattr(Obs, "ranks", lambda *_: pytest.fail("ranked again"))
    other = one.run(ScoreGroups("fisher{probes=2}", data, seed=1).run(program)).need("scores")
    assert all(torch.equal(first[n].order, other[n].order) for n in ffn(program))
    with pytest.raises(pytest.fail.Exception, match="ranked again"):
        one.run(ScoreGroups("fisher", data).run(prepared(Net(), 5, 6)[0]))


def test_ranking_within_needs_data_and_options_are_checked(net: tuple[Program, Calibration]) -> None:
    with pytest.raises(OptionError, match="needs data"):
        RankWithin().run(ScoreGroups("l2").run(net[0]))
    with pytest.raises(OptionError, match="unknown damage"):
        Obs(damage="guessed")
    with pytest.raises(OptionError, match="must be positive"):
        Obs(levels=0)
