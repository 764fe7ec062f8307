"""Values of any form: the dynamic programme, the envelope of the threshold search, and the fill they share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from test_search import Case, cost, make, random_chain

from fxprune.errors import InternalError
from fxprune.ir.axis import Axis
from fxprune.ir.cost import Expression
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.importance import ImportanceScores
from fxprune.passes.search import two_class as scan
from fxprune.passes.search.dynamic import BUCKETS, dynamic
from fxprune.passes.search.exhaustive import exhaustive
from fxprune.passes.search.ladder import Ladder, ladder, value_of
from fxprune.passes.search.lagrangian import lagrangian
from fxprune.passes.search.two_class import two_class

Prices = Callable[[random.Random], int]


def bent(rng: random.Random, rungs: int, name: str) -> Ladder:
    """Sorted random values, now and then equal: in no way concave."""
    values = sorted(rng.choice([rng.random(), rng.random() ** 4, 0.25]) for _ in range(rungs))
    return Ladder(name, Kind.FFN, Axis(rungs - 1, name), tuple(range(rungs - 1)), tuple(range(rungs)), tuple(values))


def random_bent(rng: random.Random, prices: Prices, ladders: int = 3, rungs: int = 4) -> Case:
    many = [bent(rng, rungs, str(i)) for i in range(ladders)]
    return many, [*(Expression(prices(rng), (one.axis,)) for one in many), Expression(prices(rng))]


def bent_chain(rng: random.Random) -> Case:
    """Costs that multiply, values of any form."""
    case = random_chain(rng, comparable=True)
    many = [
        Ladder(one.group, one.kind, one.axis, one.order, one.counts, tuple(sorted(rng.random() for _ in one.counts)))
        for one in case[0]
    ]
    return many, case[1]


def small(rng: random.Random) -> int:
    return rng.randint(1, 9)


def odd(rng: random.Random) -> int:
    """So large, and without a common divisor, that the grid must round."""
    return rng.randint(10**6, 3 * 10**6)


def range_of(case: Case) -> tuple[int, int]:
    return cost(case, [0] * len(case[0])), cost(case, [one.top for one in case[0]])


def nothing_more_fits(case: Case, levels: Sequence[int], limit: float) -> bool:
    steps = [[level + (j == i) for j, level in enumerate(levels)] for i in range(len(levels))]
    return all(levels[i] == one.top or cost(case, steps[i]) > limit for i, one in enumerate(case[0]))


# ---------------------------------------------------------------- curves and envelopes


def curved(
    curve: list[float],
    granularity: int = 1,
    order: list[int] | None = None,
    comparable: bool = True,
    worth: float = 1.0,
) -> Ladder:
    size = len(curve) - 1
    group = PruneGroup("g", Kind.FFN, size, Axis(size), granularity=granularity, floor=0)
    scores = ImportanceScores(
        "g",
        torch.arange(size).double(),
        "toy",
        "nats",
        comparable,
        curve=torch.tensor(curve),
        order=None if order is None else torch.tensor(order),
    )
    return ladder(group, scores, worth)


def test_a_curve_takes_the_place_of_sums_and_an_order_that_of_scores() -> None:
    one = curved([0.0, 1.0, 1.0, 7.0, 8.0], granularity=2, order=[2, 0, 3, 1])
    assert one.counts == (0, 2, 4)
    assert one.values == (0.0, 1.0, 8.0)
    assert [one.keep(i) for i in range(3)] == [(), (0, 2), (0, 1, 2, 3)]
    assert curved([0.0, 1.0, 2.0]).keep(1) == (1,)  # without an order, the best scores come first


def test_a_curve_of_scores_that_are_not_comparable_is_in_units_of_what_the_group_costs() -> None:
    """Such scores cannot be added to those of other groups; their curve says how much of the group's worth stays."""
    assert curved([0.0, 1.0, 5.0], comparable=False, worth=3.0).values == (0.0, 3.0, 15.0)
    assert curved([0.0, 1.0, 5.0], comparable=True, worth=3.0).values == (0.0, 1.0, 5.0)


