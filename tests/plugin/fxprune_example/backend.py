"""A backend: how a program becomes a file, and how that file runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fxprune.extend import Backend, Lowered, Program, Runner, eager, read_program, write_program


@dataclass(frozen=True)
class MyDevice(Backend):
    """Here: a .pt2 under another name."""

    name: ClassVar[str] = "mydevice"
    suffix: ClassVar[str] = ".mine.pt2"
    granularity: ClassVar[int] = 4

    def lower(self, program: Program, directory: Path) -> Lowered:
        path = self.payload(directory)
        write_program(program.exported, path)
        return Lowered(path, (path,), self.load(path))

    def load(self, payload: Path) -> Runner:
        return eager(read_program(payload))
