"""``Artifact``: the result, in memory and as a directory that is whole or absent.

model.pt2      the pruned program; ``torch.export.load`` reads it with torch alone: no model class, no fxprune
model.onnx     the target's payload, where the target is not eager (model.onnx.data beside it above 512 MiB)
plan.json      which elements of every group stayed
report.json    what was done, what it costs, what stayed unpruned and why, how exact it is (see ``build_report``)
report.html    the same for people: one page that needs nothing else
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from .. import registry
from ..data.memory import give_back
from ..errors import LoadError, OptionError
from ..intake.archive import read_program, write_program
from ..intake.op_libraries import notes_on_ops
from ..ir.cost import COUNTED, Budget, Cost
from ..ir.pipeline import PassResult, describe_results
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..ir.signature import describe_inputs, output_names
from ..process.environment import versions
from ..process.files import publish
from ..report.entries import VERSION
from ..report.op_gaps import gap_lines
from ..target.backend import Backend, Lowered, lower_and_verify
from ..target.gate import describe_executed
from .files import PAGE, PLAN, PROGRAM, REPORT, check_destination, check_files, file_entry, files_in, read_report
from .module import ProgramModule, module_of

Measure: TypeAlias = Callable[[Backend, Lowered, Program, Mapping[str, Any]], dict[str, Any]]


@dataclass
class Artifact:
    """A pruned program, the plan that made it, and the report about both.

    program  the pruned program; ``program.exported`` is the ExportedProgram
    plan     what stayed of each group of the dense program
    report   plain data, see :func:`build_report`; ``save`` adds ``parity``, ``payload`` and ``files``
    backend  the target that ``save`` lowers to
    path     the directory, once saved or when read back
    extras   more files for the directory (pictures), by name
    """

    program: Program
    plan: CompressionPlan
    report: dict[str, Any]
    backend: Backend = field(default_factory=lambda: registry.backend("eager"))
    path: Path | None = None
    extras: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    _module: ProgramModule | None = field(default=None, repr=False)
    _read: Program | None = field(default=None, repr=False)  # as it lies in ``path``

    @property
    def module(self) -> ProgramModule:
        """The pruned model as an ``nn.Module`` whose parameters train (see :class:`ProgramModule`).

        The same object every time. It shares its weights with ``program``, so what you train is what ``save`` writes.
        """
        if self._module is None:
            self._module = module_of(self.program.exported)
        return self._module

    @property
    def target(self) -> str:
        return self.backend.name

    def save(self, path: str | Path, overwrite: bool = True, measure: Measure | None = None, page: bool = True) -> Path:
        """Lower, verify and write everything into the directory ``path``; return it.

        measure   is given the written payload, and returns what more the report says (how fast it is)
        page      draw the report's page as well

        Nothing appears there before all of it is written and verified, and an older artefact stays until then. Raises
        FxpruneError when the place cannot be written or holds something that fxprune did not write, VerifyError when
        the payload does not compute what the program computes, LoweringError when the target cannot express an op.
        """
        from ..report.render import render

        path = Path(path)
        check_destination(path, overwrite)
        program = self.backend.storable(self._read_weights())
        untouched = program is self._read and self._module is None  # a module may have been trained in place
        with publish(path) as directory:
            lowered, parity = lower_and_verify(self.backend, program, directory, int(self.report.get("seed") or 0))
            lowered = lowered.unload()  # its memory is wanted for what is written and timed next
            give_back()
            if untouched and self.path is not None:  # byte for byte what was delivered
                shutil.copyfile(self.path / PROGRAM, directory / PROGRAM)
            elif not (directory / PROGRAM).exists():
                write_program(program.exported, directory / PROGRAM)
            (directory / PLAN).write_text(self.plan.to_json(), encoding="utf-8")
            for name, content in self.extras.items():
                (directory / name).write_bytes(content)
            report = {
                **self.report,
                **_target(self.backend),
                "payload": lowered.payload.relative_to(directory).as_posix(),
                "parity": {**parity.to_dict(), "runtime": lowered.runtime or self.target, "versions": versions()},
                "earlier": self.report.get("earlier", []) if untouched else [],
                "lowering": dict(lowered.about),
                "unfinished": describe_unfinished(self.backend, path, lowered.missing),
                "files": files_in(directory),
                **describe_executed(self.report, lowered.sparsity, lowered.notes),
                **(measure(self.backend, lowered, program, self.report) if measure else self._still_measured()),
            }
            if page:
                (directory / PAGE).write_text(render(report, self.plan, self.extras), encoding="utf-8")
                report["files"][PAGE] = file_entry(directory / PAGE)
            (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        self.report, self.path = report, path
        return path

    def _still_measured(self) -> dict[str, Any]:
        """The latency that the report states, if it is of the same target: weights do not change it."""
        told = self.report.get("measured")
        return {"measured": told if told and told.get("target") == self.backend.text else None}

    def _read_weights(self) -> Program:
        """The program with the module's present weights (they may have been trained, moved or replaced)."""
        if self._module is None:
            return self.program
        state = {k: v for k, v in self._module.state_dict(keep_vars=True).items()}
        exported = self.program.exported
        if all(state.get(k) is v for k, v in exported.state_dict.items()):
            return self.program
        devices = {t.device for t in state.values()} - {t.device for t in exported.state_dict.values()}
        if devices:
            raise OptionError(
                "the module was moved to another device",
                where=str(next(iter(devices))),
                cure="move it back before saving: artifact.module.to('cpu')",
            )
        from ..ir.rebuild import copy_graph, rebuild

        kept = {k: state.get(k, v) for k, v in exported.state_dict.items()}
        return replace(self.program, exported=rebuild(exported, copy_graph(exported), state_dict=kept))

    @staticmethod
    def read(path: str | Path) -> Artifact:
        """An artefact from its directory, every file checked against the report. Raises LoadError."""
        path = Path(path)
        report = read_report(path)
        check_files(path, report)
        program = Program(read_program(path / PROGRAM), name=str(report.get("name", "model")))
        told = report.get("tokens")
        picture = told.get("picture") if isinstance(told, dict) else None
        known = isinstance(picture, str) and picture in report["files"]
        extras = {str(picture): (path / str(picture)).read_bytes()} if known else {}
        return Artifact(
            program, CompressionPlan.read(path / PLAN), report, _backend(path, report), path, extras, _read=program
        )


