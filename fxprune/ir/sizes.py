"""Symbolic sizes as plain numbers, so that axes factor by integer division alone.

Every symbol stands for a prime of its own, and so does every quotient of symbols (``n // 2``, a strided convolution's
``(n - 3)//2 + 1``). Sums and products are worked out on these primes: ``B*H`` factors unambiguously, and no static size
can be mistaken for the batch. Expressions are brought into one normal form first, so that a size written in two ways
(``n + (-n) % 64`` and ``64 * ((n + 63) // 64)``) is one number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import sympy
from sympy import Add, Eq, Expr, Integer, Mul, Pow, Symbol
from torch import SymInt
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from .axis import OPEN

FIRST = 100_000_000  # for symbols: high enough that their quotients are above OPEN and in the order of the real sizes
UNKNOWN = 2  # a symbol's size where no example says it

Values: TypeAlias = Mapping[str, int]
"""Symbol, as in the graph (``s77``) -> its size."""


class StandIns:
    """Size -> the number that stands for it. It remembers: a size that was asked for once keeps its number.

    values     symbol -> its size in the example inputs
    of_values  symbols whose size depends on values: what a boolean index picks
    guards     equations that the graph was captured under. One that says that a number divides a symbol is used: a
               sequence that is viewed as pairs is ``2 * (n // 2)`` then

    >>> sizes = StandIns({"n": 12})
    >>> sizes(7), sizes.example[sizes(FloorDiv(Symbol("n", integer=True), 2))]
    (7, 6)
    """

    def __init__(self, values: Values, guards: Iterable[Expr] = (), of_values: Iterable[str] = ()) -> None:
        self.values, self.of_values = dict(values), frozenset(of_values)
        self.form = _NormalForm()
        self.form.learn(guards)
        self.example: dict[int, int] = {}  # number -> size in the example, of all but products of others
        self._known: dict[Expr, int] = {}
        self._prime: dict[Symbol, int] = {}
        self._meaning: dict[int, Expr] = {}

    def __call__(self, size: int | SymInt | Expr) -> int:
        if isinstance(size, int):
            return size
        expression = size if isinstance(size, Expr) else size.node.expr
        if expression not in self._known:
            self._known[expression] = self._number(self.form(expression))
        return self._known[expression]

    def real(self, size: int | SymInt) -> int:
        """A size in the example inputs."""
        return self._in_example(self.form(size.node.expr)) if isinstance(size, SymInt) else size

    @property
    def names(self) -> dict[int, str]:
        """Number -> the size that it stands for, as text."""
        return {number: str(self.form.write(meaning)) for number, meaning in self._meaning.items()}

    def at(self, values: Values) -> dict[int, int]:
        """Number -> the size it stands for when the symbols have these ``values``, where they say it."""
        return {
            number: self.form.value(meaning, values)
            for number, meaning in self._meaning.items()
            if self.form.symbols(meaning) <= values.keys()
        }

    def symbols(self, number: int) -> set[str]:
        """Names of the symbols that a number was made of; none for a static size."""
        made = [number] if number in self._meaning else [one for one in self._meaning if number % one == 0]
        return set[str]().union(*(self.form.symbols(self._meaning[one]) for one in made))

    def _number(self, expression: Expr) -> int:
        for atom in sorted(expression.free_symbols, key=str):
            if atom not in self._prime:
                self._prime[atom] = self._next_prime(atom)
                self._remember(self._prime[atom], atom)
        number = int(expression.xreplace({a: Integer(self._prime[a]) for a in expression.free_symbols}))
        if not expression.free_symbols:
            return number
        if number < OPEN:  # what is left of a division: no sum of primes says how large it is
            number = _prime_from(max(FIRST, *self._meaning) + 1)
            self._remember(number, expression)
        elif isinstance(expression, Add):
            self._remember(number, expression)
        return number

    def _remember(self, number: int, meaning: Expr) -> None:
        self._meaning[number] = meaning
        self.example[number] = self._in_example(meaning)

    def _in_example(self, expression: Expr) -> int:
        values = {name: self.values.get(name, UNKNOWN) for name in self.form.symbols(expression)}
        return self.form.value(expression, values)

    def _next_prime(self, atom: Symbol) -> int:
        """A quotient's is near the quotient of the numbers: differences of sizes keep their sign."""
        symbols, near = self.form.write(atom).free_symbols, FIRST
        if not self.form.is_symbol(atom):
            numbers = {str(s): self._number(self.form(s)) for s in symbols}
            near = max(OPEN, self.form.value(atom, numbers))
        prime = _prime_from(near)
        while prime in self._meaning:
            prime = _prime_from(prime + 1)
        return prime


class _NormalForm:
    """Size expressions as polynomials with whole coefficients over atoms: symbols, and floor divisions that cannot be
    carried out. ``x % n`` is ``x - n * (x // n)``; constants and multiples of ``n`` leave ``x // n``."""

    def __init__(self) -> None:
        self._atoms: dict[tuple[Expr, ...], Symbol] = {}
        self._made: dict[Symbol, tuple[Expr, ...]] = {}
        self._multiple: dict[Symbol, int] = {}  # symbol -> a number that divides it
        self._done: dict[Expr, Expr] = {}

    def __call__(self, expression: Expr) -> Expr:
        if expression not in self._done:
            self._done[expression] = self._normal(expression)
        return self._done[expression]

    def learn(self, guards: Iterable[Expr]) -> None:
        """Take from equations that hold which numbers divide a symbol."""
        for guard in guards:
            if not isinstance(guard, Eq) or self._holds(guard):
                continue
            for division in sorted(guard.atoms(FloorDiv, Mod, PythonMod), key=str):
                divisor, symbols = division.args[1], division.free_symbols
                if len(symbols) != 1 or not isinstance(divisor, Integer) or divisor < 2:
                    continue
                (symbol,) = symbols
                before = dict(self._multiple)
                self._assume(symbol, math.lcm(self._multiple.get(symbol, 1), int(divisor)))
                if self._holds(guard):
                    break
                self._multiple = before
                self._done.clear()

    def _assume(self, symbol: Symbol, divisor: int) -> None:
        self._multiple[symbol] = divisor
        self._done.clear()

    def _holds(self, guard: Eq) -> bool:
        try:
            return bool(self(guard.lhs) - self(guard.rhs) == 0)
        except (TypeError, ValueError, AttributeError):  # no sizes: floats, truth values
            return False

    def write(self, expression: Expr) -> Expr:
        """A normal form in the graph's own symbols."""
        return expression.xreplace({atom: self._write_atom(atom) for atom in expression.free_symbols})

    def _write_atom(self, atom: Symbol) -> Expr:
        made = self._made.get(atom)
        if made is None:
            return atom
        return FloorDiv(*map(self.write, made), evaluate=False) if len(made) == 2 else made[0]

    def is_symbol(self, atom: Symbol) -> bool:
        """Whether ``atom`` is a symbol of the graph, or such a symbol without the number that divides it."""
        made = self._made.get(atom)
        return made is None or made[0] in self._multiple

    def symbols(self, expression: Expr) -> set[str]:
        """Names of the graph's symbols in a normal form."""
        found: set[str] = set()
        for atom in expression.free_symbols:
            made = self._made.get(atom)
            found |= {str(atom)} if made is None else set[str]().union(*map(self.symbols, made))
        return found

    def value(self, expression: Expr, values: Values) -> int:
        """What a normal form comes to."""
        at = {atom: Integer(self._value(atom, values)) for atom in expression.free_symbols}
        return int(expression.xreplace(at))

    def _value(self, atom: Symbol, values: Values) -> int:
        made = self._made.get(atom)
        if made is None:
            return values[str(atom)]
        if len(made) == 2:
            return self.value(made[0], values) // self.value(made[1], values)
        return int(made[0].subs({s: values[str(s)] for s in made[0].free_symbols}))

    # ------------------------------------------------------------ into the form

    def _normal(self, expression: Expr) -> Expr:
        if isinstance(expression, Integer):
            return expression
        if isinstance(expression, Symbol):
            divisor = self._multiple.get(expression, 1)
            return expression if divisor == 1 else divisor * self._atom(expression, Integer(divisor))
        if isinstance(expression, Add | Mul) or (isinstance(expression, Pow) and expression.exp.is_Integer):
            whole = sympy.expand(expression.func(*map(self, expression.args)))
            if all(c.is_Integer for c in whole.as_coefficients_dict().values()):
                return whole
        if isinstance(expression, FloorDiv):
            return self._floor(*map(self, expression.args))
        if isinstance(expression, Mod | PythonMod):
            left, right = map(self, expression.args)
            return sympy.expand(left - right * self._floor(left, right))
        return self._atom(expression)

    def _atom(self, *made: Expr) -> Symbol:
        """The symbol for a floor division, of (numerator, denominator), or for an expression of another kind."""
        if made not in self._atoms:
            atom = Symbol(f"q{len(self._atoms)}_", integer=True)
            self._atoms[made] = atom
            self._made[atom] = made
        return self._atoms[made]

    def _floor(self, left: Expr, right: Expr) -> Expr:
        if right.is_Integer and right > 0:
            return self._floor_by(left, int(right))
        ratio = sympy.cancel(left / right)
        above, below = sympy.fraction(ratio)
        if below.is_Integer:
            return self._floor_by(sympy.expand(above), int(below))
        whole = rest = Integer(0)
        for term in Add.make_args(left):
            part = sympy.cancel(term / right)
            if sympy.fraction(part)[1] == 1:
                whole += part
            else:
                rest += term
        return sympy.expand(whole) + self._atom(rest, right)

    def _floor_by(self, left: Expr, divisor: int) -> Expr:
        """``left // divisor`` for a whole number: multiples of it leave the fraction, and a negative sign as well."""
        whole, rest = _divide(left, divisor)
        if rest.is_Integer:
            return whole
        constant, terms = rest.as_coeff_Add()
        shared = math.gcd(divisor, *(_count(term) for term in Add.make_args(terms)))
        rest, divisor = sympy.expand(terms / shared) + int(constant) // shared, divisor // shared
        constant, terms = rest.as_coeff_Add()
        first, sign = _count(min(Add.make_args(terms), key=str)), 1
        if 2 * first > divisor:  # x // n is -((n - 1 - x) // n)
            sign, (less, rest) = -1, _divide(sympy.expand(divisor - 1 - rest), divisor)
            whole -= less
            constant, terms = rest.as_coeff_Add()
        if divisor == 1:
            return whole + sign * rest
        inner = self._made.get(terms) if isinstance(terms, Symbol) and not self.is_symbol(terms) else None
        if inner is not None and len(inner) == 2 and inner[1].is_Integer:  # (x // a + c) // b is (x + a*c) // (a*b)
            above, below = inner
            return whole + sign * self._floor_by(sympy.expand(above + constant * below), int(below) * divisor)
        return whole + sign * self._atom(rest, Integer(divisor))


def _divide(left: Expr, divisor: int) -> tuple[Expr, Expr]:
    """(quotient, rest) by coefficients: left = quotient * divisor + rest, where 0 <= coefficient of rest < divisor."""
    whole = rest = Integer(0)
    for term in Add.make_args(left):
        count, what = term.as_coeff_Mul()
        quotient, remainder = divmod(int(count), divisor)
        whole += quotient * what
        rest += remainder * what
    return whole, rest


def _count(term: Expr) -> int:
    return int(term.as_coeff_Mul()[0])


def _prime_from(start: int) -> int:
    """The least prime that is at least ``start``."""
    return int(sympy.nextprime(start - 1))
