"""The closed forms of recovery on rows, without a graph: hand examples, laws, and sums over processes."""

from __future__ import annotations

import pytest
import torch
from recovering import moments, rows

from fxprune.passes.transform.recovery.moments import Moments


def test_hand_example() -> None:
    """methods 11.8: G = [[2, 1], [1, 2]], W = [3, 4], column 1 goes: w0 becomes 5 and 24 of squared error stay."""
    root = torch.linalg.cholesky(torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)).T
    kept, gone = root[:, :1], root[:, 1:]
    system = moments(kept, 4 * gone, torch.ones(2)).finish(centred=False)
    change = system.ridge(0.0)
    assert 3 + float(change) == pytest.approx(5)
    assert 2 * system.error(change) == pytest.approx(24)


def test_moments_do_not_depend_on_the_batching_and_centre_without_cancelling() -> None:
    c, r, w = rows()
    c, r = c + 1000, r - 500
    one, many = moments(c, r, w).finish(True), moments(c, r, w, 7).finish(True)
    assert torch.allclose(one.g, many.g, rtol=1e-4)
    weight = (w / w.sum()).double()[:, None]
    centred, gap = (x.double() - (x.double() * weight).sum(0) for x in (c, r))
    assert torch.allclose(many.g, centred.T @ (centred * weight), rtol=1e-4)
    assert torch.allclose(many.b, centred.T @ (gap * weight), rtol=1e-3, atol=1e-5)


def test_weights_of_zero_do_not_count() -> None:
    c, r, w = rows()
    w[::2] = 0
    one, two = moments(c, r, w).finish(True), moments(c[1::2], r[1::2], w[1::2]).finish(True)
    assert torch.equal(one.g, two.g)
    assert moments(c, r, w).rows == 30


@pytest.mark.parametrize("rel", [0.0, 0.01, 0.5, 5.0])
def test_ridge_is_never_worse_than_bias_nor_bias_than_nothing(rel: float) -> None:
    system = moments(*rows()).finish(True)
    change = system.ridge(rel)
    errors = [system.error(change, system.bias(change)), system.error(None, system.bias()), system.error()]
    assert errors == sorted(errors)
    about_zero = moments(*rows()).finish(False)
    assert about_zero.error(about_zero.ridge(rel)) <= about_zero.error()


def test_the_bias_needs_no_products() -> None:
    for centred in (True, False):
        one, two = (moments_of(products).finish(centred) for products in (True, False))
        assert torch.allclose(one.bias(), two.bias())
        assert one.error() == pytest.approx(two.error())
        assert one.error(None, one.bias()) == pytest.approx(two.error(None, two.bias()))
        assert not two.g.numel()


def moments_of(products: bool) -> Moments:
    torch.manual_seed(1)
    made = Moments(products)
    made.add(*rows())
    return made


def test_error_is_that_of_the_rows() -> None:
    c, r, w = rows()
    system = moments(c, r, w).finish(True)
    change, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    left = r.double() - c.double() @ change.T - bias
    assert system.error(change, bias) == pytest.approx(float((left.square().sum(1) * w).sum() / w.sum()), rel=1e-5)


def test_scales_are_found() -> None:
    """methods 11.7: a known factor per unit comes back."""
    weight, factor = torch.randn(4, 6), torch.tensor([1.2, 0.8, 1.0])
    unit = torch.tensor([0, 0, 1, 1, 2, 2])
    c = torch.randn(50, 6)
    gap = c @ (weight * (factor[unit] - 1)).T
    change = moments(c, gap, torch.ones(50)).finish(True).scale(weight, unit, 1e-9)
    assert torch.allclose((weight + change) / weight, factor[unit].double().expand(4, 6), atol=1e-4)
    wild = moments(c, 1000 * gap, torch.ones(50)).finish(True).scale(weight, unit, 1e-9)
    assert wild is None  # scales beyond +-10: the layer stays


def test_a_silent_input_changes_nothing() -> None:
    assert not moments(torch.zeros(9, 2), torch.randn(9, 3), torch.ones(9)).finish(True).ridge(0.1).any()
