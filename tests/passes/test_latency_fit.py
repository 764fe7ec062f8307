"""A table of latencies as a flat start and a line: the vector of the methods, and tables that are of that form."""

from __future__ import annotations

import pytest

from fxprune.errors import OptionError
from fxprune.passes.search.latency_fit import LatencyFit, fit_latency


def test_methods_vector_11_11() -> None:
    fit = fit_latency([1, 1, 1, 2, 3])
    assert fit == LatencyFit(threshold=3, constant=1.0, slope=1.0, error=0.0)
    assert [fit(n) for n in range(7)] == [0, 1, 1, 1, 2, 3, 4]


@pytest.mark.parametrize(("threshold", "constant", "slope"), [(1, 2.0, 0.5), (4, 0.25, 3.0), (11, 1.0, 0.125)])
def test_a_table_of_this_form_is_found_again(threshold: int, constant: float, slope: float) -> None:
    true = LatencyFit(threshold, constant, slope, 0.0)
    fit = fit_latency([true(n) for n in range(1, 13)])
    assert (fit.threshold, fit.constant, fit.slope) == pytest.approx((threshold, constant, slope))
    assert fit.error == pytest.approx(0.0, abs=1e-20)


def test_flat_and_falling_tables_have_no_slope() -> None:
    assert fit_latency([2.0, 2.0, 2.0]) == LatencyFit(1, 2.0, 0.0, 0.0)
    assert fit_latency([3.0, 2.0, 1.0]).slope == 0.0
    assert fit_latency([5.0]) == LatencyFit(1, 5.0, 0.0, 0.0)


def test_the_error_is_that_of_the_fit() -> None:
    table = [1.0, 1.2, 0.9, 2.5, 2.4, 4.0]
    fit = fit_latency(table)
    assert fit.error == pytest.approx(sum((fit(n) - time) ** 2 for n, time in enumerate(table, 1)))


@pytest.mark.parametrize("table", [[], [1.0, float("nan")], [1.0, -1.0]])
def test_what_is_no_table(table: list[float]) -> None:
    with pytest.raises(OptionError, match="no table of latencies"):
        fit_latency(table)
