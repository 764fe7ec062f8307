"""SearchPlan on real programs: budgets held, plans that say only what is cut, and errors that tell what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.errors import BudgetInfeasible, NothingToPrune, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.axis import Axis
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan

torch.set_num_threads(1)


class Transformer(nn.Module):
    """Blocks whose heads and neurons cost the same everywhere."""

    def __init__(self, depth: int = 3, heads: int = 4, dim: int = 4, hidden: int = 48) -> None:
        super().__init__()
        width = heads * dim
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.fc1 = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.fc2 = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        for qkv, proj, norm, fc1, fc2 in zip(self.qkv, self.proj, self.norm, self.fc1, self.fc2, strict=True):
            q, k, v = qkv(norm(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + proj(y.transpose(1, 2).reshape(b, t, width))
            x = x + fc2(functional.gelu(fc1(x)))
        return x


class Chain(nn.Module):
    """Convolutions in a row, as in VGG: costs are products of neighbouring widths."""

    def __init__(self, widths: Sequence[int] = (8, 16, 16, 32, 32)) -> None:
        super().__init__()
        before = [3, *widths]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(before, widths, strict=False))
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = functional.silu(conv(x))
            if i % 2:
                x = functional.avg_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def scored(model: nn.Module, x: Tensor, criterion: str = "l2", seed: int = 0, **options: Any) -> Program:
    find = FindGroups(**{"align": 4, **options})
    return Pipeline((PropagateAxes(), find, ScoreGroups(criterion, seed=seed))).run(capture(model.eval(), (x,)))


def plan_of(program: Program, ratio: float, metric: str = "flops", **options: Any) -> CompressionPlan:
    done = Pipeline((SearchPlan(Budget(metric, ratio), **options),), start=("axes", "groups", "scores")).run(program)
    plan: CompressionPlan = done.need("plan")
    return plan


def spent(program: Program, plan: CompressionPlan, metric: str = "flops") -> int:
    return CostModel(program)({g.axis: len(plan.kept(g)) for g in program.need("groups")}).metric(metric)


def kept_ratios(program: Program, plan: CompressionPlan, *kinds: Kind) -> list[float]:
    return [len(plan.kept(g)) / g.size for g in program.need("groups") if g.prunable and g.kind in kinds]


def smallest_step(program: Program, plan: CompressionPlan, metric: str, group: PruneGroup) -> int:
    """Cost of one aligned element more of ``group``."""
    counts = {g.axis: len(plan.kept(g)) for g in program.need("groups")}
    levels = group.levels()
    at = levels.index(counts[group.axis])
    return 0 if at + 1 == len(levels) else CostModel(program).ledger(metric, counts).change(group.axis, levels[at + 1])


@pytest.fixture(scope="module")
def transformer() -> Program:
    torch.manual_seed(0)
    return scored(Transformer(), torch.randn(2, 9, 16))


@pytest.fixture(scope="module")
def chain() -> Program:
    torch.manual_seed(0)
    return scored(Chain(), torch.randn(2, 3, 16, 16))


@pytest.mark.drawn(3)
@pytest.mark.parametrize("which", ["transformer", "chain"])
@pytest.mark.parametrize("metric", ["flops", "params", "bytes"])
def test_cost_is_held_met_and_monotone(which: str, metric: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(which)
    dense, costs = spent(program, CompressionPlan(), metric), []
    for ratio in (0.35, 0.5, 0.501, 0.6, 0.75, 0.9, 1.0):
        plan = plan_of(program, ratio, metric)
        costs.append(spent(program, plan, metric))
        assert costs[-1] <= ratio * dense
        steps = [
            smallest_step(program, plan, metric, g)
            for g in program.need("groups")
            if g.prunable and g.kind in (Kind.HEAD, Kind.FFN, Kind.CHANNEL)
        ]
        room = ratio * dense - costs[-1]
        assert room <= 0.02 * dense or room < min(filter(None, steps))
        assert plan.about["predicted"][metric] == costs[-1]
        assert plan.about["dense"][metric] == dense
    assert costs == sorted(costs)


def test_auto_scans_transformers_and_thresholds_the_rest(transformer: Program, chain: Program) -> None:
    assert plan_of(transformer, 0.5).about["method"] == "two-class"
    assert plan_of(chain, 0.5).about["method"] == "lagrangian"
    # with the head width in play, heads and widths multiply
    assert plan_of(transformer, 0.5, kinds=tuple(Kind)).about["method"] == "lagrangian"


def curved(program: Program, flat: float = 0.5) -> Program:
    """Comparable scores with curves: the first ``flat`` share of a group's elements is worth nothing by itself."""
    scores = {}
    for i, group in enumerate(g for g in program.need("groups") if g.prunable):
        steps = torch.linspace(0, 1, group.size + 1, dtype=torch.float64)
        scores[group.name] = ImportanceScores(
            group.name, torch.ones(group.size), "toy", "nats", True, curve=(1 + i) * (steps - flat).clamp(min=0.0)
        )
    return program.but(scores=scores)