def load(path: str | Path) -> ProgramModule:
    """The pruned model as an ``nn.Module``, from an artefact's directory or from a ``.pt2`` file.

    Needs neither the model's class nor the library it came from, and runs no code from the file. Where a report lies
    beside it, the file must have the hash that the report states. Raises LoadError.
    """
    path = Path(path)
    if path.is_dir():
        check_files(path, read_report(path), only=(PROGRAM,))
        path = path / PROGRAM
    return module_of(read_program(path))


def build_report(
    program: Program,
    *,
    name: str,
    target: str,
    dense: Cost,
    compressed: Cost,
    plan: CompressionPlan,
    frozen: Sequence[Mapping[str, Any]] = (),
    gaps: Sequence[Mapping[str, Any]] = (),
    budget: Budget | None = None,
    pipeline: str = "",
    passes: Sequence[PassResult] = (),
    seed: int = 0,
    notes: Iterable[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Everything that is known about a result, as plain data for ``report.json``.

    fxprune_report  version of this format                 versions  fxprune, torch and what else matters
    name            of the model                           seed      of everything random
    target, target_options  the backend, and its options that are not the default
    budget          {metric, amount, relative} or null     pipeline  text that replays the passes
    passes          what each pass changed, measured       cost      {dense, compressed, ratio, counted}: flops are
    inputs, outputs names, dtypes and shapes                         multiply-accumulates at the example shapes
    pruned          [{group, kind, size, kept}]            frozen    [{group, kind, size, why}]
    gaps            [{op, lacks, why, nodes, groups}]: ops that were sliced without recovery, cost or importance
    notes           what the user should know              parity    {max_abs, max_rel, tolerance, tried, ...}
    payload         the target's main file                 files     {name: {sha256, size_bytes}}, report excluded
    options         what was asked for, by the names of the command line: ``--config report.json`` asks for it again

    lowering        what the backend has to say            unfinished  null, or {missing, finish}: what the machine
                                                           lacked, and the command that finishes where it is there

    A run adds masked, importance, data, search, groups (with their scores), memory, agreement, recovery, sparsity,
    tokens and latency where there are any; a sweep adds sweep. ``save`` adds measured (how fast the payload is beside
    the dense model's, see :mod:`fxprune.artifact.delivered`) and earlier (other targets of the same program).
    :data:`fxprune.report.schema.REPORT` is the schema of it all.

    ``target``, ``parity``, ``payload``, ``lowering``, ``unfinished`` and ``files`` are filled in by ``Artifact.save``;
    ``more`` is added as it is.
    """
    before, after = (vars(c) for c in (dense, compressed))
    return {
        "fxprune_report": VERSION,
        "name": name,
        "target": target,
        "versions": versions(),
        "seed": seed,
        "budget": None if budget is None else dict(vars(budget)),
        "pipeline": pipeline,
        "passes": describe_results(passes),
        "cost": {
            "dense": dict(before),
            "compressed": dict(after),
            "ratio": {k: after[k] / before[k] if before[k] else 1.0 for k in before},
            "counted": COUNTED,
        },
        "inputs": describe_inputs(program),
        "outputs": output_names(program.exported),
        "pruned": [
            {"group": g, "kind": c.kind, "size": c.size, "kept": len(c.keep)}
            for g, c in sorted(plan.elements.items())
            if len(c.keep) < c.size
        ],
        "frozen": [dict(one) for one in frozen],
        "gaps": [dict(one) for one in gaps],
        "notes": [*notes, *gap_lines(gaps), *notes_on_ops(program.exported)],
        "parity": None,
        "payload": None,
        "files": {},
        **more,
    }


def describe_unfinished(backend: Backend, path: Path, missing: Sequence[str]) -> dict[str, Any] | None:
    """What the report says of an artefact whose target needs what this machine lacks; None where nothing is missing."""
    if not missing:
        return None
    return {"missing": list(missing), "finish": f"fxprune lower {path.name} --target {shlex.quote(backend.text)}"}


def _target(backend: Backend) -> dict[str, Any]:
    return {"target": backend.name, "target_options": backend.options}


def _backend(path: Path, report: Mapping[str, Any]) -> Backend:
    options = report.get("target_options", {})
    if not isinstance(options, dict) or not all(isinstance(v, str | int | float) for v in options.values()):
        raise LoadError("the report is malformed", where=str(path / REPORT), why="'target_options' are plain values")
    try:
        return registry.backend(report["target"], **options)
    except (OptionError, TypeError, ValueError) as error:
        why = error.what if isinstance(error, OptionError) else str(error)
        raise LoadError(
            "the report names a target that this fxprune does not know",
            where=str(path / REPORT),
            why=why,
            cure="update fxprune, or install the plugin that made the artefact",
        ) from None
