"""Every option there is, once: the groups that the help shows, and what each option is, says and applies to.

The command line, fxprune.toml, a report's ``options`` and their replay, ``torch.compile`` and the help are loops over
these fields; a test holds the Python signatures against them. A new option is one field here, and its use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...errors import SPELLING
from .cost import Amount, Budgets, Latency
from .decision import Decision, Limits
from .source import Screen, Source, Writing
from .table import Option, select_options
from .workflows import Delivery, Inner, Inquiry, Judging, Subject, Timing, Tuning

__all__ = [
    "GROUPS", "OF_A_PLAN", "Amount", "Budgets", "Decision", "Delivery", "Inner", "Inquiry", "Judging", "Latency",
    "Limits", "Option", "Screen", "Source", "Subject", "Timing", "Tuning", "Writing", "collect_asked", "every_option",
    "flags", "options_of", "plain",
]  # fmt: skip

GROUPS = (
    Subject, Source, Screen, Budgets, Latency, Judging, Timing, Inquiry, Decision, Delivery, Limits, Writing, Tuning,
    Inner,
)  # fmt: skip


OF_A_PLAN = Limits(align=1, floor=0.0, allow_empty=True)
"""Where a plan is applied: it was made under limits of its own, so only what breaks the model stands in its way."""


@cache
def options_of(door: str) -> Mapping[str, Option]:
    """The options that a command, or ``dynamo``, takes or refuses with a reason, by their names on the command line.

    >>> one = options_of("compile")["head-scale"]
    >>> one.name, one.default, one.title
    ('head_scale', 1, 'decision')
    """
    return {one.flag: one for one in select_options(door, GROUPS)}


@cache
def flags() -> frozenset[str]:
    """The names that options have on the command line, whichever command takes them."""
    doors = {door for one in every_option() for door in (*one.doors, *one.at)} - {"dynamo"}
    return frozenset(one.flag for door in doors for one in options_of(door).values() if not one.place)


@cache
def every_option() -> tuple[Option, ...]:
    """All entries of the table, as no door in particular takes them."""
    return select_options("", GROUPS)


def _spelling() -> dict[str, str]:
    """How Python writes the options of the command line, with the sign that a value follows."""
    found = {}
    for door in ("", "lower", "bench", "dynamo", "compile"):  # the last one counts
        for one in options_of(door).values():
            found[one.flag] = f"{one.name}=True" if one.switch else f"{one.name}="
    return found


SPELLING.update(_spelling())


def collect_asked(door: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a call asked for, by the names of the command line: the report's ``options``.

    given   values by their names in Python; others than options are left out

    >>> collect_asked("compile", {"example_inputs": "1x3", "allow_empty": True, "on_event": print})
    {'command': 'compile', 'input': '1x3', 'allow-empty': True}
    """
    known = (one for one in options_of(door).values() if one.in_python and not one.refused)
    return {"command": door} | {one.flag: given[one.name] for one in known if one.name in given}


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain data for a report: what JSON has no form for is named by its type, as ``<DataLoader>``.

    >>> plain({"flops": 0.5, "freeze": ("a", "b"), "data": object()})
    {'flops': 0.5, 'freeze': ['a', 'b'], 'data': '<object>'}
    """

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return str(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, list | tuple) and all(v is None or isinstance(v, str | int | float) for v in value):
            return [one(v) for v in value]
        return f"<{type(value).__name__}>"

    return {name: one(value) for name, value in options.items()}
