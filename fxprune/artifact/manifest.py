"""``manifest.json``: what a delivery holds, what it was made from, and which gates it met.

    fxprune_manifest   version of this format
    name, status       of the model; passed, failed or unfinished
    request            the options, and a SHA-256 of everything that decides the result
    inputs             model, plan and data, by hash
    metric             name, output, the dense model's value, samples
    carried            how many batches of the data lie in evidence.safetensors
    targets            folder -> target, status, payload, latency, gates
    cost, versions, environment
    files              path -> {sha256, size_bytes} of every file but this one
    seal               SHA-256 of all the rest

The seal finds edits and damage, not a forger: who must trust nobody signs ``manifest.json`` itself, with a tool of
theirs; the hashes in it then cover everything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadError, OptionError
from ..process.files import sha256_of
from .gates import FAILED, PASSED, UNFINISHED

MANIFEST, EVIDENCE = "manifest.json", "evidence.safetensors"
VERSION = 1
MAX_BYTES = 16 * 2**20
MAX_FILES, MAX_TARGETS, MAX_GATES, MAX_TEXT = 10_000, 64, 64, 20_000
STATUSES = (PASSED, FAILED, UNFINISHED)
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_PATH = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,2}}")  # no leading dot, no "..", no backslash, no absolute path
_FOLDER = re.compile(_SEGMENT)
_HASH = re.compile(r"[0-9a-f]{64}")
_SHAPE: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "status": str,
    "request": dict,
    "inputs": dict,
    "metric": dict,
    "carried": dict,
    "cost": dict,
    "versions": dict,
    "environment": dict,
    "targets": dict,
    "files": dict,
    "seal": str,
}
Manifest = dict[str, Any]


def seal(content: Mapping[str, Any]) -> Manifest:
    """``content`` with the version of the format and the seal."""
    whole = {"fxprune_manifest": VERSION, **content}
    return {**whole, "seal": seal_of(whole)}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its seal, in one canonical form."""
    rest = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write it as readable JSON."""
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the delivery in ``directory``, checked for form and against its seal. Raises LoadError."""
    file = directory / MANIFEST
    try:
        if not directory.is_dir() or not file.exists():
            raise LoadError(
                "this directory is no delivery",
                where=str(directory),
                why=f"it has no {MANIFEST}",
                cure="give the `--out` of fxprune export",
            )
        if file.is_symlink() or not file.is_file():
            raise _refuse_file(file, "it is no plain file")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise LoadError("the manifest is too large", where=str(file), why=f"{size} bytes, the limit is {MAX_BYTES}")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError("the manifest cannot be read", where=str(file), why=error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise LoadError("the manifest is damaged", where=str(file), why=str(error)[:200]) from None
    if not isinstance(manifest, dict) or "fxprune_manifest" not in manifest:
        raise _refuse_file(file, "it has no 'fxprune_manifest' version")
    if manifest["fxprune_manifest"] != VERSION:
        raise LoadError(
            "the manifest has another version",
            where=str(file),
            why=f"found {str(manifest['fxprune_manifest'])[:40]}, this fxprune reads {VERSION}",
        )
    _check_form(file, manifest)
    if seal_of(manifest) != manifest["seal"]:
        raise LoadError(
            "the manifest was changed after it was sealed",
            where=str(file),
            why="its seal is the SHA-256 of something else",
            cure="copy it again, or export again",
        )
    return manifest


def _check_form(file: Path, manifest: Mapping[str, Any]) -> None:
    for key, kind in _SHAPE.items():
        if not isinstance(manifest.get(key), kind):
            raise _refuse_file(file, f"'{key}' is missing or of another type")
    if manifest["status"] not in STATUSES:
        raise _refuse_file(file, "'status' is none of passed, failed and unfinished")
    if not 1 <= len(manifest["targets"]) <= MAX_TARGETS or len(manifest["files"]) > MAX_FILES:
        raise _refuse_file(file, f"{len(manifest['targets'])} targets and {len(manifest['files'])} files")
    for path, entry in manifest["files"].items():
        if not _PATH.fullmatch(path) or path == MANIFEST:
            raise _refuse_file(file, f"'{path[:80]}' is no path inside the delivery")
        if (
            not isinstance(entry, dict)
            or not _HASH.fullmatch(str(entry.get("sha256")))
            or type(entry.get("size_bytes")) is not int
            or entry["size_bytes"] < 0
        ):
            raise _refuse_file(file, f"'{path}' needs sha256 and size_bytes")
    for folder, target in manifest["targets"].items():
        if not _FOLDER.fullmatch(folder):
            raise _refuse_file(file, f"'{folder[:80]}' is no folder inside the delivery")
        if (
            not isinstance(target, dict)
            or target.get("status") not in STATUSES
            or not isinstance(target.get("target"), str)
            or not isinstance(target.get("gates"), list)
        ):
            raise _refuse_file(file, f"target '{folder}' needs target, status and gates")
        payload = target.get("payload")
        if payload != "" and f"{folder}/{payload}" not in manifest["files"]:
            raise _refuse_file(file, f"the payload of target '{folder}' is none of its files")
        if len(target["gates"]) > MAX_GATES or not all(_is_gate(g) for g in target["gates"]):
            raise _refuse_file(file, f"a gate of target '{folder}' is malformed")
    metric, request = manifest["metric"], manifest["request"]
    whole = all(type(request.get(k)) is int for k in ("samples", "seed")) and type(metric.get("samples")) is int
    words = all(isinstance(metric.get(k), str) for k in ("name", "output", "sha256"))
    if not whole or not words or type(metric.get("dense")) not in (int, float):
        raise _refuse_file(file, "'metric' needs name, output, dense, samples and sha256, 'request' samples and seed")
    limits = request.get("limits")
    if not isinstance(limits, dict) or not all(v is None or type(v) in (int, float) for v in limits.values()):
        raise _refuse_file(file, "'request' needs limits that are numbers")


def _is_gate(gate: Any) -> bool:
    number = (type(None), int, float)
    return (
        isinstance(gate, dict)
        and gate.keys() == {"name", "status", "measured", "limit", "unit", "why"}
        and gate["status"] in STATUSES
        and isinstance(gate["measured"], number)
        and isinstance(gate["limit"], number)
        and all(isinstance(gate[k], str) and len(gate[k]) <= MAX_TEXT for k in ("name", "unit", "why"))
    )


def _refuse_file(file: Path, why: str) -> LoadError:
    return LoadError("the manifest is malformed", where=str(file), why=why, cure="export again")


def fingerprints(directory: Path) -> dict[str, dict[str, Any]]:
    """Path -> SHA-256 and size of every file below ``directory`` but the manifest, in order."""
    found = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST)
    return {
        p.relative_to(directory).as_posix(): {"sha256": sha256_of(p), "size_bytes": p.stat().st_size} for p in found
    }