def test_auto_follows_the_form_of_the_values(transformer: Program, chain: Program) -> None:
    assert plan_of(curved(transformer, 0.0), 0.5).about["method"] == "two-class"
    plan = plan_of(curved(transformer), 0.5)
    assert plan.about["method"] == "dynamic"
    assert spent(transformer, plan) <= 0.5 * spent(transformer, CompressionPlan())
    # one element costs what the others are: no programme over its costs
    assert plan_of(curved(chain), 0.5).about["method"] == "lagrangian on the concave envelope of the values"
    with pytest.raises(OptionError, match=r"(?s)dynamic programme does not fit.*flops of its groups multiply"):
        plan_of(chain, 0.5, method="dynamic")
    with pytest.raises(OptionError, match=r"(?s)two-class.*not concave"):
        plan_of(curved(transformer), 0.5, method="two-class")


def test_a_curve_empties_groups_rather_than_cutting_all_of_them(transformer: Program) -> None:
    """Where the first half of a group is worth nothing, all of it goes or hardly any: one group at most is between."""
    kept = kept_ratios(transformer, plan_of(curved(transformer), 0.5), Kind.HEAD, Kind.FFN)
    assert sum(0.25 < share < 1.0 for share in kept) <= 1
    assert sum(share == 1.0 for share in kept) >= 1


def test_head_scale_moves_the_split_and_is_recorded(transformer: Program) -> None:
    scores = {}
    for group in (g for g in transformer.need("groups") if g.prunable):
        values = torch.arange(1, group.size + 1).double() * group.macs
        scores[group.name] = ImportanceScores(group.name, values, "toy", "nats", True)
    program = transformer.but(scores=scores)
    plans = [plan_of(program, 0.5, head_scale=scale) for scale in (0.05, 1.0, 20.0)]
    heads, neurons = ([sum(kept_ratios(program, plan, kind)) for plan in plans] for kind in (Kind.HEAD, Kind.FFN))
    assert heads == sorted(heads)
    assert heads[0] < heads[-1]
    assert neurons == sorted(neurons, reverse=True)
    assert [plan.about["head_scale"] for plan in plans] == [0.05, 1.0, 20.0]
    assert plan_of(program, 0.5).choices == plans[1].choices


def test_head_scale_is_positive_and_for_comparable_scores_only(transformer: Program, chain: Program) -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="must be positive"):
            SearchPlan(Budget("flops", 0.5), head_scale=scale)
    with pytest.raises(OptionError, match=r"(?s)'l2' only ranks elements within their group.*importance=.fisher"):
        plan_of(transformer, 0.5, head_scale=2.0)
    assert plan_of(chain, 0.5, head_scale=2.0).choices == plan_of(chain, 0.5).choices  # there are no heads to weigh


def test_ratio_one_and_generous_amounts_give_the_empty_plan(transformer: Program) -> None:
    for budget in (Budget("flops", 1.0), Budget("params", 1e12, relative=False)):
        plan = SearchPlan(budget).run(transformer).need("plan")
        assert plan.empty
        assert not plan.choices
        assert plan.about["predicted"] == plan.about["dense"]


def test_the_plan_names_only_what_it_cuts_and_says_how_it_was_made(transformer: Program) -> None:
    plan = plan_of(transformer, 0.97)
    assert plan.choices
    assert all(len(c.keep) < c.size for c in plan.choices.values())
    about = plan.about
    assert (about["criterion"], about["unit"], about["seed"]) == ("l2", "weight norm", 0)
    assert (about["budget"], about["kinds"]) == ("flops=0.97", ["head", "kv", "ffn", "channel"])
    assert CompressionPlan.from_json(plan.to_json()) == plan


