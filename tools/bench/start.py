"""How the commands of this folder start.

``tools`` takes this folder's place on the path. So a benchmark is ``bench.FAMILY.NAME`` wherever it is imported from,
``peers`` is found beside it, and no file of this folder hides a module of its name (``compile``, ``tokens``, ``zoo``).
Where fxprune is not installed, the one beside ``tools`` is taken.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(benchmark: str) -> None:
    """Run ``main`` of ``FAMILY.NAME`` and leave with its exit code."""
    sys.path[0] = str(ROOT / "tools")
    if importlib.util.find_spec("fxprune") is None:
        take_from_checkout()
    sys.exit(importlib.import_module(f"bench.{benchmark}").main())


def take_from_checkout() -> None:
    """Let this process, and those that it starts, import fxprune from the checkout, with nothing installed.

    ``passes`` and ``backends`` lie beside ``fxprune`` there and inside it once it is installed: a folder of links puts
    them in their place.
    """
    folder = Path(tempfile.mkdtemp(prefix="fxprune-source-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "fxprune"
    package.mkdir()
    for source in [*(ROOT / "fxprune").iterdir(), ROOT / "passes", ROOT / "backends"]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    sys.path.insert(1, str(folder))
    beside = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), beside)))
