"""``Backend``: a target. What it likes, how it prepares the graph, how it writes the payload, how it runs it again.

A backend is one frozen class; its fields are its options. It sees only the finished :class:`Program`. The smallest one
is ``backends/eager``: copy that folder, give the class a name, write ``lower`` and ``load``, and add one line to
``fxprune/registry.py`` (or an entry point of the group ``fxprune.plugins``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..ir.agreement import TOLERANCE
from ..ir.pipeline import Pass, Pipeline
from ..ir.program import Program
from .gate import keep_dense, report, words
from .parity import Parity, Runner, check_parity

if TYPE_CHECKING:
    from ..data.batch import Calibration
    from ..intake.load import Loaded

__all__ = ["Backend", "Lowered", "Parity", "Runner", "lower_and_verify"]


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote: the main file, all its files (the main one included), and the file as a runner.

    sparsity  what became of weights with zeros in tiles (see ``block_gate.report``); notes: the same in words
    about     what else the report should say, as plain data
    runtime   what ran when ``run`` was compared with the program
    missing   what this machine lacks to make what the target is about, in words: then ``payload`` is what could be
              written without, and the artefact is unfinished
    """

    payload: Path
    files: tuple[Path, ...]
    run: Runner
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    runtime: str = ""
    missing: tuple[str, ...] = ()

    def unload(self) -> Lowered:
        """The same without what ``run`` holds in memory: a runtime's own copy of the weights. ``Backend.load`` gives
        another runner."""
        return replace(self, run=_refuse_unloaded)


def _refuse_unloaded(_: Sequence[Any]) -> list[Any]:
    raise RuntimeError("the payload was unloaded after it was verified: Backend.load(payload) loads it")


@dataclass(frozen=True)
class Backend(ABC):
    """A target. Fields are options.

    name         as on the command line: ``--target onnx``
    suffix       of the main file
    granularity  kept channel and neuron counts are best multiples of this
    tolerance    dtype -> largest accepted error relative to the largest output magnitude
    requires     what it needs of the machine, for ``fxprune doctor``: a module, ``one or another``, "a CUDA GPU" or "a
                 C++ compiler"; or such a thing with the cure where it is missing
    packages     distributions whose versions are worth knowing
    any_graph    whether it takes what passes put into a graph (token ops, projections taken apart, tables of a layer's
                 own); else nothing but widths may differ from what the model's class computes
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    granularity: ClassVar[int] = 8
    tolerance: ClassVar[Mapping[torch.dtype, float]] = TOLERANCE
    requires: ClassVar[Sequence[str | tuple[str, str]]] = ()
    packages: ClassVar[Sequence[str]] = ()
    any_graph: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from what they are by default, as plain data."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return {f.name: said[f.name] for f in fields(self) if f.repr and said[f.name] != f.default}

    @property
    def text(self) -> str:
        """As on the command line: ``trt{dtype=fp16}``."""
        given = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}{{{given}}}" if given else self.name

    def tolerances(self) -> Mapping[torch.dtype, float]:
        """``tolerance``, or another one where options decide what is computed in."""
        return self.tolerance

    def runs_on(self) -> str:
        """The device that inputs are to lie on when the payload is timed."""
        return "cpu"

    def with_data(self, calibration: Calibration | None) -> Backend:
        """This backend, for a program that was decided on these samples. Most backends do not look at data."""
        return self

    def with_source(self, source: Loaded) -> Backend:
        """This backend, for a model that was loaded from there. Most backends look at the program alone."""
        return self

    def limits(self, kinds: Sequence[str] = ()) -> tuple[Pass, ...]:
        """Passes behind the one that finds groups, which freeze what of these kinds the target cannot express; of all
        kinds where none is named."""
        return ()

    def storable(self, program: Program) -> Program:
        """The program with weights in values that the payload can hold: as they are, for most."""
        return program

    def with_threads(self, threads: int) -> Backend:
        """This backend with so many CPU threads, 0 for the runtime's own choice, where it has a say in it: a field
        ``threads``."""
        has = any(f.name == "threads" for f in fields(self))
        return replace(self, threads=threads) if has else self  # type: ignore[call-arg]

    def legalize(self) -> tuple[Pass, ...]:
        """Passes that make the graph fit the target, run before ``lower``. They must not change what it computes."""
        return ()

    @abstractmethod
    def lower(self, program: Program, directory: Path) -> Lowered:
        """Write the payload into ``directory`` (it exists, is empty and is the backend's own for now).

        Raises LoweringError naming the node, the op and the source line where the target cannot express one. Disk
        errors (OSError) pass through: the caller removes the directory and explains.
        """

    def prove(self, program: Program, lowered: Lowered, seed: int = 0) -> Lowered:
        """What was written, once it has computed what the program computes, with what more was found of it. Raises
        VerifyError where it does not do what the target is about: then nothing is delivered."""
        return lowered

    @abstractmethod
    def load(self, payload: Path) -> Runner:
        """The written payload as a runner: what the user will deploy, not the program it came from."""

    def payload(self, directory: Path) -> Path:
        """Where the main file lies in an artefact's directory."""
        return directory / f"model{self.suffix}"


def lower_and_verify(backend: Backend, program: Program, directory: Path, seed: int = 0) -> tuple[Lowered, Parity]:
    """Legalize, lower, run the payload against ``program`` itself.

    Raises LoweringError, or VerifyError when the outputs differ by more than the backend's tolerance.
    """
    legal = Pipeline(backend.legalize()).run(program.but(axes=None, groups=None, scores=None, plan=None))
    lowered = backend.lower(legal, directory)
    if not lowered.sparsity:
        decisions = keep_dense(program, f"the target '{backend.name}' multiplies dense weights")
        lowered = replace(lowered, sparsity=report(decisions), notes=(*lowered.notes, *words(decisions)))
    parity = check_parity(
        program,
        lowered.run,
        what=lowered.payload.name,
        tolerance=backend.tolerances(),
        seed=seed,
        cure="please report it with the model's name; `--target eager` works meanwhile",
    )
    return backend.prove(program, lowered, seed), parity
