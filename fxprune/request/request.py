"""``Request``: what one run is to make, as it was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import OptionError
from ..target.backend import Backend
from .goal import Goal, check_samples
from .latency import LatencyGoal
from .options import Limits
from .tiles import TileGoal

if TYPE_CHECKING:
    from ..passes.analysis.find_groups import FindGroups


@dataclass(frozen=True)
class Request:
    """What one run is to make. What is wrong with it is an OptionError here: it must not cost a minute of scoring.

    goal      what a search is to reach; None where nothing is searched: tiles alone, or a plan that is given
    tiles     zero tiles inside weights, after slicing
    latency   how time is measured, and what for
    samples   of calibration data, drawn or made up; auto: as many as cost little
    held_out  the share of the data that nothing is decided or fitted on; None: a fifth of many, where no others are
    page      write the report as a page as well
    options   what the caller asked for, by option: the report's ``options``
    """

    target: str = "eager"
    out: str | os.PathLike[str] | None = None
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    goal: Goal | None = None
    tiles: TileGoal | None = None
    latency: LatencyGoal = field(default_factory=LatencyGoal)
    samples: int | str = "auto"
    held_out: float | None = None
    page: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise OptionError("the share that is held out lies between 0 and 1", where=f"--held-out {self.held_out:g}")
        check_samples(self.samples)
        self.find_groups  # noqa: B018  makes the backend, and reads the limits
        if not self.backend.any_graph and self.goal is not None and self.goal.tokens is not None:
            raise OptionError(
                f"the target '{self.backend.name}' cannot reduce tokens",
                where=f"--target {self.target}",
                why="the model's class computes with all of them",
                cure="leave `--tokens` away, or take `--target eager` or `--target onnx`",
            )

    @cached_property
    def backend(self) -> Backend:
        """The target itself."""
        table = self.tiles.tiling.table if self.tiles is not None else ""
        return registry.target(self.target, **({"table": table} if table else {}))

    @cached_property
    def find_groups(self) -> FindGroups:
        """The pass that knows the limits. Tiles are whole ones: what is sliced before them leaves sides divisible."""
        return self.limits.find_groups(self.backend.granularity, whole_steps=self.tiles is not None)
