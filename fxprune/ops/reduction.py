"""What every token reducer does alike: check its counts, compare tokens, keep precision, pass protected tokens by."""

from __future__ import annotations

from typing import Any

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


def similarity(one: Tensor, two: Tensor) -> Tensor:
    """Cosines of unit rows ``one`` [b, n, d] and ``two`` [b, m, d] in steps of 2^-14, as whole numbers. [b, n, m]

    Equal tokens are then equally similar on every backend, whatever the order in which a kernel adds up: their ties go
    to the lowest index and not to the last bit. The cosine is rounded and not the directions: rounding every component
    would turn what one kernel computes a little differently into steps of the sum, and flip many more decisions than
    the rounding errors themselves (4 in 1000 merges of 13 tokens, against none seen).
    """
    return (torch.bmm(one, two.transpose(1, 2)) * 2.0**14).round()


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


def outline(x: Tensor, size: Tensor | None, r: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a reducer returns that takes ``r`` of the tokens of ``x`` [batch, tokens, width] away, without its values:
    x' [batch, tokens - r, width], sizes [batch, tokens - r, 1], places [batch, tokens] int64.

    A reducer is some eighty ops, each of which takes a fake tensor milliseconds.
    """
    if not r:
        return unchanged(x, size)
    batch, tokens, width = x.shape
    sizes = x if size is None else size
    grows = torch.is_grad_enabled()
    return (
        x.new_empty(batch, tokens - r, width).requires_grad_(grows and x.requires_grad),
        sizes.new_empty(batch, tokens - r, 1),
        x.new_empty(batch, tokens, dtype=torch.int64),
    )


def count_up(start: int, end: int, like: Tensor) -> Tensor:
    """start .. end - 1 for every image of ``like`` [batch, ...]. [batch, end - start] int64"""
    return torch.arange(start, end, device=like.device).repeat(like.shape[0], 1)


def with_protected(chosen: Tensor, protected: int) -> Tensor:
    """``chosen`` [batch, n] with ``protected`` true ones in front. [batch, protected + n]"""
    return torch.cat([chosen.new_ones(chosen.shape[0], protected), chosen], 1)
