"""What one walk over a graph found: its axes, and where they are contracted, stated and frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .axis import Dim, Dims

if TYPE_CHECKING:
    from .sizes import StandIns  # imports sympy


@dataclass(frozen=True)
class Contraction:
    """``node`` sums over ``dim``: the place where removing an element and masking it agree.

    operands: (argument path, dimension) of every operand summed over. A path is a schema name, or ``name.i`` for the
    i-th tensor of a list argument.
    """

    node: str
    dim: Dim
    operands: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Statistic:
    """``node`` computes a mean or variance over dimension ``position`` of ``operand``, by default its first tensor."""

    node: str
    dim: Dim
    position: int
    operand: str = ""


@dataclass(frozen=True)
class Matmul:
    """``node`` multiplies [batch, m, k] with [batch, k, n]; its cost in multiply-accumulates is their product."""

    node: str
    batch: Dims
    m: Dim
    k: Dim
    n: Dim
    form: str = "matmul"  # matmul: of two activations as far as the op knows; linear, conv: with a weight

    @property
    def factors(self) -> Dim:
        """One dim whose total is the number of multiply-accumulates."""
        return (*(axis for dim in self.batch for axis in dim), *self.m, *self.k, *self.n)


@dataclass(frozen=True)
class Literal:
    """A constant in the graph that follows from axes, recomputed when they shrink.

    form   ``shape``: a list of ints, one per dim · ``sum``: one int, the sum of the dims' totals ·
           ``last``: one int, one less than that, the number of the last element ·
           ``split``: rewrite the op to ``split_with_sizes`` with these dims · ``scale``: attention scale, kept at its
           dense value ``total(dim) ** -0.5`` · ``mean``, ``norm``: the op averages over these dims, and divides by
           their dense count whatever stays
    """

    node: str
    argument: str
    form: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Frozen:
    """``dim`` must keep its size, because of ``why`` at ``node``."""

    dim: Dim
    why: str
    node: str


@dataclass(frozen=True)
class Axes:
    """What ``PropagateAxes`` found. All by node name, so that it survives a copy of the graph.

    dims          node -> its dims (one list per output for multi-output nodes, None where there is no tensor)
    tags          free facts ``kind -> [(dim, node)]``: produce, conv, softmax, softmax-input, rep, expert;
                  routed: (experts, the node that chooses the largest); minus-infinity: (experts, the node that
                  reads minus infinity of those that are gone)
    stand_ins     the numbers that symbolic sizes are here
    unknown       op without a rule -> how often it came
    conflicts     (node, reason) of views without a common refinement
    failed        (node, reason) of rules that failed: what they touch is frozen
    """

    dims: Mapping[str, Any]
    literals: tuple[Literal, ...]
    contractions: tuple[Contraction, ...]
    statistics: tuple[Statistic, ...]
    matmuls: tuple[Matmul, ...]
    frozen: tuple[Frozen, ...]
    tags: Mapping[str, tuple[tuple[Dim, str], ...]]
    stand_ins: StandIns
    unknown: Mapping[str, int]
    conflicts: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def sizes(self) -> Mapping[int, int]:
        """Number of a symbolic size -> its size in the example inputs."""
        return self.stand_ins.example

    @property
    def symbols(self) -> Mapping[int, str]:
        """Number of a symbolic size -> its name."""
        return self.stand_ins.names
