"""Samples of a source that nothing is decided or fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import FxpruneError
from ..intake.load import Loaded
from .batch import Calibration
from .sources import load_data


def hold_out(spec: Any, loaded: Loaded, *, samples: int, seed: int, count: int) -> Calibration | None:
    """At most ``count`` samples of ``spec`` that :func:`load_data` with these ``samples`` and ``seed`` did not take.

    None where there are none: the source holds no more, cannot be read twice in the same order, or is code.
    """
    if isinstance(spec, str) and spec.startswith("python:"):
        return None
    if not isinstance(spec, str | Path | Tensor | np.ndarray | Mapping | list | tuple) and not _in_order(spec):
        return None
    try:
        found = load_data(spec, loaded, samples=count, seed=seed, skip=samples)
    except FxpruneError:
        return None  # what is wrong with other samples is no reason to stop
    return found if found.batches else None


def _in_order(spec: Any) -> bool:
    """Whether it is a data set whose samples can be asked for by number."""
    from torch.utils.data import Dataset

    return isinstance(spec, Dataset) and isinstance(spec, Sized)
