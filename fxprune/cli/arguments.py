"""The table of options as a command line: what a command takes, and what that means to Python."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MissingDevice, OptionError
from ..request.options import Option, options_of
from .parser import Parser


def add_options(p: Parser, command: str) -> None:
    """Every option of the command, in the sections that the table names. What is not said is None."""
    sections: dict[str, Any] = {"": p}
    for one in sorted(options_of(command).values(), key=lambda one: bool(one.refused)):
        title = f"not in fxprune {command}" if one.refused else one.title or ""
        if title not in sections:
            sections[title] = p.add_argument_group(title)
        action = sections[title].add_argument(*_words(one), **_how(one))
        p.explained.append((action, one))


def _words(one: Option) -> list[str]:
    if one.place:
        return [one.flag]
    return [one.dashed, *([f"-{one.short}"] if one.short else [])]


def _how(one: Option) -> dict[str, Any]:
    if one.switch:
        return {"action": "store_true"}
    how: dict[str, Any] = {"metavar": one.metavar}
    if one.parse is not str:
        how["type"] = one.parse
    if one.repeated:
        how["action"] = "append"
    if one.place in ("?", "*"):
        how["nargs"] = one.place
    if not one.place and one.required:
        how["required"] = True
    return how


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """Every option of the command by its name in Python, with what it means where it was not said.

    Raises OptionError for one that the command refuses.
    """
    found = {}
    for one in options_of(args.command).values():
        said = getattr(args, one.flag.replace("-", "_"))
        if not one.refused:
            found[one.name] = one.value_of(said)
        elif said:
            raise OptionError(
                f"fxprune {args.command} takes no {one.dashed}",
                where=one.dashed if one.switch else f"{one.dashed} {said}",
                why=one.refused,
                cure="leave it away, or compile once and compare with fxprune report",
            )
    return found


def call_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the command's Python function."""
    asked = values_of(args)
    return {
        one.name: asked[one.name] for one in options_of(args.command).values() if one.name in asked and one.in_python
    }


def out_dir(args: argparse.Namespace) -> Path:
    """Where the artefact goes."""
    if args.out:
        return Path(args.out)
    stem = Path(args.model.partition("timm:")[2] or args.model).stem or "model"
    target = values_of(args)["target"]
    return Path("fxprune-out") / f"{stem}-{target.partition('{')[0].strip()}"


def choose_exit_code(result: Mapping[str, Any]) -> int:
    """The exit code of a command that lowers: 4 where this machine lacks what the target needs."""
    return MissingDevice.exit_code if result["report"].get("unfinished") else 0
