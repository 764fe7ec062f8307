"""What is asked of measured time, and how it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import OptionError
from .limits import is_measured
from .options import Budgets, Latency, Limits

MISS = 0.05  # of the target: more than that, either way, and the search is repeated
FILE = "latency.json"


@dataclass(frozen=True)
class LatencyGoal:
    """How latency is measured, and what for besides a budget of it.

    batch    samples per call;  threads: CPU threads of the runtime, 0 leaves it the choice
    table    path of a table to go by, whole: nothing is measured then, and the plan is the same on every machine
    expect   measure also where the budget is one of MACs, parameters or bytes
    align    let the measured table say what kept counts are multiples of
    seconds  to time the delivered file for, beside the dense one; None: a short while, 0: not at all
    """

    batch: int = 1
    threads: int = 0
    table: str = ""
    expect: bool = False
    align: bool = False
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise OptionError("a batch holds at least one sample", where=f"--batch {self.batch}")
        if self.threads < 0:
            raise OptionError("threads cannot be negative", where=f"--threads {self.threads}")
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            raise OptionError(
                "time to measure cannot be negative", where=f"--seconds {self.seconds:g}", cure="0 measures nothing"
            )


def latency_goal(asked: Latency, budget: Budgets, limits: Limits, zeros: bool) -> LatencyGoal:
    """How time is measured in a run that decides. Raises OptionError where options do not go together.

    zeros   tiles inside weights are asked for
    """
    timed = budget.latency is not None or budget.latency_ms is not None
    if zeros and (timed or asked.expect_latency):
        raise OptionError(
            "zeros inside weights have no latency that can be predicted",
            where="--latency, --blocks",
            why="the table holds dense layers of fewer rows and columns",
            cure="give `--flops`",
        )
    return LatencyGoal(
        asked.batch,
        asked.threads,
        "" if asked.latency_table is None else str(asked.latency_table),
        asked.expect_latency,
        is_measured(limits.align),
        asked.seconds,
    )
