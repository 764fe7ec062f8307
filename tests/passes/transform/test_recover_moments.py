"""The closed forms of recovery on rows, without a graph: hand examples, laws, and sums over processes."""

from __future__ import annotations

import pytest
import torch
from support.recovering import moments, rows

from fxprune.passes.transform.recovery.closed_form import solve_bounded
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


@pytest.mark.drawn(2)
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


def test_lsmr_damping_recovers_known_scales() -> None:
    """methods 11.7: four columns scaled by (1.2, 0.8, 1, 0.9), 50 rows, damping 1: back to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    columns, scales = torch.randn(50, 4, generator=generator).double(), torch.tensor([1.2, 0.8, 1, 0.9]).double()
    weight, unit = torch.ones(1, 4), torch.arange(4)
    gap = (columns * (scales - 1)).sum(1, keepdim=True)
    system = moments(columns, gap, torch.ones(50)).finish(centred=False)
    change = system.scale(weight, unit, 0.0, "lsmr")
    assert change is not None
    assert torch.allclose(1 + change[0], scales, atol=1e-3)


def test_lsmr_is_the_minimiser_that_the_iterative_solver_finds() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    generator = torch.Generator().manual_seed(1)
    c, r = (torch.randn(30, n, generator=generator).double() for n in (6, 3))
    weight, unit = torch.randn(3, 6, generator=generator).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    system = moments(c, r, torch.ones(30)).finish(centred=False)
    columns = torch.stack([(c[:, 2 * u : 2 * u + 2] @ weight[:, 2 * u : 2 * u + 2].T).flatten() for u in range(3)], 1)
    normal, right = columns.T @ columns, columns.T @ r.flatten()
    x = torch.from_numpy(linalg.lsmr(normal.numpy(), right.numpy(), damp=1, atol=1e-14, btol=1e-14)[0])
    change = system.scale(weight, unit, 0.0, "lsmr")
    assert change is not None
    assert torch.allclose(change, weight * x.repeat_interleave(2), atol=1e-8)


@pytest.mark.parametrize("solver", ["ridge", "lsmr"])
def test_a_teacher_equal_to_the_student_leaves_all_scales_one(solver: str) -> None:
    c, _, w = rows()
    change = moments(c, torch.zeros(60, 3), w).finish(True).scale(torch.randn(3, 5), torch.arange(5), 0.01, solver)
    assert change is not None
    assert not change.any()


def test_removing_one_after_another_equals_removing_all_at_once() -> None:
    """methods 8.6 in fp64: OBS, group by group, with its damped inverse, ends where the anchored ridge does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 8, generator=generator).double()
    x = x + 0.3 * x.roll(1, 1) + 0.5
    weight = torch.randn(3, 8, generator=generator).double()
    kept, groups = [0, 3, 6], ([1, 2], [5], [4, 7])
    gone = [i for group in groups for i in group]
    for rel in (0.0, 0.1):
        system = moments(x[:, kept], x[:, gone] @ weight[:, gone].T, torch.ones(80)).finish(centred=False)
        joint = weight[:, kept] + system.ridge(rel)
        gram = x.T @ x / 80
        damping = rel * float(gram.diagonal()[kept].mean())
        inverse = torch.linalg.inv(gram + damping * torch.eye(8, dtype=torch.float64))
        now = weight.clone()
        for group in groups:
            block = torch.linalg.inv(inverse[group][:, group])
            now, inverse = (
                now - now[:, group] @ block @ inverse[group],
                inverse - inverse[:, group] @ block @ inverse[group],
            )
            inverse[group, group] = 1
        assert torch.allclose(now[:, kept], joint, rtol=0, atol=1e-12 * float(joint.abs().max()))


def test_the_bias_form_is_exact_when_what_goes_is_constant() -> None:
    c, _, w = rows()
    system = moments(c, torch.tensor([[1.0, -2, 3]]).expand(60, 3), w).finish(True)
    assert system.error(None, system.bias()) < 1e-9 < system.error()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_moments_of_several_processes_add_up(centred: bool, products: bool) -> None:
    c, r, w = rows()
    c, r = c.double() + 100, r.double()
    whole, parts = Moments(products), [Moments(products) for _ in range(3)]  # the third has no rows
    whole.add(c, r, w)
    parts[0].add(c[:25], r[:25], w[:25])
    parts[1].add(c[25:], r[25:], w[25:])
    sums = [p.tensors(5, 3) for p in parts]
    assert all(s.keys() == sums[0].keys() and all(s[n].shape == sums[0][n].shape for n in s) for s in sums)
    assert all(t.dtype == torch.float64 for s in sums for t in s.values())
    merged = Moments.of({n: sum(s[n] for s in sums) for n in sums[0]}, products)  # type: ignore[misc]
    one, two = whole.finish(centred), merged.finish(centred)
    assert merged.rows == whole.rows == two.rows
    for name in ("g", "b", "mean_c", "mean_r"):
        assert torch.allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9)
    assert one.rr == pytest.approx(two.rr, rel=1e-9)


def test_the_ridge_grows_until_the_weights_change_by_no_more_than_their_size() -> None:
    """methods A.3: nearly repeated inputs make huge opposite weights that fit noise."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(40, 1, generator=generator).double().repeat(1, 4)
    c = c + 1e-4 * torch.randn(40, 4, generator=generator)
    gap = torch.randn(40, 2, generator=generator).double()
    weight = torch.ones(2, 4)
    system = moments(c, gap, torch.ones(40)).finish(True)
    free, used = solve_bounded(system, weight, 1e-9, limited=False)
    assert used == 1e-9
    assert float(free.norm()) > float(weight.norm())
    bound, rel = solve_bounded(system, weight, 1e-9)
    assert rel > 1e-3
    assert float(bound.norm()) <= float(weight.norm())
    assert system.error(bound, system.bias(bound)) <= system.error(None, system.bias())
    same, rel = solve_bounded(system, 1e9 * weight, 1e-9)
    assert rel == 1e-9
    assert torch.equal(same, free)
