"""The command line. For people on stderr, for machines on stdout with ``--json``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import ranks
from .errors import FxpruneError, InternalError, OptionError, nearest

if TYPE_CHECKING:
    from .show import Screen

OK, USER_ERROR, INTERNAL, INTERRUPTED = 0, 2, 70, 130
EPILOG = """\
exit codes
  0    done
  2    the request cannot be carried out: the message says what, where, why and the cure
  3    the machine lacks the device that the request is about (`tune` without a GPU)
  70   a bug in fxprune: the message carries the pipeline that reproduces it
  130  interrupted (Ctrl-C); nothing half-written is left behind, and the same command goes on where scoring stopped

torchrun --nproc-per-node N -m fxprune compile ... shares scoring over N processes; the result is the same.

Progress and tables go to stderr; with --json the result goes to stdout, and nothing else does.
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are FxpruneErrors with the nearest known name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, where=self.prog, cure=f"see `{self.prog} --help`")

    def check_leftovers(self, leftovers: Sequence[str]) -> None:
        if leftovers:
            name = leftovers[0].partition("=")[0]
            cure = f"see `{self.prog} --help`"
            if name.startswith("-"):
                raise OptionError(f"unknown option '{name}'", where=self.prog,
                                  cure=nearest(name, [o for o in self._option_string_actions if o.startswith("--")]))
            raise OptionError(f"unexpected argument '{name}'", where=self.prog, cure=cure)


