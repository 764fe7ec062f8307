"""Numbers for symbolic sizes: one number per size, however it is written, and the real size behind it."""

from __future__ import annotations

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Eq, Expr, Symbol
from torch.utils._sympy.functions import FloorDiv, Max, Mod, PythonMod

from fxprune.ir.axis import OPEN, real_size
from fxprune.ir.sizes import StandIns

N, B = (Symbol(name, integer=True, positive=True) for name in ("n", "b"))
SIZES = st.recursive(
    st.sampled_from([N, B, sympy.Integer(1), sympy.Integer(3)]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, st.integers(1, 6)).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, st.integers(-5, 5)).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, st.integers(2, 9)).map(lambda pair: FloorDiv(*pair)),
        st.tuples(inner, st.integers(2, 9)).map(lambda pair: PythonMod(*pair)),
        st.tuples(inner, inner).map(lambda pair: FloorDiv(pair[0], 1 + pair[1] * pair[1])),
    ),
    max_leaves=6,
)


def made(**values: int) -> StandIns:
    return StandIns({"n": 37, "b": 2, **values})


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 300), st.integers(1, 9))
def test_the_normal_form_computes_what_the_size_does(size: Expr, n: int, b: int) -> None:
    form = made().form
    assert form.value(form(sympy.sympify(size)), {"n": n, "b": b}) == int(sympy.sympify(size).subs({N: n, B: b}))


@settings(max_examples=100, deadline=None)
@given(SIZES)
def test_the_number_of_a_size_stands_for_what_it_is_in_the_example(size: Expr) -> None:
    size, sizes = sympy.sympify(size), made()
    number, real = sizes(size), int(size.subs({N: 37, B: 2}))
    assert real_size(number, sizes.example) == real
    assert sizes(size) == number
    assert not size.free_symbols or number > OPEN or not sizes.form(size).free_symbols
    assert real_size(number, sizes.at({"n": 64, "b": 5})) == int(size.subs({N: 64, B: 5}))


def test_one_size_has_one_number_however_it_is_written() -> None:
    sizes = made()
    padded = N + Mod(64 - Mod(N, 64), 64)
    for one, two in [
        (padded, 64 * FloorDiv(N + 63, 64)),
        (FloorDiv(padded, 64), FloorDiv(N + 63, 64)),
        (FloorDiv(N - 1, 2) + 1, FloorDiv(N + 1, 2)),
        (FloorDiv(FloorDiv(N - 1, 2) - 4, 3) + 1, FloorDiv(N - 3, 6)),
        (-FloorDiv(-N, 64), FloorDiv(N + 63, 64)),
        (FloorDiv(8 * N + 3, 16), FloorDiv(N, 2)),
        (FloorDiv(2 * N * B + 2 * N, B + 1), 2 * N),
    ]:
        assert sizes(one) == sizes(two), (one, two)
    assert sizes(FloorDiv(N, 2)) != sizes(FloorDiv(N, 3))


def test_products_factor_and_parts_stay_below_the_whole() -> None:
    sizes = made()
    half = sizes(FloorDiv(N, 2))
    assert sizes(B * 3 * FloorDiv(N, 2)) == sizes(B) * 3 * half
    assert 0 < sizes(N - FloorDiv(N, 2)) < sizes(N)
    assert sizes(N - FloorDiv(N, 2)) + half == sizes(N)


def test_what_a_division_leaves_is_no_static_size() -> None:
    sizes = made()
    rest = sizes(Mod(N, 8))
    assert rest > OPEN
    assert sizes.example[rest] == 37 % 8
    assert sizes(7) == 7


def test_a_guard_says_that_a_number_divides_a_symbol() -> None:
    pairs = FloorDiv(N, FloorDiv(N, 2))  # what torch makes of x.view(b, n // 2, -1, c)
    sizes = StandIns({"n": 36, "b": 2}, [Eq(8 * B * N, 16 * B * FloorDiv(N, 2)), Eq(Max(1, B), B), N > 3])
    assert sizes(pairs) == 2
    assert sizes(FloorDiv(N, 2)) * 2 == sizes(N)
    assert real_size(sizes(N), sizes.example) == 36
    assert made()(pairs) > OPEN


def test_sizes_of_no_known_form_keep_a_number_of_their_own() -> None:
    sizes = made()
    assert sizes.example[sizes(Max(4, N))] == 37
    assert sizes(Max(4, N)) == sizes(Max(4, N)) != sizes(N)


def test_symbols_behind_a_number() -> None:
    sizes = made()
    assert sizes.symbols(sizes(FloorDiv(N, 2) * B * 12)) == {"n", "b"}
    assert sizes.symbols(768) == set()
    assert sizes.names[sizes(FloorDiv(N, 2))] == "(n//2)"
