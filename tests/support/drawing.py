"""A sample by default, everything with ``--full``: the one way in which a test may be less than it could.

``@pytest.mark.drawn(count)``   so many cases of a parametrised test, other ones for every name of a test; 0: with
                                ``--full`` alone, where another test proves the same at less cost
``drawn(count, first=n)``       so many from the n-th on, in an order that all such tests share: together they have all
``of(few, many)``               a number that is less by default: examples of hypothesis, seeds, samples, steps
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

FULL = False  # set by conftest.py, before any test is imported


def draw(test: str, cases: Sequence[T], count: int, first: int | None = None, seed: int = 0) -> list[T]:
    """``count`` of the cases: in an order that is the test's own, or from the ``first`` in one that all tests share."""
    mixed = random.Random(f"{seed} {test if first is None else ''}").sample(list(cases), len(cases))
    return [mixed[((first or 0) + i) % len(mixed)] for i in range(min(count, len(mixed)))]


def of(few: T, many: T) -> T:
    """``few`` by default, ``many`` with ``--full``."""
    return many if FULL else few
