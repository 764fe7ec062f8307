"""What commands ask beside a model and a decision: a sweep, an export, a measurement, a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import OptionError
from .table import REQUIRED, Titles, make_list_parser, option

_ARTIFACT = "a directory that compile wrote"


@dataclass(frozen=True)
class Subject:
    """What a command is about, where it is no model."""

    artifact: Any = option(REQUIRED, "ARTIFACT", _ARTIFACT, "lower explain bench", place="1")
    artifacts: Any = option(
        REQUIRED, "ARTIFACT", "directories that compile, apply or sweep wrote", "report", place="*", python=""
    )
    group: Any = option(
        REQUIRED, "GROUP", "a name from its report, e.g. blocks.0.mlp.fc1:ffn", "explain", place="1", python=""
    )
    directory: Any = option(REQUIRED, "DIR", "what `fxprune export` wrote", "verify", place="1", flag="delivery")
    topic: Any = option(
        None,
        "TOPIC",
        "what to read about, or a command; without one the topics are listed",
        "help",
        place="?",
        python="",
    )


@dataclass(frozen=True)
class Judging:
    """What points of a sweep are judged on, and how the smallest good one is looked for.

    data      labels optional: any kind of ``--data``; None holds a share of the calibration data back
    held_out  that share: neither scoring nor recovery sees it
    samples   at most so many of ``data``
    max_drop  how much of the dense measure may go: of accuracy, or of an agreement of 1. None picks nothing
    bisect    more ratios to try between the last good one and the first bad one
    """

    TITLES: ClassVar[Titles] = {"": "sweep (budgets are ratios: --flops 0.9,0.75,0.6,0.5,0.4)"}

    data: Any = option(
        None,
        "DATA",
        "data to judge on, such as a test split; by default a part of --data that nothing else sees",
        "sweep",
        flag="judge",
        name="judge",
    )
    held_out: float = option(0.25, "SHARE", "that part (default: {default})", "sweep", parse=float)
    samples: int = 1024
    max_drop: float | None = option(
        None,
        "X",
        "pick the smallest that loses at most so much accuracy (0.01 is a point), or agreement with the dense model "
        "where there are no labels; ratios between the given ones are tried as well",
        "sweep",
        parse=float,
    )
    bisect: int = option(3, "N", "how many of them (default: {default})", "sweep", parse=int)

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise OptionError("the share that is held out lies between 0 and 1", where=f"--held-out {self.held_out:g}")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise OptionError(
                "a drop is a share between 0 and 1",
                where=f"--max-drop {self.max_drop:g}",
                cure="0.01 allows one point of a hundred",
            )
        if self.bisect < 0 or self.samples < 1:
            raise OptionError("counts cannot be negative", where=f"--bisect {self.bisect}, samples {self.samples}")


@dataclass(frozen=True)
class Timing:
    """What is timed once all points of a sweep are there, interleaved: the target's files and the dense model's.

    seconds  per point and batch size; 0 times nothing
    """

    TITLES: ClassVar[Titles] = Judging.TITLES

    batches: tuple[int, ...] = option(
        (1,),
        "N,N",
        "batch sizes to time (default: {default})",
        "sweep",
        parse=make_list_parser("batches", "batch sizes", "1,32", int, 1),
    )
    seconds: float = option(
        1.0,
        "S",
        "time per point and batch size, all points in turns; 0 times nothing (default: {default})",
        "sweep",
        parse=float,
    )


@dataclass(frozen=True)
class Inquiry:
    """What else a command looks at, draws or repeats."""

    sensitive: bool = option(
        False,
        "",
        "also measure what cutting each layer alone does",
        "sweep",
        flag="sensitivity",
        title=Judging.TITLES[""],
    )
    graph: str | None = option(
        None, "FILE", "draw the coupling graph into this .svg or .dot file", "inspect", python=""
    )
    against: Any = option(
        None,
        "MODEL",
        "model.pt, model.pt2, a Hugging Face folder, or timm:NAME",
        "lower",
        title="the dense model, to be timed beside the result",
        at={"bench": {"title": "", "help": "another artefact, or a model, lowered to the same target"}},
    )
    recorded: bool = option(
        False,
        "",
        "write what was measured into ARTIFACT's report and page; --against is then the dense model",
        "bench",
        flag="record",
    )
    schema: bool = option(False, "", "print the schema of report.json on stdout, and stop", "report", python="")
    top: int = option(
        8,
        "N",
        "elements listed on either side of the cut (default: {default}; --json has all)",
        "explain",
        python="",
        parse=int,
    )
    epochs: int = option(15, "EPOCHS", "training epochs (default: {default})", "demo", parse=int)


@dataclass(frozen=True)
class Delivery:
    """What a delivery is held to, and judged by."""

    TITLES: ClassVar[Titles] = {"": "gates", "verify": ""}

    data_samples: int = option(128, "N", "of it (default: {default})", "export", title="recovery", parse=int)
    verify: Any = option(
        REQUIRED, "DATA", "data to judge by, not what the plan was made from; labels optional", "export"
    )
    metric: str = option(
        "auto",
        "NAME",
        "with labels top1, f1, spearman or miou; without, against the dense model: agreement, spearman or cosine "
        "(default: what fits)",
        "export",
    )
    max_drop: float | None = option(
        None,
        "X",
        "largest fall of the metric below the dense model's: 0.01 is one point; without labels the largest share of "
        "samples that disagree with the dense model",
        "export",
        parse=float,
    )
    max_kl: float | None = option(
        None, "X", "without labels: largest divergence from it, in nats", "export", parse=float
    )
    max_latency_ms: float | None = option(None, "MS", "largest median latency of a call", "export", parse=float)
    carry: float = option(
        256,
        "MIB",
        "data that may lie in the delivery, so that `fxprune verify` needs nothing else (default: {default})",
        "export",
        parse=float,
    )
    skip_latency: bool = option(False, "", "on a machine that is not the one the limit is about", "verify", python="")
    junit_file: str | os.PathLike[str] | None = option(
        None, "FILE", "write the gates as a JUnit report as well", "export verify", flag="junit"
    )
    force: bool = option(False, "", "do it again even where the same request passed before", "export")


@dataclass(frozen=True)
class Tuning:
    """What block-sparse layers are measured at."""

    shapes: str | None = option(
        None, "NxK,..", "layers, outputs x inputs (default: those of DeiT-S and DeiT-B)", "tune", python=""
    )
    rows: str | None = option(None, "M,M", "rows they are applied to (default: 197, 1576, 12608)", "tune", python="")
    blocks: str | None = option(None, "TILE,..", "tiles (default: all that the kernel knows)", "tune", python="")
    density: str | None = option(
        None, "D,D", "shares of tiles that are kept (default: 0.1,0.25,0.5,0.75)", "tune", python=""
    )
    dtype: str = option("", "DTYPE", "default: bfloat16 for triton, float32 for onnx", "tune")


@dataclass(frozen=True)
class Inner:
    """What ``torch.compile`` is asked besides."""

    inner: str = option("inductor", "NAME", "what compiles the pruned graph: inductor, aot_eager or eager", "dynamo")
    fallback: bool = option(
        False,
        "",
        "in training mode, with inputs that require gradients, and where a graph cannot be pruned: run the dense "
        "model (compiled by inner) instead of raising an error",
        "dynamo",
    )
