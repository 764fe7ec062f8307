"""Rearrangement: the vector of the methods, never worse, counts kept, and the gradients it needs."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_importance import Block, analysed, by_kind, calibration, finite_difference, scrambled
from torch import Tensor
from torch.nn import functional

from fxprune.errors import OptionError
from fxprune.ir.cost import Budget
from fxprune.ir.group import Kind
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.importance.fisher import Fisher
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search import rearrange
from fxprune.passes.search.rearrange import Rearrange, exchange_members
from fxprune.passes.search.search_plan import SearchPlan

torch.set_num_threads(1)
VECTOR = torch.tensor([[1.0, -1.0, 0.0, 0.95], [0.0, 0.1, 0.9, 0.0]])


def objective(gradients: Tensor, pruned: list[int]) -> float:
    return float(gradients.double()[:, pruned].sum(1).square().sum())


def diagonal(gradients: Tensor, count: int) -> list[int]:
    return sorted(torch.argsort(gradients.double().square().sum(0), stable=True)[:count].tolist())


def reference(gradients: Tensor, count: int) -> list[int]:
    """One round as the paper words it, every sum from scratch; a newcomer that ties leaves again."""
    order = torch.argsort(gradients.double().square().sum(0), stable=True).tolist()
    inside = order[:count]
    for new in order[count:]:
        tries = [[u for u in [*inside, new] if u != gone] for gone in [new, *inside]]
        inside = min(tries, key=lambda p: round(objective(gradients, p), 9))
    return sorted(inside)


def test_methods_vector_11_6() -> None:
    assert diagonal(VECTOR, 2) == [2, 3]
    assert exchange_members(VECTOR, [2, 3]) == [1, 3]
    best = min(itertools.combinations(range(4), 2), key=lambda p: objective(VECTOR, list(p)))
    assert best == (0, 1)  # greedy need not be optimal
    assert exchange_members(VECTOR, [2, 3], rounds=2) == [0, 1]


@pytest.mark.parametrize("whole", [4096, 0])
def test_it_is_the_greedy_of_the_paper(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running sums and products give what adding up everything anew gives, with all products held or none."""
    monkeypatch.setattr(rearrange, "WHOLE", whole)
    generator = torch.Generator().manual_seed(0)
    for size, rows in ((5, 2), (12, 4), (20, 30)):
        for count in (1, size // 2, size - 1):
            g = torch.randn(rows, size, generator=generator)
            assert exchange_members(g, diagonal(g, count)) == reference(g, count)


def test_counts_stay_and_the_objective_never_grows() -> None:
    generator = torch.Generator().manual_seed(1)
    for size, rows in ((4, 1), (9, 3), (40, 16)):
        for count in range(1, size):
            g = torch.randn(rows, size, generator=generator)
            g[:, 0] = 0  # a dead element
            start = torch.randperm(size, generator=generator)[:count].tolist()
            found = [sorted(start), exchange_members(g, start), exchange_members(g, start, rounds=5)]
            assert all(len(set(p)) == count and p == sorted(p) for p in found)
            sums = [objective(g, p) for p in found]
            assert sums == sorted(sums, reverse=True)
            assert sums[1] <= objective(g, diagonal(g, count)) + 1e-12
            assert exchange_members(g, start) == found[1]


def test_an_element_and_its_opposite_go_together() -> None:
    g = torch.tensor([[1.0, -1.2, 1.1]])
    assert diagonal(g, 2) == [0, 2]
    assert exchange_members(g, [0, 2]) == [1, 2]


def test_the_order_of_the_elements_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(6, 15, generator=generator)
    moved = torch.randperm(15, generator=generator)
    found = exchange_members(g[:, moved], diagonal(g[:, moved], 7))
    assert sorted(moved[found].tolist()) == exchange_members(g, diagonal(g, 7))


# ---------------------------------------------------------------- the pass


@pytest.fixture(scope="module")
def planned() -> tuple[Block, Program, Tensor, Tensor]:
    model = scrambled(Block(hidden=24))
    torch.manual_seed(3)
    x, labels = torch.randn(6, 7, 12, dtype=torch.float64), torch.randint(0, 4, (6,))
    score = ScoreGroups(Fisher(), calibration(x, labels, (2, 4)))
    passes = (FindGroups(align=2), score, SearchPlan(Budget("flops", 0.7)))
    return model, Pipeline(passes, start=("axes", "groups")).run(analysed(model, x[:2])), x, labels


def test_gradients_are_those_of_the_mask(planned: tuple[Block, Program, Tensor, Tensor]) -> None:
    model, program, x, labels = planned
    with torch.no_grad():
        expected = finite_difference(
            lambda m: functional.cross_entropy(model(x, neurons=m), labels, reduction="none"), 24
        )
    scores = program.need("scores")[by_kind(program, Kind.FFN).name]
    assert scores.gradients.dtype == torch.float32
    assert torch.allclose(scores.gradients.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(0.5 * scores.gradients.double().square().mean(0), scores.values, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
def test_rows_are_bounded_by_sums_of_runs(planned: tuple[Block, Program, Tensor, Tensor], rows: int) -> None:
    _, program, x, labels = planned
    for sizes in (None, (2, 4), (1,) * 6):
        bare = program.but(scores=None, plan=None)
        few = ScoreGroups(Fisher(rows=rows), calibration(x, labels, sizes)).run(bare).need("scores")
        for name, scores in program.need("scores").items():
            assert len(few[name].gradients) <= rows
            assert torch.allclose(few[name].gradients.sum(0), scores.gradients.sum(0), atol=1e-5)
            assert torch.allclose(few[name].values, scores.values)


def test_the_pass_keeps_counts_and_says_what_it_gained(planned: tuple[Block, Program, Tensor, Tensor]) -> None:
    _, program, _, _ = planned
    done = Pipeline((Rearrange(rounds=3),), start=("groups", "scores", "plan")).run(program)
    old, new = program.need("plan"), done.need("plan")
    assert old.choices.keys() == new.choices.keys()
    assert any(old.choices[name] != new.choices[name] for name in old.choices)
    sums = {}
    for which, plan in (("before", old), ("after", new)):
        plan.check(program.group_by_name)
        sums[which] = sum(
            objective(program.need("scores")[name].gradients, sorted(set(range(c.size)) - set(c.keep)))
            for name, c in plan.choices.items()
        )
    about = new.about["rearranged"]
    assert all(len(c.keep) == len(new.choices[name].keep) for name, c in old.choices.items())
    assert sums["after"] < sums["before"]
    assert about["before"] == pytest.approx(sums["before"])
    assert about["after"] == pytest.approx(sums["after"])
    assert about["rounds"] == 3
    assert about["swapped"] == sum(len(set(c.keep) - set(new.choices[name].keep)) for name, c in old.choices.items())
    assert {k: v for k, v in new.about.items() if k != "rearranged"} == dict(old.about)
    assert CompressionPlan.from_json(new.to_json()) == new


def test_whole_and_empty_groups_stay_as_they_are(planned: tuple[Block, Program, Tensor, Tensor]) -> None:
    _, program, _, _ = planned
    group = by_kind(program, Kind.FFN)
    scores = {group.name: ImportanceScores(group.name, torch.ones(24), "toy", "nats")}  # no gradients are asked for
    for keep in ((), tuple(range(24))):
        plan = CompressionPlan({group.name: Choice("ffn", 24, keep)})
        assert Rearrange().run(program.but(plan=plan, scores=scores)).need("plan").choices == plan.choices


def test_without_gradients_it_says_what_gives_them(planned: tuple[Block, Program, Tensor, Tensor]) -> None:
    _, program, x, labels = planned
    for criterion, why in (("l2", "'l2' keeps none"), (Fisher(rows=0), "rows=0")):
        scored = ScoreGroups(criterion, calibration(x, labels)).run(program)
        with pytest.raises(OptionError, match=rf"(?s){why}.*importance=.fisher"):
            Rearrange().run(scored)
    with pytest.raises(OptionError, match="at least one round"):
        Rearrange(rounds=0)
    with pytest.raises(OptionError, match="cannot be negative"):
        Fisher(rows=-1)
