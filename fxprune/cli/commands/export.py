"""``fxprune export``."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..parser import Parser

if TYPE_CHECKING:
    from ..screen import Screen

HELP = "apply a plan, lower it, check it against limits and write a signed-off delivery: for release pipelines"


def options(p: Parser) -> None:
    """What the command line takes."""
    arguments.model(p)
    p.add_argument("--plan", metavar="FILE", required=True, help="what `fxprune plan` wrote")
    p.add_argument("--target", metavar="NAME,..", default="onnx", help="one or more (default: %(default)s)")
    p.add_argument("--out", metavar="DIR", required=True, help="where the delivery goes, a subfolder per target")
    group = p.add_argument_group("recovery")
    group.add_argument(
        "--recover",
        metavar="HOW",
        help="fit what stays, as `fxprune compile` does (default: auto with --data, else none)",
    )
    group.add_argument("--data", metavar="DATA", help="calibration data for it")
    group.add_argument("--data-samples", type=int, default=128, metavar="N", help="of it (default: %(default)s)")
    group = p.add_argument_group("gates")
    group.add_argument(
        "--verify",
        metavar="DATA",
        required=True,
        help="data to judge by, not what the plan was made from; labels optional",
    )
    group.add_argument("--samples", type=int, default=256, metavar="N", help="samples of it (default: %(default)s)")
    group.add_argument(
        "--metric",
        default="auto",
        metavar="NAME",
        help=(
            "with labels top1, f1, spearman or miou; without, against the dense model: agreement, spearman or cosine "
            "(default: what fits)"
        ),
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help=(
            "largest fall of the metric below the dense model's: 0.01 is one point; without labels the largest share "
            "of "
            "samples that disagree with the dense model"
        ),
    )
    group.add_argument("--max-kl", type=float, metavar="X", help="without labels: largest divergence from it, in nats")
    group.add_argument("--max-latency-ms", type=float, metavar="MS", help="largest median latency of a call")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="batch of that call (default: %(default)s)")
    group.add_argument("--seconds", type=float, default=2.0, help="time to measure it for (default: %(default)s)")
    group.add_argument(
        "--carry",
        type=float,
        default=256,
        metavar="MIB",
        help=("data that may lie in the delivery, so that `fxprune verify` needs nothing else (default: %(default)s)"),
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of which samples (default: %(default)s)")
    group.add_argument("--junit", metavar="FILE", help="write the gates as a JUnit report as well")
    group.add_argument("--force", action="store_true", help="do it again even where the same request passed before")


def run(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Do it; the result is what ``--json`` prints."""
    from ...artifact.gates import Limits
    from ...workflows.export import export

    limits = Limits(args.max_drop, args.max_kl, args.max_latency_ms, args.batch, args.threads or 0)
    targets = [t.strip() for t in re.split(r",(?![^{]*\})", args.target) if t.strip()]
    manifest = export(
        args.model,
        args.plan,
        targets=targets,
        verify=args.verify,
        out=args.out,
        limits=limits,
        metric=args.metric,
        samples=args.samples,
        carry=args.carry,
        junit_file=args.junit,
        recover=args.recover,
        data=args.data,
        data_samples=args.data_samples,
        force=args.force,
        seconds=args.seconds,
        seed=args.seed,
        on_event=screen.tell,
        **arguments.source(args),
    )
    screen.delivery(manifest, args.out)
    return manifest


def exit_code(result: dict[str, Any]) -> int:
    """0 passed, 3 a gate failed, 4 a target or a gate could not be finished on this machine."""
    from ...artifact import gates

    return gates.exit_code(result["status"])