def test_the_same_scores_give_the_same_plan(chain: Program) -> None:
    assert plan_of(chain, 0.4) == plan_of(chain, 0.4)


def test_counts_are_aligned_and_above_the_floor(chain: Program) -> None:
    plan = plan_of(chain, 0.3)
    for group in chain.need("groups"):
        count = len(plan.kept(group))
        assert count in (group.size, *range(group.granularity, group.size, group.granularity))
        assert count >= group.floor


def test_the_best_elements_stay(chain: Program) -> None:
    plan = plan_of(chain, 0.5)
    for name, choice in plan.choices.items():
        values = chain.need("scores")[name].values
        gone = [i for i in range(choice.size) if i not in choice.keep]
        assert values[list(choice.keep)].min() >= values[gone].max()


@pytest.mark.drawn(3)
@pytest.mark.parametrize("criterion", ["l2", "l1", "random"])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.3])
def test_no_layer_collapses(criterion: str, ratio: float) -> None:
    """Pain 17. Without floors beyond one element, every layer keeps a sane share of what all of them keep."""
    torch.manual_seed(1)
    program = scored(Chain((16, 16, 32, 32, 64)), torch.randn(2, 3, 16, 16), criterion, align=1, floor=0.0)
    with torch.no_grad():
        kept = kept_ratios(program, plan_of(program, ratio), Kind.CHANNEL, Kind.FFN)
    assert len(kept) == 5
    assert min(kept) > 0.4 * ratio**0.5
    program = scored(Transformer(heads=8, dim=2), torch.randn(2, 9, 16), criterion, align=1, floor=0.0)
    for kind in (Kind.HEAD, Kind.FFN):
        assert min(kept_ratios(program, plan_of(program, ratio), kind)) > 0.25 * ratio


def test_comparable_scores_decide_across_groups(transformer: Program) -> None:
    """Losses in nats: a block whose elements cost no loss goes first; its neurons only fill what heads leave over."""
    scores = {}
    for i, group in enumerate(g for g in transformer.need("groups") if g.prunable):
        size = 0.0 if "fc1.1" in group.name else 1.0 + i
        scores[group.name] = ImportanceScores(group.name, torch.full((group.size,), size), "toy", "nats", True)
    program = transformer.but(scores=scores)
    plan = plan_of(program, 0.8)
    kept = {g.name: len(plan.kept(g)) / g.size for g in transformer.need("groups") if g.kind is Kind.FFN}
    assert [kept[f"fc1.{i}:ffn"] < 0.4 for i in range(3)] == [False, True, False]


def test_empty_branches_when_allowed() -> None:
    torch.manual_seed(0)
    program = scored(Transformer(), torch.randn(2, 9, 16), allow_empty=True)
    dense = spent(program, CompressionPlan())
    plan = plan_of(program, 0.02)
    assert any(not choice.keep for choice in plan.choices.values())
    assert spent(program, plan) <= 0.02 * dense


# ---------------------------------------------------------------- budgets out of reach


def lowest(program: Program) -> dict[Axis, int]:
    """What stays of heads and neurons where floors that nobody asked for give way."""
    chosen = [g for g in program.need("groups") if g.prunable and g.kind in (Kind.HEAD, Kind.FFN)]
    return {g.axis: g.floor if g.least is None else g.least for g in chosen}


def test_infeasible_says_what_is_reachable_what_keeps_it_and_what_helps(transformer: Program) -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        plan_of(transformer, 0.05)
    text = str(caught.value)
    dense = spent(transformer, CompressionPlan())
    least = CostModel(transformer)(lowest(transformer)).flops / dense
    assert f"reachable {least:.2f}..1.00 of the dense flops" in text
    assert "asked 0.05" in text
    assert "floors and alignment keep" in text
    assert "allow_empty=True" in text
    assert "align=1" in text
    assert 'prune="head,ffn,qkv"' in text
    # the budget it advises works
    advised = float(text.rsplit("a budget of at least ", 1)[1])
    assert spent(transformer, plan_of(transformer, advised)) <= advised * dense


