"""The smallest backend, and the one to copy: the payload is ``model.pt2``, run by PyTorch on any CPU or GPU.

A new backend answers five questions; each is one line or one method below.

1. What is it called, what file does it write, which channel counts does it like?  -> the class variables
2. What can the user choose?                                                       -> the fields (none here)
3. Which ops must be rewritten first?                                              -> ``legalize`` (none here)
4. How does a program become a file?                                               -> ``lower``
5. How does that file run?                                                         -> ``load``

Whatever ``lower`` writes is then run against the program on seeded inputs at several sizes; a backend cannot skip that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...intake.archive import read_program, write_program
from ...ir.program import Program
from ...target.backend import Backend, Lowered, Runner
from ...target.parity import eager


@dataclass(frozen=True)
class EagerBackend(Backend):
    """``model.pt2``: reloads with torch alone, without the model's class and without pickle."""

    name: ClassVar[str] = "eager"
    suffix: ClassVar[str] = ".pt2"

    def lower(self, program: Program, directory: Path) -> Lowered:
        path = self.payload(directory)
        write_program(program.exported, path)
        return Lowered(path, (path,), self.load(path))  # what runs is what was read back, so writing is verified too

    def load(self, payload: Path) -> Runner:
        return eager(read_program(payload))
