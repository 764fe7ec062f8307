"""What the result may cost, and how time is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .table import COMMANDS, SEARCHING, Titles, make_list_parser, option

Amount: TypeAlias = float | int | str | None

_NO_FILE = "what is timed is the file of a target, and torch.compile writes none"
_PER_CALL = "samples per call, where latency is measured (default: {default})"
_MEASURED = "compile meets a budget of time, by measuring and searching again; a sweep times all its points (--seconds)"


@dataclass(frozen=True)
class Budgets:
    """What the result may cost: one of these is given."""

    TITLES: ClassVar[Titles] = {"": "budget (exactly one)", "demo": ""}

    flops: Amount = option(
        None,
        "B",
        "multiply-accumulates: a ratio such as 0.5, or 2.3G",
        SEARCHING,
        at={"demo": {"default": "0.5", "help": "share of the MACs that stays (default: {default})"}},
    )
    params: Amount = option(None, "B", "parameters: a ratio, or 20M", SEARCHING)
    bytes: Amount = option(None, "B", "bytes of parameters and buffers: a ratio, or 64MiB", SEARCHING)
    latency: Amount = option(
        None,
        "R",
        "time on the target, measured here: a share of the dense model's",
        "compile plan",
        in_passes=True,
        at={"sweep": {"refused": _MEASURED}, "dynamo": {"refused": _NO_FILE}},
    )
    latency_ms: Amount = option(
        None,
        "MS",
        "time of one call on the target, in milliseconds",
        "compile plan",
        in_passes=True,
        at={"sweep": {"refused": _MEASURED}, "dynamo": {"refused": _NO_FILE}},
    )


@dataclass(frozen=True)
class Latency:
    """How time is measured, and what for besides a budget of it."""

    TITLES: ClassVar[Titles] = dict.fromkeys(("apply", "lower"), "latency of the result") | {
        "": "latency",
        "export": "gates",
        "bench": "",
        "verify": "",
    }

    batch: int = option(
        1,
        "N",
        "samples per call (default: {default})",
        "apply lower",
        parse=int,
        at={
            "compile": {"help": _PER_CALL},
            "plan": {"help": _PER_CALL},
            "export": {"help": "batch of that call (default: {default})"},
            "bench": {
                "name": "batches",
                "default": (1, 32),
                "metavar": "N,N",
                "help": "batch sizes (default: {default})",
                "parse": make_list_parser("batch", "batch sizes", "1,32", int, 1),
            },
        },
    )
    threads: int = option(
        0,
        "N",
        "CPU threads (default: PyTorch's own choice)",
        COMMANDS,
        title="output",
        parse=int,
        python="compile plan apply lower bench export",
    )
    latency_table: str | os.PathLike[str] | None = option(
        None,
        "FILE",
        "go by a recorded table (latency.json of an artefact) and measure nothing: the same plan on every machine",
        "compile plan",
    )
    expect_latency: bool = option(
        False,
        "",
        "with another budget: measure the target, and report what to expect and what would help",
        "compile plan",
        in_passes=True,
    )
    seconds: float | None = option(
        None,
        "S",
        "time the written file beside the dense model's for so long; 0 leaves it out (default: about 2)",
        "compile apply lower",
        title="latency of the result",
        parse=float,
        at={
            "export": {"title": "gates", "default": 2.0, "help": "time to measure it for (default: {default})"},
            "verify": {"title": "", "default": 2.0, "help": "time to measure latency for (default: {default})"},
            "bench": {"title": "", "default": 5.0, "help": "time to spend per batch size (default: {default})"},
        },
    )
