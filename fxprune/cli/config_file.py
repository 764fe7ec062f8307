"""Options from a file, under the names of the command line: ``fxprune.toml`` in the working directory, or ``--config``.

    flops = 0.5
    freeze = ["blocks.0.*"]
    floor = {"blocks.*.mlp" = 0.3}

    [compile]                     # for one command alone
    target = "onnx"
    importance = "trajectory{mode=exact}"

What the command line says counts for more, a command's table for more than the top of the file. A report.json (or the
directory it lies in) is such a file too: its ``options`` run the same thing again.

A file that merely lies in the working directory, or a report, may have come with somebody's model: it may not allow
pickles to run code, nor name code to run. A TOML file given by ``--config`` may.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, nearest
from ..ir.json_source import Source

NAME, OPTION, REPORT = "fxprune.toml", "--config", "report.json"
MAX_BYTES = 64 * 2**20  # a report lists groups; nobody writes more by hand
_NO_OPTIONS = {"help", "config", "version"}
_PLACES = {"command", "model"}  # of a report, which the command line says


@dataclass(frozen=True)
class Stated:
    """One option of a file, ready for argparse. where: ``fxprune.toml:3``"""

    option: str
    words: tuple[str, ...]
    where: str


def with_file(
    argv: Sequence[str], command: str, parsers: Mapping[str, argparse.ArgumentParser]
) -> tuple[list[str], list[str]]:
    """(the arguments with those of the file in front of them, what the file said, in words).

    Nothing changes for commands without ``--config``, and where there is no file. Raises OptionError at the line.
    """
    parser = parsers[command]
    path = _given(argv)
    implicit = path is None
    if path is None and Path(NAME).is_file():
        path = Path(NAME)
    if path is None or OPTION not in parser._option_string_actions:
        return list(argv), []
    said = {word.partition("=")[0] for word in argv if word.startswith("-")}
    budget = _budgets(parser)
    if said & {*budget, "--plan"} or any("budget=" in word for word in argv):
        said |= set(budget)
    found = [
        one
        for one in read(path, command, parsers, implicit, frozenset(said))
        if one.option not in said or isinstance(parser._option_string_actions[one.option], argparse._AppendAction)
    ]
    at = list(argv).index(command) + 1
    words = [word for one in found for word in one.words]
    return [*argv[:at], *words, *argv[at:]], [f"options of {path}: {' '.join(words)}"] if words else []


def read(
    path: Path,
    command: str,
    parsers: Mapping[str, argparse.ArgumentParser],
    implicit: bool = False,
    said: frozenset[str] = frozenset(),
) -> list[Stated]:
    """What the file states for ``command``; a command's table after the top, so that it wins.

    said   options that the command line gives: theirs are not read
    """
    if path.is_dir():
        path = path / REPORT
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OptionError("this file is too large to hold options", where=str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            "the options cannot be read", where=f"{OPTION} {path}", why=error.strerror or str(error)
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError("the options are not a text file", where=f"{OPTION} {path}", why=str(error)) from None
    entries = _of_report(text, path) if path.suffix == ".json" else _of_toml(text, path, command, parsers)
    parser, stated, distrusted = parsers[command], [], implicit or path.suffix == ".json"
    for key, value, where in entries:
        option = f"--{key.replace('_', '-')}"
        action = parser._option_string_actions.get(option)
        if action is None:
            if any(option in other._option_string_actions for other in parsers.values()) and where.of_all:
                continue  # at the top, for another command
            known = [o[2:] for o in parser._option_string_actions if o.startswith("--")]
            raise OptionError(f"unknown option '{key}'", where=where.text, cure=nearest(key.replace("_", "-"), known))
        if key.replace("_", "-") in _NO_OPTIONS:
            raise OptionError(f"'{key}' cannot stand in a file", where=where.text)
        if option in said and not isinstance(action, argparse._AppendAction):
            continue
        if distrusted and (option == "--trust-pickle" or "python:" in str(value)) and value:
            raise OptionError(
                f"'{key}' would run code, which this file may not ask for",
                where=where.text,
                why="a file in the working directory, or a report, may have come with the model",
                cure=f"say {option} on the command line",
            )
        stated.append(Stated(option, tuple(_words(option, action, value, where.text)), where.text))
    return stated


@dataclass(frozen=True)
class _Place:
    """Where an entry stands. of_all: not in the table of a command"""

    text: str
    of_all: bool


def _of_toml(
    text: str, path: Path, command: str, parsers: Mapping[str, argparse.ArgumentParser]
) -> Iterator[tuple[str, Any, _Place]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        line = re.search(r"line (\d+)", str(error))
        raise OptionError(
            "the file is not valid TOML", where=f"{path}:{line[1]}" if line else str(path), why=str(error)
        ) from None
    for key, value in table.items():
        where = f"{path}:{_line(text, '', key)}"
        if isinstance(value, dict) and key in parsers:
            continue
        if isinstance(value, dict) and not any(
            f"--{key.replace('_', '-')}" in one._option_string_actions for one in parsers.values()
        ):
            raise OptionError(f"'{key}' is neither a command nor an option", where=where, cure=nearest(key, parsers))
        if not any(f"--{key.replace('_', '-')}" in one._option_string_actions for one in parsers.values()):
            known = [o[2:] for o in parsers[command]._option_string_actions if o.startswith("--")]
            raise OptionError(f"unknown option '{key}'", where=where, cure=nearest(key.replace("_", "-"), known))
        yield key, value, _Place(where, True)
    mine = table.get(command, {})
    if not isinstance(mine, dict):
        raise OptionError(
            f"'{command}' is a command",
            where=f"{path}:{_line(text, '', command)}",
            cure=f"write its options under [{command}]",
        )
    for key, value in mine.items():
        yield key, value, _Place(f"{path}:{_line(text, command, key)}", False)


def _of_report(text: str, path: Path) -> Iterator[tuple[str, Any, _Place]]:
    source = Source(str(path), text)
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError("the report is not valid JSON", where=str(path), why=str(error)[:200]) from None
    options = report.get("options") if isinstance(report, dict) else None
    if not isinstance(options, dict):
        raise OptionError(
            "this file states no options",
            where=str(path),
            why="a report has them under 'options'",
            cure=f"give a report.json, or a {NAME}",
        )
    for key, value in options.items():
        if value is not None and key not in _PLACES and (key, value) != ("threads", 0):  # 0: torch's own choice
            yield key, value, _Place(source.at("options", key), True)


def _words(option: str, action: argparse.Action, value: Any, where: str) -> Iterator[str]:
    """The option as words of a command line. Raises OptionError for a value of the wrong kind."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise OptionError(f"'{option[2:]}' is true or false", where=where, why=f"found {value!r}")
        if value:
            yield option
        return
    if isinstance(action, argparse._AppendAction):
        parts = (
            [f"{k}={v}" for k, v in value.items()]
            if isinstance(value, dict)
            else value
            if isinstance(value, list)
            else [value]
        )
    else:
        parts = [",".join(map(str, value))] if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            raise OptionError(f"'{option[2:]}' is text or a number", where=where, why=f"found {part!r}")
        if isinstance(part, str) and re.fullmatch(r"<\w+>", part):
            raise OptionError(
                f"'{option[2:]}' was given from Python and is not in the report",
                where=where,
                why=f"it was a {part[1:-1]}",
                cure=f"give {option} on the command line",
            )
        if action.type is not None and callable(action.type):
            try:
                action.type(str(part))
            except (TypeError, ValueError):
                raise OptionError(
                    f"'{part}' is no value for '{option[2:]}'",
                    where=where,
                    why=f"expected {getattr(action.type, '__name__', 'another type')}",
                ) from None
        yield f"{option}={part}"


def _given(argv: Sequence[str]) -> Path | None:
    """The file that ``--config`` names."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == OPTION:
            found = value if equals else following
            if not found or (not equals and found.startswith("-")):
                raise OptionError("which file?", where=OPTION, cure=f"write {OPTION} {NAME}")
            return Path(found)
    return None


def _budgets(parser: argparse.ArgumentParser) -> list[str]:
    """The options of which one is given."""
    groups = [g for g in parser._action_groups if (g.title or "").startswith("budget")]
    return [o for g in groups for a in g._group_actions for o in a.option_strings]


def _line(text: str, table: str, key: str) -> int:
    """The line of a key, in a table or above all of them."""
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        if header:
            here = header[1].strip().strip("\"'")
            if not table and here.partition(".")[0] == key:
                return number
        elif here == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return number
    return 1
