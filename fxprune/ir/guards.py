"""What torch asks about open sizes while it traces or runs on fake tensors, heard at the moment it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # sympy takes half a second
    import sympy
    from torch import SymInt
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def listen_to_guards(listen: Callable[[sympy.Basic], None]) -> Iterator[None]:
    """``listen`` is called with every condition on open sizes that torch decides by the example's, while it decides.

    torch keeps the conditions, but not the stack of calls that led to one; a listener can still look at it.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    plain: Any = getattr(ShapeEnv, "_log_guard", None)
    if plain is None:  # another torch: nothing is heard, and nothing breaks
        yield
        return

    def pass_on(env: ShapeEnv, prefix: str, condition: sympy.Basic, *rest: Any, **named: Any) -> Any:
        listen(condition)
        return plain(env, prefix, condition, *rest, **named)

    ShapeEnv._log_guard = pass_on  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShapeEnv._log_guard = plain  # type: ignore[method-assign]


def is_same_size(one: int | SymInt, two: int | SymInt) -> bool:
    """Whether two sizes are one at all sizes that are open. Python's ``==`` would ask torch, which answers by the
    example and holds the program to that."""
    if isinstance(one, int) or isinstance(two, int):
        return isinstance(one, int) and isinstance(two, int) and one == two
    return bool(one.node.expr == two.node.expr)


def other_side(condition: sympy.Basic, size: int) -> int | None:
    """The size nearest to ``size`` at which a condition on one symbol answers otherwise; None where none is found.

    >>> import sympy
    >>> s = sympy.Symbol("s", integer=True, positive=True)
    >>> other_side(s < 16, 2), other_side(s < 16, 32), other_side(sympy.Ne(s, 1), 5)
    (16, 15, 1)
    """
    from sympy import Integer

    symbols = list(condition.free_symbols)
    if len(symbols) != 1:
        return None
    here = holds(condition, {symbols[0]: size})
    edges = {int(number) + step for number in condition.atoms(Integer) for step in (-1, 0, 1)}
    across = [e for e in edges if e > 0 and holds(condition, {symbols[0]: e}) is (not here)]
    return min(across, key=lambda e: abs(e - size), default=None)


def holds(condition: sympy.Basic, sizes: Mapping[Any, int]) -> bool | None:
    """Whether ``condition`` is met at ``sizes``; None where they do not decide it."""
    value = condition.subs(dict(sizes))
    return None if value.free_symbols else bool(value)
