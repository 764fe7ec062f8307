"""Block-sparse layers for NVIDIA GPUs: a program whose winning layers call the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...intake.archive import read_program, write_program
from ...ir.pipeline import Pipeline
from ...ir.program import Program
from ...ops import block_sparse_linear  # noqa: F401  (the op must be known before a payload is read)
from ...target.backend import Backend, Lowered, Runner
from ...target.block_table import table_for
from ...target.gate import cuda_name, report, words
from ...target.parity import eager
from .legalize import UseKernels


@dataclass(frozen=True)
class TritonBackend(Backend):
    """``model.triton.pt2``: layers call ``fxprune::block_sparse_linear`` where a measured table says that it wins.

    The kernel runs where the tensors are on a GPU; elsewhere, also while the payload is verified on a machine without
    one, the op's CPU reference does. Reading the payload needs fxprune (``fxprune.load``); ``model.pt2`` beside it
    holds the same zeros in dense weights and needs torch alone.

    table   path of a recorded table; by default the one that ``fxprune tune`` measured on this machine's GPU
    """

    table: str = ""

    name: ClassVar[str] = "triton"
    requires: ClassVar[Sequence[tuple[str, str]]] = (
        ("triton", "pip install 'fxprune[triton]'"),
        ("a CUDA GPU", "files are written without one, not run"),
    )
    packages: ClassVar[Sequence[str]] = ("triton",)
    suffix: ClassVar[str] = ".triton.pt2"
    granularity: ClassVar[int] = 16

    def lower(self, program: Program, directory: Path) -> Lowered:
        device = cuda_name()
        table = table_for(device, "kernel", self.table)
        gate = UseKernels(table, device or "CUDA (this machine has no GPU)")
        program, (gated,) = Pipeline((gate,)).apply(program)
        path = self.payload(directory)
        write_program(program.exported, path)
        return Lowered(path, (path,), self.load(path), report(gated.record, table), tuple(words(gated.record)))

    def load(self, payload: Path) -> Runner:
        return eager(read_program(payload))
