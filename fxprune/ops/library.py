"""How an op is made: a schema, and a reference in plain ATen that is also its fake and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

Shape = tuple[int, ...]
NAMESPACE = "fxprune"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """One op.

    name       ``fxprune::<name>``
    reference  the function in plain ATen, export-safe: static counts, no data-dependent shapes, no sort, no scatter
    macs       multiply-accumulates of its products for one sample, from the shapes of its tensor arguments (batch
               first, None where one is left out) and its other arguments by name
    outline    its results without their values, from its arguments by name; None: they are found by running the
               reference on fake tensors, op by op
    """

    name: str
    reference: Callable[..., Any]
    macs: Callable[..., int]
    outline: Callable[..., Any] | None = None

    @property
    def target(self) -> OpOverload:
        """What a graph's node calls."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


OPS: dict[str, Op] = {}
"""Ops by ``fxprune::name``."""


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    macs: Callable[..., int],
    outline: Callable[..., Any] | None = None,
) -> Op:
    """Register ``fxprune::name`` with ``schema`` (arguments and returns) and return it; the rest as in :class:`Op`."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
    op = OPS[f"{NAMESPACE}::{name}"] = Op(name, reference, macs, outline)
    return op
