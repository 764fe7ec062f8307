"""Options that several commands share, and what they mean to the API."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingDevice, OptionError
from ..request.limits import FLOOR
from .parser import Parser


def model(p: Parser) -> None:
    """The model, and how to load it."""
    p.add_argument("model", metavar="MODEL", help="model.pt, model.pt2, a Hugging Face folder, or timm:NAME")
    group = p.add_argument_group("loading")
    group.add_argument("--checkpoint", metavar="FILE", help="weights for timm:NAME (.pt, .pth, .safetensors)")
    group.add_argument("--input", metavar="SHAPE|FILE", help="example inputs: 1x3x224x224, or a file of tensors")
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="run whatever code the pickle holds: only for files whose author you trust",
    )
    config(p)
    output(p)


def config(p: Parser) -> None:
    """Options from a file."""
    p.add_argument(
        "--config",
        metavar="FILE",
        help=(
            "options from a TOML file with the same names, or from a report.json (default: fxprune.toml, if it is here)"
        ),
    )


def output(p: Parser) -> None:
    """Who reads the result."""
    group = p.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    group.add_argument("--quiet", "-q", action="store_true", help="no progress and no tables; warnings and errors stay")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def budget(p: Parser, timed: bool = True) -> None:
    """What the result may cost; timed: also in time on the target."""
    group = p.add_argument_group("budget (exactly one)")
    group.add_argument("--flops", metavar="B", help="multiply-accumulates: a ratio such as 0.5, or 2.3G")
    group.add_argument("--params", metavar="B", help="parameters: a ratio, or 20M")
    group.add_argument("--bytes", metavar="B", help="bytes of parameters and buffers: a ratio, or 64MiB")
    if not timed:
        return
    group.add_argument("--latency", metavar="R", help="time on the target, measured here: a share of the dense model's")
    group.add_argument("--latency-ms", metavar="MS", help="time of one call on the target, in milliseconds")
    group = p.add_argument_group("latency")
    group.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help=("samples per call, where latency is measured (default: %(default)s)"),
    )
    group.add_argument(
        "--latency-table",
        metavar="FILE",
        help=(
            "go by a recorded table (latency.json of an artefact) and measure nothing: the same plan on every machine"
        ),
    )
    group.add_argument(
        "--expect-latency",
        action="store_true",
        help=("with another budget: measure the target, and report what to expect and what would help"),
    )


def limits(p: Parser) -> None:
    """What a search may not cross."""
    group = p.add_argument_group("limits")
    group.add_argument(
        "--align",
        action="append",
        default=[],
        metavar="N|PATTERN=N",
        help=(
            "neurons and channels in multiples of N (default: 8); auto: what the target is measured to like; "
            "'*.ffn=32' "
            "for some of them; may be repeated"
        ),
    )
    group.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="SHARE|PATTERN=SHARE",
        help=(
            "smallest share of neurons or channels that stays per layer (default: 0.1); 'blocks.*.mlp=0.3' or "
            "heads=0.5 "
            "for some; may be repeated"
        ),
    )
    group.add_argument("--allow-empty", action="store_true", help="no floors: whole branches may go")
    group.add_argument(
        "--freeze",
        action="append",
        default=[],
        metavar="GLOB",
        help="parameters or groups to leave alone, e.g. 'blocks.0.*'; may be repeated",
    )


def decision(p: Parser) -> None:
    """How to decide what goes."""
    group = p.add_argument_group("decision")
    group.add_argument(
        "--data",
        metavar="DATA",
        help=(
            "calibration data: .npz, .pt or .safetensors of tensors, an image folder, .csv/.jsonl/.txt text, "
            "or python:module:function; labels optional"
        ),
    )
    group.add_argument("--samples", type=int, default=128, metavar="N", help="samples of it (default: %(default)s)")
    group.add_argument(
        "--memory",
        metavar="N",
        help=("what caches of calibration may take together, such as 8GiB; recovery sees what fits"),
    )
    group.add_argument(
        "--importance",
        metavar="NAME",
        help=(
            "trajectory, fisher, taylor, obs, activation, l1, l2 or random, also with options: "
            "'trajectory{mode=exact}' "
            "(default: trajectory with data, l2 without)"
        ),
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="score, cut a part, score again, N times (default: %(default)s)",
    )
    group.add_argument(
        "--head-scale",
        default="1",
        metavar="X|auto",
        help="factor on what heads are worth against neurons; auto tries a few (default: %(default)s)",
    )
    group.add_argument(
        "--members",
        default="auto",
        metavar="HOW",
        help=(
            "which neurons stay, once it is known how many: by their scores, by obs, or auto: obs when there is "
            "recovery"
        ),
    )
    group.add_argument(
        "--rearrange",
        type=int,
        default=0,
        metavar="N",
        help=("rounds of choosing members again by what they do together; needs --importance fisher (default: none)"),
    )
    group.add_argument(
        "--prune", metavar="KINDS", help=("kinds to prune: also tokens and blocks (default: heads,ffn,channels)")
    )
    group.add_argument(
        "--search",
        default="auto",
        metavar="NAME",
        help=("two-class, dynamic, lagrangian or exhaustive (default: %(default)s, the first that is exact)"),
    )
    group.add_argument(
        "--pipeline",
        metavar="PASSES",
        help=(
            "the passes themselves, as report.json states them, in place of the options that decide: "
            "'propagate-axes,find-groups,score-groups{criterion=l2},search-plan{budget=flops=0.5}'"
        ),
    )
    group.add_argument(
        "--tokens",
        metavar="HOW",
        help=(
            "how image tokens become fewer: tome, prune, ppt, zero-tprune, transform or random, as the budget asks, or "
            "tome:r=13, ppt:r=50@3,6,9; with options as 'tome{schedule=constant}'; off (default: off, tome with "
            "--prune "
            "tokens)"
        ),
    )
    group.add_argument(
        "--unmerge", action="store_true", help=("give every token back where a head or the output needs it")
    )
    group.add_argument(
        "--blocks",
        metavar="TILE",
        help=(
            "zero tiles of so many outputs x inputs inside weights, until --flops is met: 32x32, with options as "
            "'32x32{slice=0.7,allocation=lsp}'; --importance lsp, magnitude, wanda or obert"
        ),
    )
    group.add_argument("--sparse", metavar="2:4", help="zero two of every four inputs, after slicing to the budget")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
    limits(p)


def held_out(p: Parser) -> None:
    """What of the data nothing is decided on; for commands that do not judge by it themselves."""
    p.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help=(
            "share of --data that nothing is decided or fitted on, as a sweep holds it back: the report compares on it "
            "(default: none)"
        ),
    )


def target(p: Parser) -> None:
    """What is written, and where."""
    group = p.add_argument_group("artefact")
    group.add_argument(
        "--target",
        default="eager",
        metavar="NAME",
        help=("eager, onnx, inductor, trt or triton, with options as 'trt{dtype=fp16}' (default: %(default)s)"),
    )
    group.add_argument("--out", metavar="DIR", help="where the artefact goes (default: fxprune-out/<model>-<target>)")


def timed(p: Parser, batch: bool = True) -> None:
    """How long the result is timed. batch: also at which batch size, where the command has no such option yet."""
    group = p.add_argument_group("latency of the result")
    if batch:
        group.add_argument("--batch", type=int, default=1, metavar="N", help="samples per call (default: %(default)s)")
    group.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=("time the written file beside the dense model's for so long; 0 leaves it out (default: about 2)"),
    )


def timing(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :func:`fxprune.driver.api.apply` about it."""
    return {"batch": args.batch, "threads": args.threads or 0, "seconds": args.seconds}


