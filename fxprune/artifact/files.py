"""The files of an artefact: their names, what may be read of them, and whether they are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadError, OptionError
from ..process.files import sha256_of
from ..report.entries import VERSION, upgrade_report

PROGRAM, PLAN, REPORT, PAGE = "model.pt2", "plan.json", "report.json", "report.html"
MAX_REPORT = 64 * 2**20  # bytes; a report of a thousand groups is far below one MiB
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def check_destination(path: Path, overwrite: bool = True) -> None:
    """Raise OptionError unless an artefact may be written at ``path``: call it before the work, not after."""
    if not path.exists():
        return
    where = str(path)
    if not path.is_dir():
        raise OptionError(
            "the output is a directory, but a file lies there", where=where, cure="remove it or choose another `--out`"
        )
    found = {p.name for p in path.iterdir()}
    if not found:
        return
    if not overwrite:
        raise OptionError("the output exists already", where=where, cure="choose another `--out`, or allow overwriting")
    try:
        report = read_report(path)
    except LoadError as error:
        raise OptionError(
            "the output directory is not empty and holds no artefact, so it is left alone",
            where=where,
            why=error.what,
            cure="choose another `--out`",
        ) from None
    ours = {REPORT, *report["files"]}
    folders = {name.partition("/")[0] for name in ours if "/" in name}
    inside = {q.relative_to(path).as_posix() for f in folders for q in (path / f).rglob("*") if q.is_file()}
    foreign = sorted((found - ours - folders) | (inside - ours))
    if foreign:
        raise OptionError(
            "the output directory holds files that fxprune did not write, so it is left alone",
            where=where,
            why=", ".join(foreign[:5]),
            cure="move them, or choose another `--out`",
        )


def read_report(path: Path) -> dict[str, Any]:
    """The report of the artefact in ``path``, checked for form. Raises LoadError."""
    file = path / REPORT
    if not path.is_dir():
        raise LoadError(
            "there is no such artefact",
            where=str(path),
            why="an artefact is a directory",
            cure="give the `--out` of fxprune compile",
        )
    try:
        size = file.stat().st_size
        if size > MAX_REPORT:
            raise LoadError("the report is too large", where=str(file), why=f"{size} bytes, the limit is {MAX_REPORT}")
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(
            "this directory is not an artefact",
            where=str(path),
            why=f"it has no {REPORT}",
            cure="give the `--out` of fxprune compile",
        ) from None
    except OSError as error:
        raise LoadError("the report cannot be read", where=str(file), why=error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise LoadError("the report is damaged", where=str(file), why=str(error)[:200]) from None
    if not isinstance(report, dict) or "fxprune_report" not in report:
        raise LoadError("this directory is not an artefact", where=str(file), why="it has no 'fxprune_report' version")
    if type(report["fxprune_report"]) is not int or report["fxprune_report"] not in (1, VERSION):
        raise LoadError(
            "the artefact has another version",
            where=str(file),
            why=f"found {report['fxprune_report']!r}, this fxprune reads 1 and {VERSION}",
        )
    files = report.get("files")
    if not isinstance(files, dict) or not isinstance(report.get("target"), str):
        raise LoadError("the report is malformed", where=str(file), why="'files' must be an object, 'target' a string")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):  # no leading dot in any part: a name can never lead out of the directory
            raise LoadError("the report is malformed", where=str(file), why=f"'{name[:80]}' is not a plain file name")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("size_bytes")) is not int
        ):
            raise LoadError("the report is malformed", where=f"{file}: {name}", why="needs sha256 and size_bytes")
    return upgrade_report(report)


def check_files(path: Path, report: Mapping[str, Any], only: Iterable[str] | None = None) -> None:
    """Raise LoadError unless the files (those named in ``only``, or all) are as the report says."""
    cure = "copy it again from where it was made, or compile again"
    for name in report["files"] if only is None else only:
        file, entry = path / name, report["files"].get(name)
        if entry is None:
            raise LoadError("the report does not know this file", where=str(file), cure=cure)
        try:
            size = file.stat().st_size
            if size != entry["size_bytes"]:
                raise LoadError(
                    "the file has another size than its report says",
                    where=str(file),
                    why=f"{size} bytes, expected {entry['size_bytes']}: truncated or replaced",
                    cure=cure,
                )
            if sha256_of(file) != entry["sha256"]:
                raise LoadError(
                    "the file is not the one its report describes",
                    where=str(file),
                    why="its SHA-256 differs: damaged or changed",
                    cure=cure,
                )
        except OSError as error:
            raise LoadError(
                "a file of the artefact is missing or cannot be read",
                where=str(file),
                why=error.strerror or str(error),
                cure=cure,
            ) from None


def files_in(directory: Path) -> dict[str, dict[str, Any]]:
    """What a report says of every file below ``directory``, by its name there."""
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): file_entry(p) for p in found}


def file_entry(path: Path) -> dict[str, Any]:
    """What a report says of a file: its SHA-256 and size."""
    return {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
