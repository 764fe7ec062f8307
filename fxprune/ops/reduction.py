"""What every token reducer does alike: check its counts, compare tokens, keep precision, pass protected tokens by."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Under the root of a norm: a zero key has no direction, and no NaN either."""


def full(values: Tensor) -> Tensor:
    """``values`` in single precision where they are in half: sums of squares and of sizes overflow or round there."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def unit(metric: Tensor) -> Tensor:
    """Rows of ``metric`` [batch, tokens, d] at length one: ``m / sqrt(sum m^2 + 1e-6)``; zero rows stay zero."""
    metric = full(metric)
    return metric * torch.rsqrt((metric * metric).sum(-1, keepdim=True) + EPS)


def direction(metric: Tensor) -> Tensor:
    """Unit rows of ``metric`` [batch, tokens, d] in steps of 1/4000, as whole numbers: ``round(4000 unit(m))``.

    Dot products of whole rows up to 4000 long stay below 2^24, so single precision adds them up without rounding,
    whatever the order: equal tokens are equally similar on every backend. Without this their ties would go to the last
    bit of some kernel, and differ between a graph and its ONNX file, or between batch sizes. A cosine is off by 1e-4
    or so, less than half precision makes it.
    """
    return (unit(metric) * 4000.0).round()


def check_counts(tokens: int, r: int, protected: int, most: int) -> None:
    """Raise ValueError unless the first ``protected`` of ``tokens`` exist and ``r`` is from 0 to ``most``."""
    if not 0 <= protected <= tokens:
        raise ValueError(f"There are {tokens} tokens, so 'protected' cannot be {protected}.")
    if not 0 <= r <= max(most, 0):
        raise ValueError(
            f"Of {tokens} tokens, {protected} of them protected, this reducer removes 0 to {max(most, 0)}, not {r}."
        )


def sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """``size``, or ones: how many input tokens each token of ``x`` [batch, tokens, width] stands for."""
    return x.new_ones(x.shape[0], x.shape[1], 1) if size is None else size


def unchanged(x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a reducer returns when it removes nothing. Copies: an op's results never alias its arguments."""
    place = count_up(0, x.shape[1], x)
    return x.clone(), sizes(x, size).clone(), place


def count_up(start: int, end: int, like: Tensor) -> Tensor:
    """start .. end - 1 for every image of ``like`` [batch, ...]. [batch, end - start] int64"""
    return torch.arange(start, end, device=like.device).repeat(like.shape[0], 1)


def with_protected(chosen: Tensor, protected: int) -> Tensor:
    """``chosen`` [batch, n] with ``protected`` true ones in front. [batch, protected + n]"""
    return torch.cat([chosen.new_ones(chosen.shape[0], protected), chosen], 1)
