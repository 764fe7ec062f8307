"""AOTInductor: kernels compiled for this machine's CPU or GPU, packed with the weights into one ``.pt2``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import LoweringError, MissingDevice, OptionError
from ...intake.archive import write_program
from ...ir.placement import place, whole_device
from ...ir.program import Program
from ...ir.provenance import first_line
from ...process.environment import cpu_name
from ...process.silence import quiet
from ...target.backend import Backend, Lowered, Runner
from ...target.parity import eager

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class InductorBackend(Backend):
    """``model.inductor.pt2``: ``torch._inductor.aoti_load_package(path)`` gives a callable; batch and length stay open.

    The package holds machine code: for CPUs with the instruction set of the one that compiled it, or for GPUs of its
    kind. Loading it runs that code, so load only packages whose author you trust.

    device    ``cpu`` or ``cuda``. Where there is no such device, or no C++ compiler, ``model.pt2`` is written and the
              report says how to finish
    autotune  try several kernels for every product and keep the fastest (minutes)
    """

    device: str = "cpu"
    autotune: bool = False

    name: ClassVar[str] = "inductor"
    requires: ClassVar[Sequence[tuple[str, str]]] = (("a C++ compiler", "install gcc or clang"),)
    suffix: ClassVar[str] = ".inductor.pt2"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise OptionError(
                f"inductor does not compile for '{self.device}'",
                where=f"--target {self.name}",
                cure=f"inductor{{device={DEVICES[0]}}} or inductor{{device={DEVICES[1]}}}",
            )

    def runs_on(self) -> str:
        return self.device

    def lower(self, program: Program, directory: Path) -> Lowered:
        missing = lacking(self.device)
        if missing:
            path = directory / "model.pt2"
            write_program(program.exported, path)
            return Lowered(path, (path,), eager(program.exported), runtime="PyTorch", missing=missing)
        payload = self.payload(directory)
        self._compile(place(program, whole_device(self.device)).exported, payload)
        device = torch.cuda.get_device_name() if self.device == "cuda" else cpu_name()
        about = {"compiled_for": device, "device": self.device}
        return Lowered(payload, (payload,), self.load(payload), about=about, runtime=f"AOTInductor on {device}")

    def load(self, payload: Path) -> Runner:
        missing = [m for m in lacking(self.device) if "compiler" not in m]
        if missing:
            raise MissingDevice(
                "the package cannot be run here",
                where=payload.name,
                why="; ".join(missing),
                cure="run it on the machine it was compiled for",
            )
        with quiet():
            compiled: Any = torch._inductor.aoti_load_package(str(payload))
        spec = pytree.treespec_loads(compiled.loader.get_call_spec()[0])

        def run(flat: Sequence[Any]) -> list[Any]:
            home = next((t.device for t in flat if isinstance(t, Tensor)), torch.device("cpu"))
            moved = [t.to(self.device) if isinstance(t, Tensor) else t for t in flat]
            args, kwargs = pytree.tree_unflatten(moved, spec)
            with torch.no_grad():
                found = [o for o in pytree.tree_leaves(compiled(*args, **kwargs)) if isinstance(o, Tensor)]
            if self.device == "cuda":
                torch.cuda.synchronize()  # who times this must not time the launch alone
            return [o.to(home) for o in found]

        return run

    def _compile(self, exported: ExportedProgram, payload: Path) -> None:
        """Write the package. Raises LoweringError with inductor's first sentence."""
        aside = Path(tempfile.mkdtemp(prefix=".inductor-", dir=payload.parent))
        options = {"max_autotune": True} if self.autotune else {}
        try:
            with quiet():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(aside / "model.pt2"), inductor_configs=options
                )
            os.replace(aside / "model.pt2", payload)
        except OSError:
            raise
        except Exception as error:  # inductor's and the compiler's exceptions have no common type
            raise LoweringError(
                "inductor cannot compile the graph",
                where=payload.name,
                why=first_line(error),
                cure="`--target eager` works meanwhile",
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def lacking(device: str) -> tuple[str, ...]:
    """What this machine lacks to compile for ``device``, in words."""
    found = []
    if device == "cuda" and not torch.cuda.is_available():
        found.append("a CUDA device: this machine has none that PyTorch can use")
    if not _compiler():
        found.append("a C++ compiler: none of $CXX, g++ and clang++ was found")
    return tuple(found)


def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
