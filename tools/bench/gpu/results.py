"""The results of a stage, on disk after every cell: what is there is not measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gpu.cells import Record
from bench.record import read, write


class Results:
    """One stage's file.

    running  the cell that had begun when the file was written; it stays so where the process died in it
    """

    def __init__(self, path: Path) -> None:
        held = read(path) if path.exists() else {}
        self.path, self.records, self.running = path, list[Record](held.get("cells", ())), str(held.get("running", ""))
        self.about: dict[str, Any] = dict(held.get("about", {}))

    def has(self, name: str) -> bool:
        """Whether the cell has its record."""
        return any(r["cell"] == name for r in self.records)

    def begin(self, name: str) -> None:
        self.running = name
        self._write()

    def end(self, record: Record) -> None:
        """The running cell's record: figures, or an ``error``."""
        self.records.append({"cell": self.running, **record})
        self.running = ""
        self._write()

    def close(self, **about: Any) -> None:
        """What is to be said of the stage as a whole."""
        self.about, self.running = {**self.about, **about}, ""
        self._write()

    def _write(self) -> None:
        # a record's fields are made of one process's cells: an empty list would be read as no table
        cells: dict[str, Any] = {"cells": self.records} if self.records else {}
        write(self.path, "gpu", about=self.about, running=self.running, **cells)
