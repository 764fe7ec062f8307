"""The one budget that a request gives: a share or an amount of MACs, parameters, bytes or time."""

from __future__ import annotations

import dataclasses

from ..errors import OptionError
from ..ir.cost import Budget
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


def require_budget(asked: Budgets) -> Budget:
    """The one budget that is given. Raises OptionError also for none."""
    found = one_budget(asked)
    if found is None:
        raise _not_one({})
    return found


def _not_one(given: dict[str, object]) -> OptionError:
    return OptionError(
        "give exactly one budget",
        where=", ".join(f"--{n} {v}" for n, v in given.items()),
        why=f"found {len(given)} of flops, params, bytes and latency",
        cure="for example `--flops 0.5`",
    )
