"""Axes against brute force: elements labelled by arange and pushed through the same reshapes and concatenations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.ir.axis import (
    Axis,
    Conflict,
    Dim,
    atoms,
    cut,
    element_of,
    find,
    kept_index,
    kept_total,
    leaves,
    new_dim,
    real_size,
    show,
    split,
    sum_dim,
    total,
    unify,
)


def expressions(depth: int = 2) -> st.SearchStrategy[Dim]:
    """Random dims: products of atoms and sums of smaller dims."""
    atom = st.integers(1, 4).map(new_dim)
    if depth == 0:
        return atom
    inner = expressions(depth - 1)
    product = st.lists(inner, min_size=1, max_size=3).map(lambda ds: tuple(a for d in ds for a in d))
    total_of = st.lists(inner, min_size=2, max_size=3).map(sum_dim)
    return st.one_of(atom, product, total_of)


def drawn_keep(data: st.DataObject, dims: list[Dim]) -> dict[Axis, torch.Tensor]:
    keep = {}
    for axis in dict.fromkeys(a for d in dims for a in leaves(d)):
        chosen = data.draw(st.lists(st.booleans(), min_size=axis.size, max_size=axis.size).filter(any))
        keep[axis] = torch.tensor([i for i, c in enumerate(chosen) if c])
    return keep


def brute_force_kept(dim: Dim, keep: dict[Axis, torch.Tensor]) -> list[int]:
    """Positions all of whose elements are kept, looked at one axis at a time."""
    stays = torch.ones(total(dim), dtype=torch.bool)
    for axis, index in keep.items():
        label = element_of(dim, axis)
        stays &= (label < 0) | torch.isin(label, index)
    return stays.nonzero().flatten().tolist()


@given(st.data())
def test_kept_index_agrees_with_element_labels(data: st.DataObject) -> None:
    dim = data.draw(expressions())
    keep = drawn_keep(data, [dim])
    assert kept_index(dim, keep).tolist() == brute_force_kept(dim, keep)
    assert kept_total(dim, {a: len(i) for a, i in keep.items()}) == len(kept_index(dim, keep))


@given(st.data())
def test_unified_dims_keep_the_same_positions_for_any_choice(data: st.DataObject) -> None:
    one, two = data.draw(expressions()), data.draw(expressions())
    if total(one) != total(two):
        with pytest.raises(Conflict):
            unify(one, two)
        return
    try:
        unify(one, two)
    except Conflict:
        return  # no common refinement: the caller freezes both
    assert atoms(one) == atoms(two)
    keep = drawn_keep(data, [one, two])
    assert torch.equal(kept_index(one, keep), kept_index(two, keep))


@given(st.data())
def test_refinement_never_changes_which_position_an_earlier_view_means(data: st.DataObject) -> None:
    """A dim sliced, concatenated and viewed: labels pushed through torch end where the axes say."""
    dim = new_dim(data.draw(st.sampled_from([4, 6, 8, 12])))
    label = torch.arange(total(dim))
    offset = data.draw(st.integers(1, total(dim) - 1))
    left, right = cut(dim, offset)
    swapped, label = sum_dim([right, left]), torch.cat([label[offset:], label[:offset]])
    outer = data.draw(st.sampled_from([2, 3, 4]))
    if total(dim) % outer == 0:
        try:
            unify(swapped, new_dim(outer) + new_dim(total(dim) // outer))
        except Conflict:
            return
    for axis in dict.fromkeys(leaves(dim)):
        assert torch.equal(element_of(swapped, axis), element_of(dim, axis)[label])


def test_later_splits_reach_earlier_uses() -> None:
    weight = new_dim(12)
    held = (*weight,)
    split(weight[0], 3)
    assert [a.size for a in atoms(held)] == [3, 4]
    unify(held, new_dim(6) + new_dim(2))
    assert [a.size for a in atoms(weight)] == [3, 2, 2]


def test_fused_bias_distributes_over_its_parts() -> None:
    """cat(q, k, v).view(3, H, d): the parts share H x d."""
    q, k, v = new_dim(12), new_dim(12), new_dim(12)
    fused = sum_dim([q, k, v])
    unify(fused, new_dim(3) + new_dim(4) + new_dim(3))
    assert atoms(q) == atoms(k) == atoms(v)
    assert [a.size for a in atoms(q)] == [4, 3]


def test_misaligned_sums_get_a_common_refinement() -> None:
    one, two = sum_dim([new_dim(48), new_dim(32)]), sum_dim([new_dim(40), new_dim(40)])
    unify(one, two)
    assert [a.size for a in leaves(one)] == [40, 8, 32]


@pytest.mark.parametrize(("sizes", "outer"), [((7,), 2), ((6, 3), 2)])
def test_impossible_splits_conflict(sizes: tuple[int, ...], outer: int) -> None:
    dim = sum_dim([new_dim(s) for s in sizes])
    with pytest.raises(Conflict):
        split(find(dim[0]), total(dim) // outer if total(dim) % outer == 0 else outer)


def test_views_without_a_common_refinement_conflict() -> None:
    dim = new_dim(56)
    unify(dim, new_dim(8) + new_dim(7))
    with pytest.raises(Conflict, match="28 elements are viewed as 8 equal parts"):
        unify(dim, new_dim(28) + new_dim(2))


def test_symbolic_sizes_are_replaced_in_labels() -> None:
    batch, head = new_dim(1000003), new_dim(2)
    assert element_of(batch + head, head[0], {1000003: 3}).tolist() == [0, 1, 0, 1, 0, 1]
    assert kept_index(batch + head, {head[0]: torch.tensor([1])}, {1000003: 3}).tolist() == [1, 3, 5]
    assert real_size(1000003 * 64, {1000003: 2}) == 128


def test_dims_read_as_text() -> None:
    head, width = Axis(3), Axis(64)
    assert show((Axis(3), head, width), {head: "head", width: "dim"}) == "3·head·dim"
    assert show(sum_dim([(head,), (width,)]), {head: "q", width: "k"}) == "(q+k)"
    assert show(()) == "1"
