"""argparse with our errors, and the text under every command's help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import registry
from ..errors import OptionError, nearest
from ..request.options import Option

EPILOG = """\
exit codes
  0    done
  2    the request cannot be carried out: the message says what, where, why and the cure
  3    a gate failed: the artefact is not what was asked for (export, verify)
  4    this machine lacks a device or tool that the request needs; what could be written was, see the message
  5    the process was ended by a signal: out of memory, or native code that crashed; the message says where
  70   a bug in fxprune: the message carries the pipeline that reproduces it
  130  interrupted (Ctrl-C); nothing half-written is left behind, and the same command goes on where scoring stopped

torchrun --nproc-per-node N -m fxprune compile ... shares scoring over N processes; the result is the same.

Progress and tables go to stderr; with --json the result goes to stdout, and nothing else does.
"""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are FxpruneErrors with the nearest known name.

    explained   what takes an option, with the option: its help is made when it is shown
    """

    explained: list[tuple[argparse.Action, Option]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(*args, **kwargs)
        self.explained = []

    def format_help(self) -> str:
        """The help, with the targets that there are now."""
        targets = registry.names("backend")
        for action, one in self.explained:
            action.help = (one.refused or one.text(targets)).replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, where=self.prog, cure=f"see `{self.prog} --help`")

    def check_leftovers(self, leftovers: Sequence[str]) -> None:
        if leftovers:
            name = leftovers[0].partition("=")[0]
            cure = f"see `{self.prog} --help`"
            if name.startswith("-"):
                raise OptionError(
                    f"unknown option '{name}'",
                    where=self.prog,
                    cure=nearest(name, ["--help", *(one.dashed for _, one in self.explained if not one.place)]),
                )
            raise OptionError(f"unexpected argument '{name}'", where=self.prog, cure=cure)
