"""What every criterion is: a name, a unit, and scores for each prunable group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ....data import Calibration
from ....group import PruneGroup
from ....program import Program


class Criterion(ABC):
    """How much it hurts to lose an element.

    name        as on the command line
    unit        what one unit of score means
    needs_data  True when the model must run on calibration inputs
    comparable  True when scores of different groups may be ranked against each other (estimated losses);
                False when they only rank elements within a group (norms): a search then ranks shares
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False

    @abstractmethod
    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        """Group name -> [size] non-negative scores, for every prunable group. ``data`` is there if ``needs_data``."""

    def refine(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        """Group name -> [size] better scores for what the program's plan left in doubt; {} where there are none."""
        return {}

    def notes(self, program: Program) -> Sequence[str]:
        """What the user should know about these scores."""
        return ()


def prunable(program: Program) -> list[PruneGroup]:
    """The groups that want a score."""
    return [g for g in program.need("groups") if g.prunable]
