"""The command line. For people on stderr, for machines on stdout with ``--json``. Commands lie in ``commands/``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import FxpruneError, InternalError, OptionError, ProcessDied, nearest, on_the_command_line
from ..process import ranks
from ..process.supervise import INTERRUPTED, supervise
from .commands import build_parser, command
from .config_file import with_file

OK, USER_ERROR, INTERNAL = 0, 2, 70


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see ``--help``). Never raises, never leaves half an artefact."""
    with on_the_command_line():
        return _main(list(sys.argv[1:] if argv is None else argv))


def start() -> int:
    """The command ``fxprune``: :func:`main` in a child process, so that no input can end it by a signal."""
    with on_the_command_line():
        try:
            return supervise(main)
        except ProcessDied as error:
            _say(f"{type(error).__name__}: {error}")
            return error.exit_code


def _main(argv: list[str]) -> int:
    debug = "--debug" in argv
    previous = None
    with contextlib.suppress(ValueError):  # not in the main thread
        previous = signal.signal(signal.SIGTERM, _interrupt)  # a killed run cleans up like an interrupted one
    try:
        args = _parse(argv)
        if args is None:
            return OK
        return _run(args)
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
    said: list[str] = []
    if name is not None and not {"-h", "--help"} & set(argv):
        argv, said = with_file(argv, name)
    args, leftovers = top.parse_known_args(argv)
    commands[args.command].check_leftovers(leftovers)
    if not getattr(args, "quiet", False):
        for line in said:
            _say(line)
    if args.threads is not None and args.threads < 1:
        raise OptionError("threads must be at least 1", where=f"--threads {args.threads}")
    return args


def _run(args: argparse.Namespace) -> int:
    from ..process.silence import quiet
    from .screen import Screen

    with quiet():
        import torch
    if args.threads:
        torch.set_num_threads(args.threads)
    one = command(args.command)
    if ranks.find_launched_rank() is not None and not getattr(one, "SHARED", False):
        raise OptionError(
            f"'{args.command}' is not shared over processes",
            where="torchrun",
            cure=f"start it without: fxprune {args.command} ...",
        )
    with ranks.together(), Screen(quiet=args.quiet) as screen:
        result = one.run(args, screen)
    if args.json and ranks.speaks():
        print(json.dumps(result, indent=2, sort_keys=True))
    return int(one.exit_code(result)) if hasattr(one, "exit_code") else OK