def source(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :func:`fxprune.intake.load.load` and its callers."""
    return {"checkpoint": args.checkpoint, "example_inputs": args.input, "trust_pickle": args.trust_pickle}


def decisions(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of :func:`fxprune.driver.api.compile` that decide."""
    names = (
        "flops",
        "params",
        "bytes",
        "data",
        "samples",
        "memory",
        "importance",
        "prune",
        "seed",
        "rounds",
        "head_scale",
        "members",
        "rearrange",
        "tokens",
        "unmerge",
        "blocks",
        "sparse",
        "search",
        "pipeline",
    )
    found = {**{name: getattr(args, name) for name in names}, **limits_of(args)}
    if hasattr(args, "latency_table"):
        timed = ("latency", "latency_ms", "batch", "latency_table", "expect_latency")
        found.update({name: getattr(args, name) for name in timed}, threads=args.threads or 0)
    return found


def batch_sizes(text: str, option: str) -> tuple[int, ...]:
    """``1,32`` -> (1, 32). Raises OptionError, at ``option``, for anything else.

    >>> batch_sizes("1,32", "--batch")
    (1, 32)
    """
    try:
        found = tuple(int(b) for b in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise OptionError(f"'{text}' is not a list of batch sizes", where=f"{option} {text}", cure="write 1,32")
    return found


def limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that limit a search."""
    return {
        "align": tuple(args.align) or None,
        "floor": tuple(args.floor) or FLOOR,
        "allow_empty": args.allow_empty,
        "freeze": tuple(args.freeze),
    }


def out_dir(args: argparse.Namespace) -> Path:
    """Where the artefact goes."""
    if args.out:
        return Path(args.out)
    stem = Path(args.model.partition("timm:")[2] or args.model).stem or "model"
    return Path("fxprune-out") / f"{stem}-{args.target.partition('{')[0].strip()}"


def finished(result: Mapping[str, Any]) -> int:
    """The exit code of a command that lowers: 4 where this machine lacks what the target needs."""
    return MissingDevice.exit_code if result["report"].get("unfinished") else 0
