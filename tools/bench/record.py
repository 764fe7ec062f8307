"""What every benchmark writes beside its figures, how results are written and read, and this process's memory.

A results file is JSON in which a record takes one line: of a list of records, ``{"fields": [..], "records": [[..],
..]}``, the names are written once. Floats have six digits.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import fxprune
from fxprune.process.environment import environment

MIB = 2**20
DIGITS = 6  # of floats in results


def header(script: str) -> dict[str, Any]:
    """Script, day, CPU, versions, and how busy the machine is at the end. Nothing that names it."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "script": script,
        "commit": commit(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "load_average": load,
        **environment(),
        "torchvision": _version("torchvision"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the imported package, with a ``+`` where it was edited since; empty outside a checkout."""
    git = ["git", "-C", str(Path(fxprune.__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        edits = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "fxprune", "passes", "backends"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if edits.stdout.strip() else "")


def command(name: str) -> list[str]:
    """How a benchmark starts a process of its own kind."""
    return [sys.executable, str(Path(__file__).resolve().with_name(f"{name}.py"))]


def write(path: Path, script: str, **figures: Any) -> None:
    """Header and figures as a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of({**header(script), **figures}), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """What a results file holds, records as they were written but for fields that had no value (None)."""
    return {name: _open_table(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}


def text_of(content: Mapping[str, Any]) -> str:
    """A results file: one line for a record, for an innermost mapping, and for whatever else there is.

    >>> print(text_of({"seeds": [0], "measured": [{"row": "l2", "figure": 0.12345678}, {"row": "obs", "why": "no"}]}))
    {
    "seeds":[0],
    "measured":{"fields":["row","figure","why"],"records":[
    ["l2",0.123457],
    ["obs",null,"no"]
    ]}
    }
    <BLANKLINE>
    """
    return f"{_lines(content, open_up=True)}\n"


def _lines(value: Any, open_up: bool = False) -> str:
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        fields = list(dict.fromkeys(name for one in value for name, held in one.items() if held is not None))
        lines = [_line(_without_end([one.get(name) for name in fields])) for one in value]
        return f'{{"fields":{_line(fields)},"records":[\n' + ",\n".join(lines) + "\n]}"
    if isinstance(value, Mapping) and value and (open_up or all(isinstance(one, dict) for one in value.values())):
        lines = [f"{_line(str(name))}:{_lines(one)}" for name, one in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    return _line(value)


def _without_end(values: list[Any]) -> list[Any]:
    """The values up to the last that is there."""
    while values and values[-1] is None:
        values.pop()
    return values


def _line(value: Any) -> str:
    return json.dumps(_round(value), separators=(",", ":"), ensure_ascii=False)


def _round(value: Any) -> Any:
    """Floats with as many digits as a measurement can bear."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _round(one) for name, one in value.items()}
    return [_round(one) for one in value] if isinstance(value, list | tuple) else value


def _open_table(value: Any) -> Any:
    """Records of a table."""
    if not isinstance(value, dict) or set(value) != {"fields", "records"}:
        return value
    pairs = (zip(value["fields"], record, strict=False) for record in value["records"])
    return [{name: held for name, held in record if held is not None} for record in pairs]


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    On Linux from ``VmHWM``: ``ru_maxrss`` starts at the size of whoever started the process.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> int:
    """Resident size of this process now, in bytes (0 where the system does not tell)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    try:
        said = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    except OSError:
        return 0
    return int(said[1]) * 1024 if said else 0


def describe_error(error: BaseException, length: int = 300) -> str:
    """An exception as one line, without the folders of this machine."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/", "", line)[:length]