def test_an_order_that_puts_dead_elements_first_has_finite_values() -> None:
    group = PruneGroup("g", Kind.FFN, 3, Axis(3), floor=1)
    scores = ImportanceScores("g", torch.tensor([0.0, 0.0, 2.0]), "toy", "norm", order=torch.tensor([0, 1, 2]))
    one = ladder(group, scores, 5.0)
    assert one.values == (-5.0, -5.0, 0.0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("curve", torch.tensor([0.0, 2.0, 1.0]), "falling"),
        ("curve", torch.tensor([0.0, 1.0]), "expected \\[3\\]"),
        ("curve", torch.tensor([0.0, 1.0, torch.inf]), "non-finite curve"),
        ("order", torch.tensor([0, 0]), "no order"),
        ("gradients", torch.zeros(4, 3), "expected \\[rows, 2\\]"),
        ("gradients", torch.full((4, 2), torch.nan), "non-finite gradient"),
    ],
)
def test_what_a_criterion_adds_is_checked(field: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        ImportanceScores("g", torch.ones(2), "toy", "nats", **{field: value})  # type: ignore[arg-type]


def test_additions_stay_out_of_print_and_comparison() -> None:
    values = torch.ones(2)
    plain = ImportanceScores("g", values, "toy", "nats")
    rich = ImportanceScores("g", values, "toy", "nats", gradients=torch.ones(3, 2), curve=torch.tensor([0.0, 1.0, 2.0]))
    assert repr(plain) == repr(rich)


def test_sums_of_scores_are_concave_and_keep_every_rung() -> None:
    rng = random.Random(0)
    for _ in range(100):
        one = make(
            [rng.choice([0.1, rng.random()]) for _ in range(rng.randint(1, 30))],
            rng.choice([1, 4]),
            rng.choice([0, 1]),
            rng.random() < 0.5,
            7.0,
        )
        assert one.concave
        assert one.envelope() == list(range(len(one.counts)))


def test_the_envelope_is_concave_and_nowhere_below_the_values() -> None:
    rng = random.Random(1)
    for _ in range(100):
        one = bent(rng, rng.randint(1, 12), "g")
        hull = one.envelope()
        slopes = [one.slope(a, b) for a, b in itertools.pairwise(hull)]
        assert (hull[0], hull[-1]) == (0, one.top)
        assert all(b <= a + 1e-8 for a, b in itertools.pairwise(slopes))
        for low, high in itertools.pairwise(hull):
            line = [one.values[low] + one.slope(low, high) * (r - low) for r in range(low, high)]
            assert all(one.values[r] <= on + 1e-9 for r, on in zip(range(low, high), line, strict=True))


# ---------------------------------------------------------------- the dynamic programme


def test_dynamic_equals_exhaustive_in_value_and_cost() -> None:
    rng = random.Random(2)
    for _ in range(150):
        case = random_bent(rng, small, rng.randint(1, 3), 3)
        limit = rng.uniform(*range_of(case))
        mine, best = dynamic(*case, limit), exhaustive(*case, limit)
        assert value_of(case[0], mine) == pytest.approx(value_of(case[0], best), abs=1e-12)
        assert cost(case, mine) == cost(case, best)


def test_dynamic_equals_the_scan_where_that_is_exact() -> None:
    rng = random.Random(3)
    for _ in range(50):
        many = [make([rng.random() for _ in range(6)], name=str(i)) for i in range(4)]
        case = many, [Expression((9, 2)[i % 2] * 64, (one.axis,)) for i, one in enumerate(many)]
        assert scan.applies(*case)
        limit = rng.uniform(*range_of(case))
        assert value_of(many, dynamic(*case, limit)) == pytest.approx(value_of(many, two_class(*case, limit)))


@pytest.mark.parametrize("prices", [small, odd])
def test_dynamic_holds_the_budget_fills_it_and_repeats_itself(prices: Prices) -> None:
    rng = random.Random(4)
    for _ in range(15 if prices is small else 5):
        case = random_bent(rng, prices, 4, 6)
        low, high = range_of(case)
        found = []
        for limit in sorted(rng.uniform(low, high) for _ in range(6)):
            levels = dynamic(*case, limit)
            assert cost(case, levels) <= limit
            assert nothing_more_fits(case, levels, limit)
            assert dynamic(*case, limit) == levels
            found.append((value_of(case[0], levels), cost(case, levels)))
        if prices is small:  # nothing is rounded: wider limits cost no less and give no less
            assert [v for v, _ in found] == sorted(v for v, _ in found)
            assert [c for _, c in found] == sorted(c for _, c in found)
        assert dynamic(*case, low) == [0] * 4 or cost(case, dynamic(*case, low)) == low
        assert dynamic(*case, high) == dynamic(*case, float("inf")) == [one.top for one in case[0]]


def test_rounding_loses_no_more_than_a_bucket_per_ladder() -> None:
    rng = random.Random(5)
    for _ in range(30):
        case = random_bent(rng, odd, 3, 4)
        low, high = range_of(case)
        limit = rng.uniform(low, high)
        unit = -(-(high - low) // BUCKETS)
        tighter = exhaustive(*case, max(low, limit - unit * (1 + len(case[0]))))
        assert value_of(case[0], dynamic(*case, limit)) >= value_of(case[0], tighter) - 1e-12


def test_rungs_that_cost_nothing_stay() -> None:
    rng = random.Random(6)
    free, paid = bent(rng, 4, "free"), bent(rng, 4, "paid")
    assert dynamic([free, paid], [Expression(3, (paid.axis,)), Expression(5)], 5) == [3, 0]


# ---------------------------------------------------------------- one threshold on the envelope


def test_lagrangian_gap_is_at_most_one_edge_of_the_envelope() -> None:
    rng = random.Random(7)
    for _ in range(150):
        case = random_bent(rng, small, 3, 5)
        limit = rng.uniform(*range_of(case))
        mine, best = lagrangian(*case, limit), exhaustive(*case, limit)
        edge = max(one.values[b] - one.values[a] for one in case[0] for a, b in itertools.pairwise(one.envelope()))
        assert value_of(case[0], best) - value_of(case[0], mine) <= edge + 1e-9


def test_a_rung_worth_nothing_by_itself_does_not_hide_the_one_behind_it() -> None:
    """Chunk by chunk, the first chunk of the bent group looks worthless, and its second a bargain that stays alone."""
    bent_one = Ladder("b", Kind.FFN, Axis(2), (0, 1), (0, 1, 2), (0.0, 0.0, 10.0))
    plain = Ladder("p", Kind.FFN, Axis(2), (0, 1), (0, 1, 2), (0.0, 3.0, 6.0))
    terms = [Expression(1, (bent_one.axis,)), Expression(1, (plain.axis,))]
    for search in (lagrangian, dynamic):
        assert search([bent_one, plain], terms, 2) == [2, 0]
        assert search([bent_one, plain], terms, 3) == [2, 1]
        assert search([bent_one, plain], terms, 1) == [0, 1]


def test_products_of_counts_with_values_of_any_form() -> None:
    """Costs of a CNN: held, filled, monotone, and on average near the optimum."""
    rng, gaps = random.Random(8), []
    for _ in range(40):
        case = bent_chain(rng)
        low, high = range_of(case)
        spent = []
        for limit in sorted(rng.uniform(low, high) for _ in range(6)):
            levels = lagrangian(*case, limit)
            spent.append(cost(case, levels))
            assert spent[-1] <= limit
            assert nothing_more_fits(case, levels, limit)
        assert spent == sorted(spent)
        best = value_of(case[0], exhaustive(*case, limit))
        span = best - value_of(case[0], [0] * len(case[0])) or 1.0
        gaps.append((best - value_of(case[0], levels)) / span)
    assert min(gaps) >= -1e-9
    assert sum(gaps) / len(gaps) < 0.06


# ---------------------------------------------------------------- the vectors of the methods, for every search


@pytest.mark.parametrize("search", [two_class, lagrangian, dynamic, exhaustive])
def test_heads_and_neurons_within_five(search: Callable[..., list[int]]) -> None:
    """Vector 11.3, and the case in which the reference search keeps three heads at a cost of 12."""
    heads, neurons = (make(s, floor=0) for s in ([5.0, 1.0], [4.0, 3.0, 2.0, 1.0]))
    terms = [Expression(3, (heads.axis,)), Expression(1, (neurons.axis,))]
    levels = search([heads, neurons], terms, 5)
    if search is lagrangian:  # within one chunk of the optimum: neurons are the better bargain
        assert value_of([heads, neurons], levels) >= 12 - 5
    else:
        assert levels == [1, 2]
    heads, neurons = make([10.0, 9.0, 8.0], floor=0), make([1.0], floor=0)
    assert search([heads, neurons], [Expression(4, (heads.axis,)), Expression(1, (neurons.axis,))], 5) == [1, 1]
