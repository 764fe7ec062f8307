"""Allocation of tiles to layers: pure functions on curves."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxprune.passes.search.tile_allocation import LayerCurve, kkt, lsp, uniform
from fxprune.passes.search.tile_curves import convex_hull, derivative, smooth_curve

ALL = (uniform, kkt, lsp)


def layer(delta: list[float], cost: int = 10, size: float = 1.0, most: int | None = None) -> LayerCurve:
    count = len(delta) - 1
    return LayerCurve(
        "layer", tuple(cost * k for k in range(count + 1)), tuple(delta), count if most is None else most, size
    )


def convex(seed: int, tiles: int = 4, cost: int = 10, size: float = 1.0) -> LayerCurve:
    steps = torch.rand(tiles, generator=torch.Generator().manual_seed(seed)).sort().values
    return layer([0.0, *steps.cumsum(0).tolist()], cost, size)


def saved(layers: list[LayerCurve], gone: list[int]) -> int:
    return sum(one.saved[k] for one, k in zip(layers, gone, strict=True))


def lost(layers: list[LayerCurve], gone: list[int]) -> float:
    return sum(one.delta[k] for one, k in zip(layers, gone, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_kkt_is_exhaustive_search_on_convex_curves_of_equal_cost(seed: int) -> None:
    layers = [convex(seed), convex(seed + 100)]
    for target in range(0, 81, 10):
        best = min(
            lost(layers, list(g)) for g in itertools.product(range(5), repeat=2) if saved(layers, list(g)) >= target
        )
        assert lost(layers, kkt(layers, target)) == pytest.approx(best)


@pytest.mark.parametrize("allocate", ALL)
def test_the_target_is_met_within_one_tile_of_the_largest_layer(allocate) -> None:  # type: ignore[no-untyped-def]
    layers = [
        convex(1, 40, 3, 1.0),
        convex(2, 30, 7, 2.0),
        convex(3, 8, 11, 0.1),
        layer([0, 5, 5.1, 5.2, 9, 9, 9.0], 5, 0.5, most=4),
    ]
    whole = sum(one.saved[one.most] for one in layers)
    for target in (0, 1, whole // 7, whole // 2, whole - 1, whole):
        gone = allocate(layers, target)
        assert all(0 <= k <= one.most for one, k in zip(layers, gone, strict=True))
        assert target <= saved(layers, gone) <= target + 11


@pytest.mark.parametrize("allocate", ALL)
def test_a_tighter_target_never_takes_a_tile_back(allocate) -> None:  # type: ignore[no-untyped-def]
    layers = [convex(1, 20), convex(2, 30), convex(3, 10)]
    counts = [sum(allocate(layers, target)) for target in range(0, 600, 50)]
    assert counts == sorted(counts)


def test_larger_layers_may_be_pruned_to_a_steeper_slope() -> None:
    """The paper's sign: the same curve with twice N K must not keep more. The reference code's sign fails here."""
    curve = [0.0, *torch.linspace(0.1, 1.0, 40).cumsum(0).tolist()]
    for target in (100, 300, 500):
        small, large = lsp([layer(curve, 10, 100.0), layer(curve, 10, 200.0)], target)
        assert large >= small
    spread = lsp([layer(curve, 10, 100.0), layer(curve, 10, 200.0)], 300)
    assert spread[1] > spread[0]
    even = lsp([layer(curve, 10, 100.0), layer(curve, 10, 200.0)], 300, power=False)
    assert abs(even[0] - even[1]) <= 1, "without the power term size does not matter"


def test_where_the_power_term_alone_saves_too_much_it_is_scaled_down() -> None:
    layers = [layer([0.0, *torch.linspace(0.1, 1, 20).cumsum(0).tolist()], 10, size) for size in (1.0, 50.0)]
    gone = lsp(layers, 30)
    assert 30 <= saved(layers, gone) <= 40


def test_the_derivative_of_five_points_is_exact_on_a_cubic() -> None:
    x = torch.linspace(0, 2, 21, dtype=torch.float64)
    slope = derivative(2 * x**3 - x**2 + 3 * x, 0.1)
    torch.testing.assert_close(slope[2:-2], (6 * x**2 - 2 * x + 3)[2:-2], rtol=1e-10, atol=1e-10)
    square = derivative(x**2, 0.1)
    torch.testing.assert_close(square[1:-1], (2 * x)[1:-1], rtol=1e-10, atol=1e-10)
    assert derivative(torch.zeros(1), 0.1).tolist() == [0]


def test_the_moving_average_has_no_bias_at_its_start() -> None:
    curve = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(smooth_curve(curve, 0.0), curve)
    first, second, _ = smooth_curve(curve, 0.5).tolist()
    assert first == pytest.approx(1.0)
    assert second == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)


def test_the_hull_lies_below_and_its_slopes_rise() -> None:
    y = torch.randn(30, generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()
    hull = convex_hull(list(map(float, range(30))), y)
    assert hull[0] == 0
    assert hull[-1] == 29
    slopes = [(y[b] - y[a]) / (b - a) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    for a, b in itertools.pairwise(hull):
        for i in range(a, b + 1):
            assert y[i] >= y[a] + (y[b] - y[a]) * (i - a) / (b - a) - 1e-9
