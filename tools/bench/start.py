"""How the commands of this folder start.

``tools`` takes this folder's place on the path. So a benchmark is ``bench.FAMILY.NAME`` wherever it is imported from,
``peers`` is found beside it, and no file of this folder hides a module of its name (``compile``, ``tokens``, ``zoo``).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def start(benchmark: str) -> None:
    """Run ``main`` of ``FAMILY.NAME`` and leave with its exit code."""
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(importlib.import_module(f"bench.{benchmark}").main())
