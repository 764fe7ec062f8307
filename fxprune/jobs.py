"""Long work, cut into jobs whose results are added up in one fixed order, whoever computed them and when.

    for found in run_jobs("fisher", len(batches), lambda i: {"head": score(batches[i])}):
        total += found["head"]

The order of the results is that of the jobs, so that sums do not depend on how the work was shared: one process and
many, interrupted or not, give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Result: TypeAlias = dict[str, Tensor]


def run_jobs(name: str, count: int, work: Callable[[int], Result]) -> list[Result]:
    """Results of jobs 0..count-1, in that order.

    name   of this kind of work, unique within a run (``trajectory.heads``): people read it, and it keys what is stored
    work   job number -> tensors by name; must depend on nothing but the number, and move its tensors to the CPU
    """
    return [work(i) for i in range(count)]


def add_up(tensors: Result) -> Result:
    """The sum of each tensor over all processes that share the work, in every one of them; one process: as given."""
    return tensors


def mine(count: int) -> range:
    """Which of jobs 0..count-1 this process does: each belongs to exactly one process. One process: all of them."""
    return range(count)
