"""Samples that nothing is decided or fitted on: the result is judged by them."""

from __future__ import annotations

import dataclasses

from ..data.batch import Calibration
from ..errors import OptionError
from ..ir.program import Program
from ..request.request import Request

HELD, SUFFICIENT = 0.2, 160
"""Share of the data that is held back from so many samples on, and so many samples."""


def share_to_hold_back(request: Request, dense: Program, data: Calibration | None, held: Calibration | None) -> float:
    """As asked for; else a fifth of many samples where their source holds no others. With fewer, each is worth more to
    a fit, and the guard of recovery judges fits by samples that they did not see."""
    if request.held_out is not None:
        return request.held_out
    short = data is None or held is not None or data.generated or dense.fixed_batch
    return 0.0 if short or data is None or data.samples < SUFFICIENT else HELD


def hold_back(dense: Program, data: Calibration | None, share: float) -> tuple[Calibration, Calibration]:
    """(the rest, a share of the data that is kept from everything that decides or fits: the result is judged on it)."""
    from ..passes.transform.recovery.choose import split

    rest, held = ([], []) if data is None else split(dense, data, share)
    if data is None or not held or not rest:
        raise OptionError(
            "there is too little data to hold some back",
            where=f"--held-out {share:g}",
            why="there is none" if data is None else f"{data.samples} samples in batches that cannot be divided",
            cure="give more; a sweep may `--judge` on other data",
        )
    one, two = (dataclasses.replace(data, batches=tuple(part)) for part in (rest, held))
    return one, two
