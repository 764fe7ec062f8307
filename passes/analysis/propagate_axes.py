"""``PropagateAxes``: what every tensor dimension of the graph is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ...pipeline import Analysis
from ...program import Program
from .walk import Walk


@dataclass(frozen=True)
class PropagateAxes(Analysis):
    """Walk the graph once and state its axes, literals and costs (see ``fxprune.axis`` for the data model).

    Gives ``program.axes``. Time is linear in the number of nodes; nothing is kept per element.
    An op without a rule freezes the axes it touches, with the reason: never guess.
    """

    gives = ("axes",)

    def run(self, program: Program) -> Program:
        return program.but(axes=Walk(program).axes())
