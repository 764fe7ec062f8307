"""Kinds that no ledger prices together share a budget: every share is tried, what is nearest to dense is taken."""

from __future__ import annotations

import pytest

from fxprune.driver.shares import nearest, try_shares
from fxprune.errors import BudgetInfeasible

OUT_OF_REACH = {0.0: "too many groups", 1.0: "too few tokens"}


def make(share: float) -> float:
    if share in OUT_OF_REACH:
        raise BudgetInfeasible(OUT_OF_REACH[share])
    return share


def test_what_is_out_of_reach_is_left_and_the_nearest_of_the_rest_is_taken() -> None:
    trials = try_shares((0.0, 0.25, 0.5, 0.75, 1.0), make, lambda made: abs(made - 0.6))
    assert [one.share for one in trials] == [0.25, 0.5, 0.75]
    assert nearest(trials).made == 0.5
    assert nearest(try_shares((0.75, 0.25), make, lambda _: 1.0)).share == 0.25, "of equals the least share"


def test_the_first_reason_is_told_where_no_share_is_within_reach() -> None:
    with pytest.raises(BudgetInfeasible, match="too many groups"):
        try_shares((0.0, 1.0), make, lambda _: pytest.fail("nothing was made"))


def test_a_single_share_costs_no_measurement() -> None:
    (one,) = try_shares((0.5,), make, lambda _: pytest.fail("there is nothing to compare with"))
    assert (one.share, one.distance, one.made) == (0.5, 0.0, 0.5)