def wrong_files(directory: Path, manifest: Mapping[str, Any]) -> str:
    """What in the directory is not as the manifest says: changed, missing, not named by it, a link; "" if nothing."""
    known = dict(manifest["files"])
    for folder, folders, files in os.walk(directory, followlinks=False):
        for name in (*folders, *files):
            path = Path(folder) / name
            inside = path.relative_to(directory).as_posix()
            if path.is_symlink():
                return f"{inside} is a link"
            if name in folders or inside == MANIFEST:
                continue
            entry = known.pop(inside, None)
            if entry is None:
                return f"{inside} is not in the manifest"
            if not path.is_file() or path.stat().st_size != entry["size_bytes"] or sha256_of(path) != entry["sha256"]:
                return f"{inside} is not the file that was signed off: its size or its SHA-256 differs"
    return f"{next(iter(known))} is missing" if known else ""


def check_delivery(path: Path) -> None:
    """Raise OptionError unless a delivery may be written at ``path``: nothing there, or one that is whole."""
    if not path.exists():
        return
    if not path.is_dir():
        raise OptionError(
            "the output is a directory, but a file lies there",
            where=str(path),
            cure="remove it or choose another `--out`",
        )
    if not any(path.iterdir()):
        return
    try:
        manifest = read_manifest(path)
    except LoadError as error:
        raise OptionError(
            "the output directory is not empty and holds no delivery, so it is left alone",
            where=str(path),
            why=error.why or error.what,
            cure="choose another `--out`",
        ) from None
    known = set(manifest["files"]) | {MANIFEST}
    foreign = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir() or p.is_symlink())
    foreign = [p for p in foreign if p not in known]
    if foreign:
        raise OptionError(
            "the output directory holds files that fxprune did not write, so it is left alone",
            where=str(path),
            why=", ".join(foreign[:5]),
            cure="move them, or choose another `--out`",
        )
