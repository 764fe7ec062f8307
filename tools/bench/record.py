"""What every benchmark writes beside its figures, and how it reads this process's memory."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import fxprune
from fxprune.process.environment import environment

MIB = 2**20


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


def write(path: Path, script: str, **figures: Any) -> None:
    """Header and figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header(script), **figures}, indent=1) + "\n", encoding="utf-8")


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


def said(error: BaseException, length: int = 300) -> str:
    """An exception as one line, without the folders of this machine."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/", "", line)[:length]