def test_infeasible_names_the_frozen_groups_with_the_largest_share() -> None:
    torch.manual_seed(0)
    program = scored(Transformer(), torch.randn(2, 9, 16), freeze=("fc1.*",))
    with pytest.raises(BudgetInfeasible, match=r"of that, 0\.18 through the frozen fc1\.0:ffn: asked to freeze"):
        plan_of(program, 0.3)
    with pytest.raises(BudgetInfeasible, match=r"of that, 0\.\d+ through the frozen fc1\.0:ffn: asked to freeze"):
        plan_of(program, 0.3, "params")


class Placed(nn.Module):
    """Learned positions in front: a token axis that a parameter carries, and that reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.inside = nn.Parameter(torch.randn(9, 16)), Transformer()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x + self.positions)


@pytest.mark.parametrize("metric", ["flops", "params"])
def test_infeasible_says_first_which_kind_was_not_chosen(metric: str) -> None:
    """The residual stream passes every layer, yet what stands in the way is that the neurons were not asked for."""
    torch.manual_seed(0)
    program = scored(Placed(), torch.randn(2, 9, 16))
    with pytest.raises(BudgetInfeasible) as caught:
        plan_of(program, 0.2, metric, kinds=("head",))
    first, *more = [line.strip() for line in str(caught.value).splitlines() if "of that" in line]
    assert first.endswith("through groups of kind ffn, which was not chosen")
    assert float(first.split()[2]) > 0.5
    assert all("inside.fc" not in line and "positions" not in line for line in more)
    assert all(float(line.split()[2]) < 0.1 for line in more)  # the stream's own part: norms and biases


class Queried(nn.Module):
    """Learned queries: their axis is in nearly every product, and frozen because they are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.inlet = nn.Parameter(torch.randn(9, 16)), nn.Linear(24, 16)
        mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.inside = nn.Sequential(*mlp, nn.Softmax(-1), nn.Linear(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.queries + self.inlet(x)[:, None])


def test_infeasible_does_not_blame_an_axis_that_is_in_every_product() -> None:
    torch.manual_seed(0)
    program = scored(Queried(), torch.randn(2, 24))
    assert any(g.name.startswith("queries") and g.frozen.startswith("graph output") for g in program.need("groups"))
    with pytest.raises(BudgetInfeasible, match=r"through the frozen inside\.4:other: graph output") as caught:
        plan_of(program, 0.05)
    assert "queries" not in str(caught.value)


def test_infeasible_tells_close_numbers_apart(transformer: Program) -> None:
    least = float(CostModel(transformer)(lowest(transformer)).flops)
    dense = spent(transformer, CompressionPlan())
    with pytest.raises(BudgetInfeasible) as caught:
        SearchPlan(Budget("flops", least - 1, relative=False)).run(transformer)
    said = str(caught.value).split("reachable ")[1]
    reach, asked = said.split("..")[0], said.split("asked ")[1].split()[0]
    assert float(asked) < float(reach)
    assert float(reach) == pytest.approx(least / dense, abs=1e-4)


def test_infeasible_names_the_language_head() -> None:
    """The vocabulary has no kind of its own, and keeps most of what stays in a small language model."""
    torch.manual_seed(0)
    program = scored(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Softmax(-1), nn.Linear(8, 500)),
        torch.randn(2, 8),
    )
    with pytest.raises(BudgetInfeasible, match=r"of that, 0\.\d+ through the frozen 4:other: graph output") as caught:
        plan_of(program, 0.1)
    assert "of that, 0.00" not in str(caught.value)


def test_nothing_to_prune_names_the_reasons() -> None:
    program = scored(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(NothingToPrune, match=r"graph input.*graph output|graph output.*graph input"):
        plan_of(program, 0.5)


def test_wanted_kinds_that_are_not_there(chain: Program) -> None:
    with pytest.raises(NothingToPrune, match=r"(?s)wanted head.*prunable groups of kind .*prune="):
        plan_of(chain, 0.5, kinds=("head",))


def test_unknown_names_get_the_nearest(chain: Program) -> None:
    with pytest.raises(OptionError, match="did you mean 'lagrangian'"):
        plan_of(chain, 0.5, method="lagrange")
    with pytest.raises(OptionError, match="did you mean 'head'"):
        plan_of(chain, 0.5, kinds=("heads",))
    with pytest.raises(OptionError, match="does not fit"):
        plan_of(chain, 0.5, method="two-class")
