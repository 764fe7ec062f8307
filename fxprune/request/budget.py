"""The one budget that a request gives: a share or an amount of MACs, parameters, bytes or time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ..errors import OptionError
from ..ir.cost import METRICS, Budget

if TYPE_CHECKING:
    from .tokens import TokenWish

Amount: TypeAlias = float | int | str | None


def budget_or_none(
    flops: Amount,
    params: Amount,
    bytes: Amount,
    tokens: TokenWish | None,
    latency: Amount = None,
    latency_ms: Amount = None,
) -> Budget | None:
    """The one budget that is given; none where the token counts are explicit. Raises OptionError otherwise."""
    given = (flops, params, bytes, latency, latency_ms)
    if given == (None,) * len(given) and tokens is not None and tokens.explicit:
        return None
    return one_budget(*given)


def one_budget(
    flops: Amount, params: Amount, bytes: Amount, latency: Amount = None, latency_ms: Amount = None
) -> Budget:
    """The one budget that is given. Raises OptionError for none, several, or one that makes no sense."""
    names, values = (*METRICS, "latency", "latency-ms"), (flops, params, bytes, latency, latency_ms)
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if len(given) != 1:
        raise OptionError(
            "give exactly one budget",
            where=", ".join(f"--{n} {v}" for n, v in given.items()),
            why=f"found {len(given)} of flops, params, bytes and latency",
            cure="for example --flops 0.5",
        )
    name, value = next(iter(given.items()))
    return (
        Budget.of_latency(value, ms=name == "latency-ms") if name.startswith("latency") else Budget.parse(name, value)
    )
