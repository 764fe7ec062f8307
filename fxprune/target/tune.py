"""``fxprune tune``: measure block-sparse layers on this machine, once, for the gate and the kernel to go by."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError, nearest
from ..ir.sparsity import tile_of
from ..process.events import Event, OnEvent, warn_only
from .block_table import BlockTable, find_table_path

TARGETS = {"triton": "fxprune.backends.triton.tune", "onnx": "fxprune.backends.onnx.tune"}
SHAPES = (
    (1152, 384),
    (384, 384),
    (1536, 384),
    (384, 1536),  # DeiT-S
    (2304, 768),
    (768, 768),
    (3072, 768),
    (768, 3072),
)  # DeiT-B and BERT-base
ROWS = (197, 197 * 8, 197 * 64)
PATTERNS = ("16x16", "16x32", "32x16", "32x32", "64x64", "128x64")
DENSITIES = (0.1, 0.25, 0.5, 0.75)
DTYPES = {"triton": "bfloat16", "onnx": "float32"}


def tune(
    target: str = "triton",
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    patterns: Sequence[str] = PATTERNS,
    densities: Sequence[float] = DENSITIES,
    dtype: str = "",
    out: str | Path | None = None,
    on_event: OnEvent = warn_only,
) -> tuple[BlockTable, Path]:
    """The table that was measured, and where it lies: by default under the device's name, where the target finds it.

    shapes    (out, in) of layers;  rows: how many rows they are applied to
    patterns  tiles;  densities: shares of tiles that are kept
    dtype     ``bfloat16`` for triton and ``float32`` for onnx unless said otherwise

    What is on disk for the same device stays, but for the shapes that are measured anew.
    Raises MissingDevice (exit code 4) where this machine has no such device; OptionError.
    """
    if target not in TARGETS:
        raise OptionError(f"nothing can be tuned for '{target}'", where="--target", cure=nearest(target, TARGETS))
    if not all(0 < d < 1 for d in densities):
        raise OptionError("a density is a share between 0 and 1", where=f"--density {list(densities)}")
    if not all(n > 0 and k > 0 for n, k in shapes) or not all(m > 0 for m in rows) or not (shapes and rows):
        raise OptionError("shapes and rows are positive numbers", where="--shapes, --rows")
    module = importlib.import_module(TARGETS[target])
    found: BlockTable = module.measure(
        shapes,
        rows,
        patterns,
        densities,
        dtype or DTYPES[target],
        lambda text, done, total: on_event(Event("progress", f"tune {target}", done, total)),
    )
    path = find_table_path(found.device, found.form) if out is None else Path(out)
    if path.exists():
        old = BlockTable.read(path)
        measured = {_key(t) for t in found.rows}
        rows_ = (
            (*(t for t in old.rows if _key(t) not in measured), *found.rows)
            if old.device == found.device
            else found.rows
        )
        found = BlockTable(found.device, found.form, rows_, found.date, found.versions)
    found.write(path)
    return found, path


def summary(table: BlockTable) -> dict[str, Any]:
    """What a table says in a few numbers: how often tiles win, and by how much at best."""
    wins = [t for t in table.rows if t.ratio > 1]
    best = max(table.rows, key=lambda t: t.ratio)
    mean = math.exp(sum(math.log(t.ratio) for t in table.rows) / len(table.rows))
    return {
        "device": table.device,
        "form": table.form,
        "cases": len(table.rows),
        "faster": len(wins),
        "geometric_mean": round(mean, 3),
        "best": {
            "ratio": round(best.ratio, 3),
            "n": best.n,
            "k": best.k,
            "m": best.m,
            "pattern": best.pattern,
            "density": best.density,
        },
    }


def drop_unset(**texts: str | None) -> dict[str, Any]:
    """Lists from the command line, those that were given: ``shapes`` and ``patterns`` of NxK, ``rows``, ``densities``.

    >>> drop_unset(shapes="1536x384,384x1536", rows=None, densities="0.5")
    {'shapes': [(1536, 384), (384, 1536)], 'densities': [0.5]}
    """
    read: dict[str, Any] = {"shapes": tile_of, "rows": int, "patterns": str, "densities": float}
    found = {}
    for name, text in texts.items():
        try:
            if text is not None:
                found[name] = [read[name](part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise OptionError(
                f"'{text}' is no list of numbers", where=f"--{name}", cure="write them with commas"
            ) from None
    return found


def _key(t: Any) -> tuple[Any, ...]:
    return (t.n, t.k, t.pattern, t.dtype, t.m, t.density)
