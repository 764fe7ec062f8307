"""Measured times of block-sparse layers against dense ones: what the cost gate believes, and nothing else.

A table belongs to one device and one way of running tiles (``fxprune tune`` measures it and keeps it under the device's
name). Where there is no table, or it does not hold a shape, layers stay dense.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoadError
from ..process.environment import versions

VERSION = 1
MAX_BYTES = 16 * 2**20
NEAR = 2.0  # rows may differ from a measured count by this factor


@dataclass(frozen=True)
class Timing:
    """One shape: y [m, n] = x [m, k] W^T with tiles of ``pattern``, a share ``density`` of which is multiplied.

    dense_ms, sparse_ms   medians;  configuration: how the kernel ran, as text, or ""
    """

    n: int
    k: int
    pattern: str
    dtype: str
    m: int
    density: float
    dense_ms: float
    sparse_ms: float
    configuration: str = ""

    @property
    def ratio(self) -> float:
        """How much faster than dense: above 1 the tiles win."""
        return self.dense_ms / self.sparse_ms if self.sparse_ms else math.inf


@dataclass(frozen=True)
class BlockTable:
    """What was measured on one device.

    device    its name;  form: ``kernel`` (Triton) or ``ell`` (padded block-ELL in plain ops)
    """

    device: str
    form: str
    rows: tuple[Timing, ...]
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.device}, {self.date}" if self.date else self.device

    def find(self, n: int, k: int, pattern: str, dtype: str, m: int, density: float) -> Timing | None:
        """The timing to go by: the same layer, tile and dtype; the nearest number of rows, within a factor of two; of
        the densities measured there the smallest that is not below. None where nothing fits."""
        same = [t for t in self.rows if (t.n, t.k, t.pattern, t.dtype) == (n, k, pattern, dtype)]
        near = {t.m for t in same if max(t.m, m) <= NEAR * min(t.m, m)}
        if not near:
            return None
        closest = min(near, key=lambda rows: (abs(math.log(rows / m)), rows))
        above = [t for t in same if t.m == closest and t.density >= density - 1e-6]
        return min(above, key=lambda t: t.density, default=None)

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
        content = {"fxprune_blocks": VERSION, **asdict(self)}
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @staticmethod
    def read(path: Path) -> BlockTable:
        """Raises LoadError for a file that is none."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
            if raw.get("fxprune_blocks") != VERSION:
                raise ValueError(f"version {raw.get('fxprune_blocks')!r}, this fxprune reads {VERSION}")
            rows = tuple(Timing(**row) for row in raw["rows"])
            return BlockTable(str(raw["device"]), str(raw["form"]), rows, str(raw["date"]), dict(raw["versions"]))
        except OSError as error:
            raise LoadError(
                "the table of block timings cannot be read",
                where=str(path),
                why=error.strerror or str(error),
                cure="measure one with `fxprune tune`",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(
                "this file is no table of block timings",
                where=str(path),
                why=str(error)[:300],
                cure="measure one with `fxprune tune`",
            ) from None


def make_table(device: str, form: str, rows: Sequence[Timing]) -> BlockTable:
    """A table of today."""
    return BlockTable(device, form, tuple(rows), dt.datetime.now(dt.timezone.utc).date().isoformat(), versions())


def find_table_path(device: str, form: str) -> Path:
    """Where the table of a device is kept: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "fxprune" / "blocks" / f"{form}-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


def table_for(device: str, form: str, given: str = "") -> BlockTable | None:
    """The table ``given`` by path, else the one kept for this device, else None. Raises LoadError."""
    if given:
        return BlockTable.read(Path(given))
    path = find_table_path(device, form) if device else None
    return BlockTable.read(path) if path is not None and path.exists() else None
