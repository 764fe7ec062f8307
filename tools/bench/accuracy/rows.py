"""The rows of tools/bench/accuracy.py: which parts make a method, and whether all of them are there."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from fxprune.data.batch import Calibration
from fxprune.errors import OptionError
from fxprune.ir.pipeline import Pass
from fxprune.passes.analysis.score_groups import criterion as criterion_of
from fxprune.passes.transform.recover import METHODS

PEER = ("uniform", "uniform global", "bottleneck", "bottleneck global", "bottleneck isomorphic")
REARRANGE = "fxprune.passes.search.rearrange", "Rearrange"


@dataclass(frozen=True)
class Row:
    """One method.

    criterion   as on the command line: ``fisher`` or ``trajectory{probes=32}``; of a peer, its importance
    rearrange   mask rearrangement after the search
    recover     recovery after the choice
    labels      whether it sees labels of calibration samples, where the task has any that a criterion can use
    only_labelled   no row of its own on tasks without such labels (there it would equal another one)
    seeded      whether calibration data or chance plays a part; other rows are measured once
    variants    settings of a peer: all are measured at the first seed, the best of them at the others
    product     the command as users run it decides everything; criterion and members are its own
    """

    name: str
    criterion: str
    title: str
    rearrange: bool = False
    recover: str = "none"
    labels: bool = False
    only_labelled: bool = False
    seeded: bool = True
    variants: tuple[str, ...] = ()
    product: bool = False

    @property
    def peer(self) -> bool:
        return bool(self.variants)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


ROWS = {
    row.name: row
    for row in (
        Row("random", "random", "random"),
        Row("l2", "l2", "L2 magnitude", seeded=False),
        Row("taylor", "taylor", "Taylor", labels=True),
        Row("ptf", "fisher", "Fisher (PTF)", labels=True),
        Row("ptf-unlabelled", "fisher", "Fisher without labels", only_labelled=True),
        Row("ptf-tuned", "fisher", "PTF with tuning", rearrange=True, recover="scale", labels=True),
        Row("optin", "trajectory", "OPTIN"),
        Row("default", "trajectory", "fxprune compile --data", recover="auto", product=True),
        Row("optin-recover", "trajectory", "OPTIN with recovery", recover="auto"),
        Row("optin-tune", "trajectory", "OPTIN, recovery, 200 steps", recover="tune"),
        Row("obs-recover", "obs", "OBS with recovery", recover="auto"),
        Row("torch-pruning-l2", "l2", "Torch-Pruning L2", seeded=False, variants=PEER),
        Row("torch-pruning-taylor", "taylor", "Torch-Pruning Taylor", labels=True, variants=PEER),
    )
}
BEST = "default"  # what a user gets
VARIANTS = ("optin-tune",)  # the same with more behind it: no rivals of the best row


def missing(row: Row) -> str:
    """What keeps ``row`` from being measured by this fxprune, or nothing."""
    if row.peer:
        return "" if importlib.util.find_spec("torch_pruning") else "the package torch-pruning is not installed"
    try:
        criterion_of(row.criterion)
    except OptionError as error:
        return error.what
    if row.recover not in METHODS:
        return f"unknown recovery '{row.recover}'"
    return "" if not row.rearrange or _rearrange() else "there is no pass Rearrange"


def _rearrange() -> type[Pass] | None:
    try:
        found: type[Pass] = getattr(importlib.import_module(REARRANGE[0]), REARRANGE[1])
    except (ImportError, AttributeError):
        return None
    return found


def rearrange_pass(data: Calibration, seed: int) -> Pass:
    """The pass, with data and seed where it takes any."""
    made = _rearrange()
    if made is None:
        raise OptionError("there is no pass Rearrange")
    takes = inspect.signature(made).parameters
    return made(**{k: v for k, v in {"data": data, "seed": seed}.items() if k in takes})
