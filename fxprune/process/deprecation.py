"""Deprecation: what is going to go still works, says so, and is found by a test once its time is over.

    @deprecated(since="0.2", removed="0.4", instead="fxprune.compile")
    def old(...): ...

    @renamed(since="0.2", removed="0.4", ratio="flops")     # keyword ratio= is flops= now
    def compile(...): ...

The policy is in ``fxprune help versions``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import OptionError

F = TypeVar("F", bound=Callable[..., Any])


class FxpruneDeprecation(FutureWarning):
    """Something that a coming release removes. Shown by default: it is for whoever runs the program."""


@dataclass(frozen=True)
class Deprecation:
    """what is going, since which release, which one removes it, and what to use instead"""

    what: str
    since: str
    removed: str
    instead: str

    def __post_init__(self) -> None:
        if not number(self.since)[:2] < number(self.removed)[:2]:
            raise ValueError(f"{self.what} must live for at least one minor release: {self.since} to {self.removed}")

    def __str__(self) -> str:
        return f"{self.what} is deprecated since {self.since} and goes in {self.removed}: use {self.instead}"

    def over(self, version: str) -> bool:
        """Whether ``version`` should not have it any more."""
        return number(version) >= number(self.removed)

    def warn(self, stacklevel: int) -> None:
        warnings.warn(str(self), FxpruneDeprecation, stacklevel=stacklevel + 1)


DEPRECATED: list[Deprecation] = []
"""Everything that is deprecated now; filled as modules are imported."""


def deprecated(*, since: str, removed: str, instead: str) -> Callable[[F], F]:
    """A function that works and warns."""

    def mark(function: F) -> F:
        one = Deprecation(f"{function.__name__}()", since, removed, instead)
        DEPRECATED.append(one)

        @functools.wraps(function)
        def warn(*args: Any, **kwargs: Any) -> Any:
            one.warn(stacklevel=2)
            return function(*args, **kwargs)

        return warn  # type: ignore[return-value]

    return mark


def renamed(*, since: str, removed: str, **names: str) -> Callable[[F], F]:
    """A function that takes old keyword names, with a warning. names: old = new. Both at once is an OptionError."""

    def mark(function: F) -> F:
        known = {
            old: Deprecation(f"{function.__name__}({old}=..)", since, removed, f"{new}=..")
            for old, new in names.items()
        }
        DEPRECATED.extend(known.values())

        @functools.wraps(function)
        def translate(*args: Any, **kwargs: Any) -> Any:
            for old in known.keys() & kwargs.keys():
                if names[old] in kwargs:
                    raise OptionError(
                        f"'{old}' and '{names[old]}' are the same option",
                        where=function.__name__,
                        cure=f"give {names[old]} alone",
                    )
                known[old].warn(stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return translate  # type: ignore[return-value]

    return mark


def number(version: str) -> tuple[int, ...]:
    """A version to compare by; what follows the numbers (``rc1``, ``.dev0``) does not count.

    >>> number("0.10.0rc1") > number("0.9")
    True
    """
    parts = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)
