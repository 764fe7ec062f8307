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

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, nearest
from ..ir.json_source import Source
from ..request.options import Budgets, Option, flags, options_of
from ..request.options.table import dashes
from .commands import COMMANDS

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


def with_file(argv: Sequence[str], command: str) -> tuple[list[str], list[str]]:
    """(the arguments with those of the file in front of them, what the file said, in words).

    Nothing changes for commands without ``--config``, and where there is no file. Raises OptionError at the line.
    """
    known = options_of(command)
    path = _find_argument(argv)
    implicit = path is None
    if path is None and Path(NAME).is_file():
        path = Path(NAME)
    if path is None or OPTION.removeprefix("--") not in known:
        return list(argv), []
    said = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    budgets = {one.flag for one in known.values() if one.group is Budgets}
    if said & {*budgets, "plan"} or any("budget=" in word for word in argv):
        said |= budgets
    found = read(path, command, implicit, frozenset(said))
    at = list(argv).index(command) + 1
    words = [word for one in found for word in one.words]
    return [*argv[:at], *words, *argv[at:]], [f"options of {path}: {' '.join(words)}"] if words else []


def read(path: Path, command: str, implicit: bool = False, said: frozenset[str] = frozenset()) -> list[Stated]:
    """What the file states for ``command``; a command's table after the top, so that it wins.

    said   options that the command line gives: theirs are not read, but for those that may be repeated
    """
    if path.is_dir():
        path = path / REPORT
    text = _text_of(path)
    entries = _of_report(text, path) if path.suffix == ".json" else _of_toml(text, path, command)
    known, stated, distrusted = options_of(command), [], implicit or path.suffix == ".json"
    for key, value, where in entries:
        if dashes(key) in _NO_OPTIONS:
            raise OptionError(f"'{key}' cannot stand in a file", where=where.text)
        one = known.get(dashes(key))
        if one is None or one.place:
            if where.of_all and dashes(key) in flags():
                continue  # at the top, for another command
            raise OptionError(f"unknown option '{key}'", where=where.text, cure=_nearest(key, command))
        if one.flag in said and not one.repeated:
            continue
        if distrusted and (one.flag == "trust-pickle" or "python:" in str(value)) and value:
            raise OptionError(
                f"'{key}' would run code, which this file may not ask for",
                where=where.text,
                why="a file in the working directory, or a report, may have come with the model",
                cure=f"say {one.dashed} on the command line",
            )
        stated.append(Stated(one.dashed, tuple(_words(one, value, where.text)), where.text))
    return stated


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OptionError("this file is too large to hold options", where=str(path))
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            "the options cannot be read", where=f"{OPTION} {path}", why=error.strerror or str(error)
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError("the options are not a text file", where=f"{OPTION} {path}", why=str(error)) from None


def _nearest(key: str, command: str) -> str:
    return nearest(dashes(key), [one.flag for one in options_of(command).values() if not one.place])


@dataclass(frozen=True)
class _Place:
    """Where an entry stands. of_all: not in the table of a command"""

    text: str
    of_all: bool


def _of_toml(text: str, path: Path, command: str) -> Iterator[tuple[str, Any, _Place]]:
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
        if isinstance(value, dict) and key in COMMANDS:
            continue
        if dashes(key) not in {*flags(), *_NO_OPTIONS}:
            if isinstance(value, dict):
                raise OptionError(
                    f"'{key}' is neither a command nor an option", where=where, cure=nearest(key, COMMANDS)
                )
            raise OptionError(f"unknown option '{key}'", where=where, cure=_nearest(key, command))
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


def _words(one: Option, value: Any, where: str) -> Iterator[str]:
    """The option as words of a command line. Raises OptionError for a value of the wrong kind."""
    if one.switch:
        if not isinstance(value, bool):
            raise OptionError(f"'{one.flag}' is true or false", where=where, why=f"found {value!r}")
        if value:
            yield one.dashed
        return
    if one.repeated:
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        parts = pairs if isinstance(pairs, list) else [pairs]
    else:
        parts = [",".join(map(str, value))] if isinstance(value, list) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            raise OptionError(f"'{one.flag}' is text or a number", where=where, why=f"found {part!r}")
        if isinstance(part, str) and re.fullmatch(r"<\w+>", part):
            raise OptionError(
                f"'{one.flag}' was given from Python and is not in the report",
                where=where,
                why=f"it was a {part[1:-1]}",
                cure=f"give {one.dashed} on the command line",
            )
        try:
            one.parse(str(part))
        except (TypeError, ValueError):
            raise OptionError(
                f"'{part}' is no value for '{one.flag}'", where=where, why=f"expected {one.parse.__name__}"
            ) from None
        except OptionError as error:
            raise OptionError(error.what, where=where, cure=error.cure) from None
        yield f"{one.dashed}={part}"


def _find_argument(argv: Sequence[str]) -> Path | None:
    """The file that ``--config`` names."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == OPTION:
            found = value if equals else following
            if not found or (not equals and found.startswith("-")):
                raise OptionError("which file?", where=OPTION, cure=f"write {OPTION} {NAME}")
            return Path(found)
    return None


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
