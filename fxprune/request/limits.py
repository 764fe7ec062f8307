"""Limits of a search in text: for all groups, or for those that a pattern names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from ..errors import OptionError

AUTO = "auto"  # an alignment: what the target is measured to like
Align: TypeAlias = int | str | Sequence[int | str] | None
Floor: TypeAlias = float | str | Sequence[float | str] | None


def per_pattern(given: Align | Floor, option: str) -> tuple[float | None, tuple[str, ...]]:
    """The plain number among what was given (the last one wins, None where there is none), and the ``PATTERN=NUMBER``.

    >>> per_pattern("8,*.ffn=32", "--align")
    (8.0, ('*.ffn=32',))
    """
    if given is None:
        return None, ()
    several = [given] if isinstance(given, int | float | str) else list(given)
    plain, patterns = None, []
    for part in (p.strip() for one in several for p in str(one).split(",")):
        if part == AUTO and option == "--align":
            continue
        _, equals, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise OptionError(
                f"'{part}' cannot be read",
                where=f"{option} {part}",
                cure=f"write a number, or PATTERN=NUMBER such as 'blocks.*.mlp={_EXAMPLES[option]}'",
            ) from None
        if equals:
            patterns.append(part)
        else:
            plain = value
    return plain, tuple(patterns)


def is_measured(align: Align) -> bool:
    """Whether ``auto`` is among what was given.

    >>> is_measured(["auto", "*.ffn=32"]), is_measured(8)
    (True, False)
    """
    several = [align] if isinstance(align, int | str) or align is None else list(align)
    return any(p.strip() == AUTO for one in several for p in str(one).split(","))


_EXAMPLES = {"--align": "32", "--floor": "0.3"}


def whole(number: float, option: str) -> int:
    """``number`` as an integer. Raises OptionError for a fraction."""
    if number != int(number):
        raise OptionError("a multiple is a whole number", where=f"{option} {number:g}")
    return int(number)
