"""Axis rules by op family. A rule reads an op's arguments by schema name and returns the dims of its output.

To add one, copy the family's nearest rule. It may ``unify`` dims that must agree, ``contract`` a dim it sums over,
``freeze`` a dim whose elements are not interchangeable any more, and state a ``literal`` for each constant argument
that follows from an axis. When in doubt, freeze: a frozen axis costs compression, a wrong rule costs correctness.
"""

from . import (
    attention,
    constants,
    contract,
    convolution,
    indexing,
    joining,
    norms,
    pointwise,
    reduce,
    shape,
    sparse,
    tokens,
)

__all__ = [
    "attention",
    "constants",
    "contract",
    "convolution",
    "indexing",
    "joining",
    "norms",
    "pointwise",
    "reduce",
    "shape",
    "sparse",
    "tokens",
]