def build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of every command, by name, and the one above them."""
    top = _Parser(prog="fxprune", epilog=EPILOG, description=(
        "Make a pretrained model smaller and faster: fxprune compile model.pt --target onnx --flops 0.5"))
    from . import __version__

    top.add_argument("--version", action="version", version=f"fxprune {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    made: dict[str, _Parser] = {}

    def command(name: str, help_text: str) -> _Parser:
        made[name] = commands.add_parser(name, help=help_text, description=help_text, epilog=EPILOG)
        return made[name]

    p = command("compile", "compress a model to a budget and write a verified artefact")
    _model(p)
    _budget(p)
    _decision(p)
    p.add_argument("--plan", metavar="FILE", help="apply this plan.json instead of searching one")
    p.add_argument("--recover", metavar="HOW", help=(
        "fit what stays to the dense model on the data: auto, ridge, refit, bias, scale, tune or none "
        "(default: auto with data, none without)"))
    _target(p)

    p = command("plan", "decide what to remove and write plan.json; the model is not changed")
    _model(p)
    _budget(p)
    _decision(p)
    p.add_argument("--out", metavar="FILE", default="plan.json", help="where to write the plan (default: %(default)s)")

    p = command("apply", "apply a plan to a model, or to another checkpoint of the same architecture")
    _model(p)
    p.add_argument("--plan", metavar="FILE", required=True, help="what `fxprune plan` wrote")
    _target(p)

    p = command("inspect", "show what can be pruned, what cannot, and why")
    _model(p)
    _limits(p)
    p.add_argument("--graph", metavar="FILE", help="draw the coupling graph into this .svg or .dot file")

    p = command("bench", "measure latency and throughput, interleaved, in one run")
    p.add_argument("artifact", metavar="ARTIFACT", help="a directory that compile wrote")
    p.add_argument("--against", metavar="MODEL", help="another artefact, or a model, lowered to the same target")
    p.add_argument("--batch", default="1,32", metavar="N,N", help="batch sizes (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=5.0, help="time to spend per batch size (default: %(default)s)")
    p.add_argument("--checkpoint", metavar="FILE", help="weights for --against")
    p.add_argument("--input", metavar="SHAPE|FILE", help="example inputs for --against")
    p.add_argument("--trust-pickle", action="store_true", help="allow --against to run code from its pickle")
    _output(p)

    p = command("tune", "measure block-sparse layers on this machine, for the gate and the kernel to go by")
    p.add_argument("--target", default="triton", metavar="NAME", help="triton or onnx (default: %(default)s)")
    p.add_argument("--shapes", metavar="NxK,..", help="layers, outputs x inputs (default: those of DeiT-S and DeiT-B)")
    p.add_argument("--rows", metavar="M,M", help="rows they are applied to (default: 197, 1576, 12608)")
    p.add_argument("--blocks", metavar="TILE,..", help="tiles (default: all that the kernel knows)")
    p.add_argument("--density", metavar="D,D", help="shares of tiles that are kept (default: 0.1,0.25,0.5,0.75)")
    p.add_argument("--dtype", default="", help="default: bfloat16 for triton, float32 for onnx")
    p.add_argument("--out", metavar="FILE", help="where the table goes (default: kept under the device's name)")
    _output(p)

    p = command("demo", "train a small ViT on handwritten digits, compress it, and compare; needs no network")
    p.add_argument("--out", metavar="DIR", default="fxprune-out/demo", help="where to write (default: %(default)s)")
    p.add_argument("--flops", default="0.5", metavar="B", help="share of the MACs that stays (default: %(default)s)")
    p.add_argument("--epochs", type=int, default=15, help="training epochs (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of split, training and search (default: %(default)s)")
    _output(p)
    return top, made


def _model(p: _Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="model.pt, model.pt2, a Hugging Face folder, or timm:NAME")
    group = p.add_argument_group("loading")
    group.add_argument("--checkpoint", metavar="FILE", help="weights for timm:NAME (.pt, .pth, .safetensors)")
    group.add_argument("--input", metavar="SHAPE|FILE", help="example inputs: 1x3x224x224, or a file of tensors")
    group.add_argument("--trust-pickle", action="store_true",
                       help="run whatever code the pickle holds: only for files whose author you trust")
    _output(p)


def _output(p: _Parser) -> None:
    group = p.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    group.add_argument("--quiet", "-q", action="store_true", help="no progress and no tables; warnings and errors stay")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's own choice)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _budget(p: _Parser) -> None:
    group = p.add_argument_group("budget (exactly one)")
    group.add_argument("--flops", metavar="B", help="multiply-accumulates: a ratio such as 0.5, or 2.3G")
    group.add_argument("--params", metavar="B", help="parameters: a ratio, or 20M")
    group.add_argument("--bytes", metavar="B", help="bytes of parameters and buffers: a ratio, or 64MiB")


def _limits(p: _Parser) -> None:
    group = p.add_argument_group("limits")
    group.add_argument("--align", type=int, metavar="N", help="neurons and channels in multiples of N (default: 8)")
    group.add_argument("--floor", type=float, default=0.1, metavar="SHARE",
                       help="smallest share of neurons or channels that stays per layer (default: %(default)s)")
    group.add_argument("--allow-empty", action="store_true", help="no floors: whole branches may go")
    group.add_argument("--freeze", action="append", default=[], metavar="GLOB",
                       help="parameters or groups to leave alone, e.g. 'blocks.0.*'; may be repeated")


def _decision(p: _Parser) -> None:
    group = p.add_argument_group("decision")
    group.add_argument("--data", metavar="DATA", help=(
        "calibration data: .npz, .pt or .safetensors of tensors, an image folder, .csv/.jsonl/.txt text, "
        "or python:module:function; labels optional"))
    group.add_argument("--samples", type=int, default=128, metavar="N", help="samples of it (default: %(default)s)")
    group.add_argument("--importance", metavar="NAME", help=(
        "trajectory, fisher, taylor, obs, activation, l1, l2 or random, also with options: 'trajectory{mode=exact}' "
        "(default: trajectory with data, l2 without)"))
    group.add_argument("--rounds", type=int, default=1, metavar="N",
                       help="score, cut a part, score again, N times (default: %(default)s)")
    group.add_argument("--head-scale", default="1", metavar="X|auto",
                       help="factor on what heads are worth against neurons; auto tries a few (default: %(default)s)")
    group.add_argument("--members", default="auto", metavar="HOW", help=(
        "which neurons stay, once it is known how many: by their scores, by obs, or auto: obs when there is recovery"))
    group.add_argument("--rearrange", type=int, default=0, metavar="N", help=(
        "rounds of choosing members again by what they do together; needs --importance fisher (default: none)"))
    group.add_argument("--prune", metavar="KINDS", help="kinds to prune: also tokens (default: heads,ffn,channels)")
    group.add_argument("--tokens", metavar="HOW", help=(
        "how image tokens become fewer: tome, prune, ppt, zero-tprune, transform or random, as the budget asks, or "
        "tome:r=13, ppt:r=50@3,6,9; with options as 'tome{schedule=constant}'; off (default: off, tome with --prune "
        "tokens)"))
    group.add_argument("--unmerge", action="store_true", help=(
        "give every token back where a head or the output needs it"))
    group.add_argument("--blocks", metavar="TILE", help=(
        "zero tiles of so many outputs x inputs inside weights, until --flops is met: 32x32, with options as "
        "'32x32{slice=0.7,allocation=lsp}'; --importance lsp, magnitude, wanda or obert"))
    group.add_argument("--sparse", metavar="2:4", help="zero two of every four inputs, after slicing to the budget")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: %(default)s)")
    _limits(p)


def _target(p: _Parser) -> None:
    group = p.add_argument_group("artefact")
    group.add_argument("--target", default="eager", metavar="NAME", help="eager, onnx or triton (default: %(default)s)")
    group.add_argument("--out", metavar="DIR", help="where the artefact goes (default: fxprune-out/<model>-<target>)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see ``--help``). Never raises, never leaves half an artefact."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    previous = None
    with contextlib.suppress(ValueError):  # not in the main thread
        previous = signal.signal(signal.SIGTERM, _interrupt)  # a killed run cleans up like an interrupted one
    try:
        args = _parse(argv)
        if args is None:
            return OK
        _run(args)
        return OK
    except SystemExit as stop:  # argparse after --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted")
        return INTERRUPTED
    except FxpruneError as error:
        if debug:
            raise
        _say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us is gone: nobody to tell
        return USER_ERROR
    except Exception as error:
        if debug:
            raise
        if not isinstance(error, InternalError):
            error = InternalError(f"{type(error).__name__}: {error}", pipeline=f"fxprune {' '.join(argv)}")
        _say(f"InternalError: {error}\n  --debug shows the traceback")
        return INTERNAL
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    if ranks.speaks():
        print(text, file=sys.stderr)


def _parse(argv: Sequence[str]) -> argparse.Namespace | None:
    top, commands = build_parser()
    if not argv:
        top.print_help(sys.stderr)
        raise SystemExit(USER_ERROR)
    name = next((a for a in argv if not a.startswith("-")), None)
    if name is not None and name not in commands:
        raise OptionError(f"unknown command '{name}'", where="fxprune", cure=nearest(name, commands))
    args, leftovers = top.parse_known_args(argv)
    commands[args.command].check_leftovers(leftovers)
    if args.threads is not None and args.threads < 1:
        raise OptionError("threads must be at least 1", where=f"--threads {args.threads}")
    return args


def _run(args: argparse.Namespace) -> None:
    from .quiet import quiet
    from .show import Screen

    with quiet():
        import torch
    if args.threads:
        torch.set_num_threads(args.threads)
    if ranks.launched() is not None and args.command not in _SHARED:
        raise OptionError(f"'{args.command}' is not shared over processes", where="torchrun",
                          cure=f"start it without: fxprune {args.command} ...")
    with ranks.together(), Screen(quiet=args.quiet) as screen:
        result = _COMMANDS[args.command](args, screen)
    if args.json and ranks.speaks():
        print(json.dumps(result, indent=2, sort_keys=True))


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"checkpoint": args.checkpoint, "example_inputs": args.input, "trust_pickle": args.trust_pickle}


def _decisions(args: argparse.Namespace) -> dict[str, Any]:
    return {"flops": args.flops, "params": args.params, "bytes": args.bytes, "data": args.data, "samples": args.samples,
            "importance": args.importance, "prune": args.prune, "seed": args.seed, "rounds": args.rounds,
            "head_scale": args.head_scale, "members": args.members, "rearrange": args.rearrange,
            "tokens": args.tokens, "unmerge": args.unmerge, "blocks": args.blocks, "sparse": args.sparse,
            **_limits_of(args)}


def _limits_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"align": args.align, "floor": args.floor, "allow_empty": args.allow_empty, "freeze": tuple(args.freeze)}


def _out(args: argparse.Namespace) -> Path:
    if args.out:
        return Path(args.out)
    stem = Path(args.model.partition("timm:")[2] or args.model).stem or "model"
    return Path("fxprune-out") / f"{stem}-{args.target}"


def _compile(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import api

    artifact = api.compile(args.model, target=args.target, out=_out(args), plan=args.plan, recover=args.recover,
                           on_event=screen.tell, **_decisions(args), **_source(args))
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


def _plan(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import api

    program = api.plan(args.model, out=args.out, on_event=screen.tell, **_decisions(args), **_source(args))
    screen.plan(program, args.out)
    return {"plan_file": args.out, **json.loads(program.need("plan").to_json())}


def _apply(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import api

    artifact = api.apply(args.model, args.plan, target=args.target, out=_out(args), on_event=screen.tell,
                         **_source(args))
    screen.artifact(artifact)
    return {"artifact": str(artifact.path), "report": artifact.report}


def _inspect(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import api
    from .show import inspection

    if args.graph and Path(args.graph).suffix not in (".svg", ".dot"):
        raise OptionError("the graph can be drawn as .svg or .dot", where=f"--graph {args.graph}")
    program = api.inspect(args.model, on_event=screen.tell, **_limits_of(args), **_source(args))
    if args.graph:
        from .draw import draw

        draw(program, args.graph)
    screen.inspection(program, args.graph)
    return inspection(program)


def _bench(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from .bench import bench

    try:
        batches = tuple(int(b) for b in args.batch.split(","))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise OptionError(f"'{args.batch}' is not a list of batch sizes", where=f"--batch {args.batch}",
                          cure="write 1,32")
    result = bench(args.artifact, against=args.against, batches=batches, seconds=args.seconds,
                   threads=args.threads or 0, on_event=screen.tell, **_source(args))
    screen.bench(result)
    return result


def _tune(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import tune

    table, path = tune.tune(args.target, out=args.out, dtype=args.dtype, on_event=screen.tell, **tune.given(
        shapes=args.shapes, rows=args.rows, patterns=args.blocks, densities=args.density))
    result = {"table": str(path), **tune.summary(table)}
    screen.tuned(result)
    return result


def _demo(args: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    from . import demo

    result = demo.run(args.out, flops=args.flops, epochs=args.epochs, seed=args.seed, threads=args.threads,
                      on_event=screen.tell)
    screen.demo(result)
    return result


_SHARED = ("compile", "plan")
_COMMANDS = {"compile": _compile, "plan": _plan, "apply": _apply, "inspect": _inspect, "bench": _bench, "demo": _demo,
             "tune": _tune}
