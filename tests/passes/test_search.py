"""The searches on hand-made ladders: optimal where they say so, never above the limit, monotone, deterministic."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from fxprune.errors import OptionError
from fxprune.ir.axis import Axis
from fxprune.ir.cost import Expression
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.importance import ImportanceScores
from fxprune.passes.search import two_class as scan
from fxprune.passes.search.exhaustive import exhaustive
from fxprune.passes.search.ladder import Ladder, ladder, ledger_at, value_of
from fxprune.passes.search.lagrangian import lagrangian
from fxprune.passes.search.two_class import two_class

Case = tuple[list[Ladder], list[Expression]]


def make(
    scores: list[float],
    granularity: int = 1,
    floor: int = 1,
    comparable: bool = True,
    worth: float = 1.0,
    name: str = "g",
) -> Ladder:
    axis = Axis(len(scores), name)
    group = PruneGroup(name, Kind.FFN, len(scores), axis, granularity=granularity, floor=floor)
    return ladder(group, ImportanceScores(name, torch.tensor(scores), "toy", "nats", comparable), worth)


def cost(case: Case, levels: list[int]) -> int:
    return ledger_at(case[1], case[0], levels).total


def random_two_class(rng: random.Random) -> Case:
    ladders, terms, prices = [], [], (rng.randint(2, 9), rng.randint(1, 3))
    for i in range(rng.randint(1, 4)):
        one = make(
            [rng.choice([0.0, rng.random(), 1.0]) for _ in range(rng.randint(1, 4))],
            floor=rng.randint(0, 1),
            name=str(i),
        )
        ladders.append(one)
        terms.append(Expression(prices[i % 2], (one.axis,)))
    return ladders, [*terms, Expression(rng.randint(0, 5))]


def random_chain(rng: random.Random, comparable: bool) -> Case:
    """Convolutions in a row: the cost of each is a product of two counts."""
    ladders = [
        make(
            [rng.expovariate(1) for _ in range(rng.randint(4, 9))],
            rng.choice([1, 2]),
            rng.choice([0, 2]),
            comparable,
            rng.randint(1, 20),
            str(i),
        )
        for i in range(3)
    ]
    a, b, c = (one.axis for one in ladders)
    terms = [
        Expression(rng.randint(1, 9), (a,)),
        Expression(rng.randint(1, 9), (a, b)),
        Expression(rng.randint(1, 9), (b, c)),
        Expression(rng.randint(1, 9), (c,)),
        Expression(rng.randint(0, 30)),
    ]
    return ladders, terms


# ---------------------------------------------------------------- ladders


def test_ladder_cuts_sorted_scores_into_aligned_chunks() -> None:
    one = make([3.0, 9.0, 1.0, 7.0, 5.0], granularity=2, floor=2)
    assert one.order == (1, 3, 4, 0, 2)
    assert one.counts == (2, 4, 5)
    assert one.values == (16.0, 24.0, 25.0)
    assert [one.keep(i) for i in range(3)] == [(1, 3), (0, 1, 3, 4), (0, 1, 2, 3, 4)]


def test_equal_scores_keep_the_first_elements() -> None:
    assert make([1.0, 1.0, 1.0, 1.0], floor=2).keep(0) == (0, 1)


@pytest.mark.parametrize("comparable", [True, False])
def test_a_branch_that_may_go_has_an_empty_rung_worth_more_than_any_other(comparable: bool) -> None:
    one = make([1.0, 1.0, 1.0], floor=0, comparable=comparable, worth=5.0)
    gains = [b - a for a, b in itertools.pairwise(one.values)]
    assert one.counts == (0, 1, 2, 3)
    assert gains == sorted(gains, reverse=True)
    assert math.isfinite(one.values[0])


def test_scores_that_are_not_comparable_lose_their_unit() -> None:
    one, scaled = (make([s * x for x in (4.0, 2.0, 1.0)], comparable=False, worth=6.0) for s in (1.0, 1e4))
    assert one.values == pytest.approx(scaled.values)
    assert one.values == pytest.approx((6 * math.log(4 / 7), 6 * math.log(6 / 7), 0.0))


def test_a_group_of_dead_elements_is_worth_nothing() -> None:
    assert make([0.0] * 4, comparable=False, worth=5.0).values == (0.0,) * 4


# ---------------------------------------------------------------- the exact scan


def test_methods_vector_11_3() -> None:
    heads, neurons = (make(s, floor=0) for s in ([5.0, 1.0], [4.0, 3.0, 2.0, 1.0]))
    terms = [Expression(3, (heads.axis,)), Expression(1, (neurons.axis,))]
    levels = two_class([heads, neurons], terms, 5)
    assert levels == [1, 2]
    assert value_of([heads, neurons], levels) == 12


def test_heads_alone_never_exceed_the_budget() -> None:
    """The reference search keeps 3 heads here, at a cost of 12."""
    heads, neurons = make([10.0, 9.0, 8.0], floor=0), make([1.0], floor=0)
    terms = [Expression(4, (heads.axis,)), Expression(1, (neurons.axis,))]
    assert two_class([heads, neurons], terms, 5) == [1, 1]
    assert two_class([heads, neurons], terms, 3) == [0, 1]


def test_two_class_equals_exhaustive_in_value_and_cost() -> None:
    rng, compared = random.Random(0), 0
    for _ in range(300):
        case = random_two_class(rng)
        limit = rng.uniform(0, cost(case, [one.top for one in case[0]]))
        if cost(case, [0] * len(case[0])) > limit or not scan.applies(*case):
            continue
        mine, best = two_class(*case, limit), exhaustive(*case, limit)
        assert value_of(case[0], mine) == pytest.approx(value_of(case[0], best))
        assert cost(case, mine) <= limit
        compared += 1
    assert compared > 200


def test_short_last_chunks_are_not_for_the_scan() -> None:
    one = make([5.0, 4.0, 3.0, 2.0, 1.0], granularity=2)
    assert not scan.applies([one], [Expression(1, (one.axis,))])


@pytest.mark.parametrize("search", [two_class, lagrangian])
def test_chunks_that_cost_nothing_stay(search: object) -> None:
    free, paid = make([0.0] * 3, name="free"), make([2.0, 1.0], name="paid")
    assert search([free, paid], [Expression(1, (paid.axis,))], 1) == [2, 0]  # type: ignore[operator]


# ---------------------------------------------------------------- the threshold search


def test_lagrangian_gap_is_at_most_one_chunk_when_costs_are_separable() -> None:
    rng = random.Random(1)
    for _ in range(200):
        ladders = [make([rng.random() for _ in range(rng.randint(2, 5))], name=str(i)) for i in range(4)]
        case = ladders, [Expression(rng.randint(1, 9), (one.axis,)) for one in ladders]
        limit = rng.uniform(cost(case, [0] * 4), cost(case, [one.top for one in ladders]))
        mine, best = lagrangian(*case, limit), exhaustive(*case, limit)
        largest = max(b - a for one in ladders for a, b in zip(one.values, one.values[1:], strict=False))
        assert value_of(ladders, best) - value_of(ladders, mine) <= largest + 1e-9


@pytest.mark.parametrize("comparable", [True, False])
def test_products_of_counts_stay_near_the_optimum(comparable: bool) -> None:
    rng, gaps = random.Random(2), []
    for _ in range(60):
        case = random_chain(rng, comparable)
        tops = [one.top for one in case[0]]
        limit = rng.uniform(cost(case, [0] * 3), cost(case, tops))
        span = value_of(case[0], tops) - value_of(case[0], [0] * 3)
        gaps.append((value_of(case[0], exhaustive(*case, limit)) - value_of(case[0], lagrangian(*case, limit))) / span)
    assert min(gaps) >= -1e-9
    assert sum(gaps) / len(gaps) < 0.02


@pytest.mark.parametrize("kind", ["two-class", "separable", "chain", "chain, norms"])
def test_budget_held_filled_and_monotone(kind: str) -> None:
    """Never above the limit; nothing more fits; a tighter limit never costs more; the same answer twice."""
    rng = random.Random(kind)
    for _ in range(40):
        case = random_two_class(rng) if kind in ("two-class", "separable") else random_chain(rng, kind == "chain")
        search = two_class if kind == "two-class" else lagrangian
        if search is two_class and not scan.applies(*case):
            continue
        low, high = cost(case, [0] * len(case[0])), cost(case, [one.top for one in case[0]])
        spent = []
        for limit in sorted(rng.uniform(low, high) for _ in range(15)):
            levels = search(*case, limit)
            spent.append(cost(case, levels))
            assert spent[-1] <= limit
            for i, one in enumerate(case[0]):
                more = [level + (j == i) for j, level in enumerate(levels)]
                assert levels[i] == one.top or cost(case, more) > limit
            assert search(*case, limit) == levels
        assert spent == sorted(spent)
        assert search(*case, high) == [one.top for one in case[0]]


# ---------------------------------------------------------------- no layer collapses (pain 17)


def vgg_like() -> tuple[list[int], list[Expression], list[Axis]]:
    """Seven 3x3 convolutions; early ones are narrow and run on large maps, so a MAC buys less norm there."""
    widths, maps = [16, 32, 32, 64, 64, 128, 128], [32, 32, 16, 16, 8, 8, 4]
    axes = [Axis(w) for w in widths]
    terms = [Expression(9 * 3 * maps[0] ** 2, (axes[0],))]
    terms += [Expression(9 * m * m, (a, b)) for a, b, m in zip(axes, axes[1:], maps[1:], strict=False)]
    return widths, [*terms, Expression(10, (axes[-1],))], axes


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.25])
def test_norms_keep_sane_ratios_in_every_layer_of_a_cnn(spread: float, ratio: float) -> None:
    torch.manual_seed(0)
    widths, terms, axes = vgg_like()
    dense = sum(t({}) for t in terms)
    ladders = []
    for i, (width, axis) in enumerate(zip(widths, axes, strict=True)):
        scores = 10.0**-i * (1 + spread * torch.rand(width))  # deep layers have tiny norms: units must not matter
        worth = dense - sum(t({axis: 0}) for t in terms)
        group = PruneGroup(str(i), Kind.CHANNEL, width, axis, floor=1)
        ladders.append(ladder(group, ImportanceScores(str(i), scores, "l2", "weight norm"), worth))
    levels = lagrangian(ladders, terms, ratio * dense)
    kept = [one.counts[level] / one.counts[-1] for one, level in zip(ladders, levels, strict=True)]
    uniform = math.sqrt(ratio)  # what every layer would keep if all kept the same
    assert min(kept) > 0.5 * uniform
    assert max(kept[:-1]) < 1.5 * uniform


def test_flat_scores_keep_the_same_share_of_heads_and_neurons() -> None:
    heads, neurons = make([1.0] * 12, comparable=False, worth=12 * 40.0), make([9.0] * 96, comparable=False, worth=96.0)
    terms = [Expression(40, (heads.axis,)), Expression(1, (neurons.axis,))]
    levels = two_class([heads, neurons], terms, 0.5 * (12 * 40 + 96))
    assert [heads.counts[levels[0]], neurons.counts[levels[1]]] == [6, 48]


def test_exhaustive_refuses_what_it_cannot_finish() -> None:
    ladders = [make([1.0] * 9, name=str(i)) for i in range(8)]
    with pytest.raises(OptionError, match="tiny models"):
        exhaustive(ladders, [], 1)
