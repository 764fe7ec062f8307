"""The one budget that a request gives: a share or an amount of MACs, parameters, bytes or time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError
from ..ir.cost import METRICS, Budget
from .options import Budgets
from .options.table import dashes


def one_budget(asked: Budgets) -> Budget | None:
    """The budget that is given; None: there is none. Raises OptionError for several, or one that makes no sense."""
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    given = {dashes(name): value for name, value in values.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        raise _not_one(given)
    name, value = next(iter(given.items()))
    return (
        Budget.of_latency(value, ms=name == "latency-ms") if name.startswith("latency") else Budget.parse(name, value)
    )


def needed_budget(asked: Budgets) -> Budget:
    """The one budget that is given. Raises OptionError also for none."""
    found = one_budget(asked)
    if found is None:
        raise _not_one({})
    return found


def budgets(asked: Mapping[str, Any]) -> list[Budget]:
    """The ratios of a sweep, of one metric, largest first. Raises OptionError for none, several, or amounts."""
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise OptionError(
            "give the ratios of exactly one budget",
            where=", ".join(f"--{n} {v}" for n, v in given.items()),
            why=f"found {len(given)} of {', '.join(METRICS)}",
            cure="for example `--flops 0.9,0.75,0.5`",
        )
    metric, value = next(iter(given.items()))
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    made = [Budget.parse(metric, word) for word in words if str(word).strip()]
    if not made or not all(b.relative for b in made):
        raise OptionError(
            "a sweep takes ratios", where=f"--{metric} {value}", cure=f"for example `--{metric} 0.9,0.75,0.5`"
        )
    return sorted(dict.fromkeys(made), key=lambda b: -b.amount)


def _not_one(given: dict[str, object]) -> OptionError:
    return OptionError(
        "give exactly one budget",
        where=", ".join(f"--{n} {v}" for n, v in given.items()),
        why=f"found {len(given)} of flops, params, bytes and latency",
        cure="for example `--flops 0.5`",
    )
