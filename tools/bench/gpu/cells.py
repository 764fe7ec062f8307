"""A stage is a list of cells, in the order of what they are worth; a cell makes one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where cells run, and at which size.

    out   the folder of the results: a cell may read those before it
    dry   at toy size on the CPU: everything but the device
    """

    out: Path
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def wait(self) -> None:
        """Until the device has done what it was given: who times a call must not time the launch alone."""
        if not self.dry:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Cell:
    """One figure or a few that belong together. ``run`` may raise anything: the record then says what."""

    name: str
    run: Callable[[], Record]


@dataclass(frozen=True)
class Stage:
    """A list of cells with a time of its own.

    seconds      that it may take on a data-centre GPU; cells that are left then are taken up by the next run
    cells        of a setting
    columns      of the page's table
    unexercised  what a dry run leaves out, in words
    interpreted  a dry run of it needs Triton's interpreter
    """

    name: str
    title: str
    seconds: int
    cells: Callable[[Setting], Sequence[Cell]]
    columns: tuple[str, ...]
    unexercised: tuple[str, ...] = ()
    interpreted: bool = False

    def path(self, out: Path) -> Path:
        """Its results."""
        return out / f"{self.name}.json"
