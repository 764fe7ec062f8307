"""``Artifact``: the result, in memory and as a directory that is whole or absent.

model.pt2      the pruned program; ``torch.export.load`` reads it with torch alone: no model class, no fxprune
model.onnx     the target's payload, where the target is not eager (model.onnx.data beside it above 512 MiB)
plan.json      which elements of every group stayed
report.json    what was done, what it costs, what stayed unpruned and why, how exact it is (see ``build_report``)
report.html    the same for people: one page that needs nothing else
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from . import registry
from .archive import read_program, write_program
from .backend import Backend, Lowered, lower_and_verify
from .block_gate import executed
from .cost import COUNTED, Budget, Cost
from .errors import LoadError, OptionError
from .group import PruneGroup
from .measure import versions
from .memory import give_back
from .module import ProgramModule, module_of
from .op_libraries import notes_on_ops
from .parity import describe_inputs, output_names
from .pipeline import PassResult, describe_results
from .plan import CompressionPlan
from .program import Program
from .publish import published

PROGRAM, PLAN, REPORT, PAGE = "model.pt2", "plan.json", "report.json", "report.html"
VERSION = 1
MAX_REPORT = 64 * 2**20  # bytes; a report of a thousand groups is far below one MiB
Measure: TypeAlias = Callable[[Backend, Lowered, Program, Mapping[str, Any]], dict[str, Any]]
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


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
        """The pruned model as an ``nn.Module`` whose parameters train (see :class:`fxprune.module.ProgramModule`).

        The same object every time. It shares its weights with ``program``, so what you train is what ``save`` writes.
        """
        if self._module is None:
            self._module = module_of(self.program.exported)
        return self._module

    @property
    def target(self) -> str:
        return self.backend.name

    def save(self, path: str | Path, overwrite: bool = True, measure: Measure | None = None) -> Path:
        """Lower, verify and write everything into the directory ``path``; return it.

        measure   is given the written payload, and returns what more the report says (how fast it is)

        Nothing appears there before all of it is written and verified, and an older artefact stays until then. Raises
        FxpruneError when the place cannot be written or holds something that fxprune did not write, VerifyError when
        the payload does not compute what the program computes, LoweringError when the target cannot express an op.
        """
        from .report import render

        path = Path(path)
        check_destination(path, overwrite)
        program = self._trained()
        untouched = program is self._read and self._module is None  # a module may have been trained in place
        with published(path) as directory:
            lowered, parity = lower_and_verify(self.backend, program, directory, int(self.report.get("seed") or 0))
            lowered = lowered.unloaded()  # its memory is wanted for what is written and timed next
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
                "payload": lowered.payload.name,
                "parity": {**parity.to_dict(), "runtime": lowered.runtime or self.target, "versions": versions()},
                "earlier": self.report.get("earlier", []) if untouched else [],
                "lowering": dict(lowered.about),
                "unfinished": unfinished(self.backend, path, lowered.missing),
                "files": {p.name: _fingerprint(p) for p in sorted(directory.iterdir())},
                **executed(self.report, lowered.sparsity, lowered.notes),
                **(measure(self.backend, lowered, program, self.report) if measure else self._still_measured()),
            }
            (directory / PAGE).write_text(render(report, self.plan, self.extras), encoding="utf-8")
            report["files"][PAGE] = _fingerprint(directory / PAGE)
            (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        self.report, self.path = report, path
        return path

    def _still_measured(self) -> dict[str, Any]:
        """The latency that the report states, if it is of the same target: weights do not change it."""
        told = self.report.get("measured")
        return {"measured": told if told and told.get("target") == self.backend.text else None}

    def _trained(self) -> Program:
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
        from .rebuild import copy_graph, rebuild

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
    groups: Sequence[PruneGroup] = (),
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
    notes           what the user should know              parity    {max_abs, max_rel, tolerance, tried, ...}
    payload         the target's main file                 files     {name: {sha256, size_bytes}}, report excluded
    options         what was asked for, by the names of the command line: ``--config report.json`` asks for it again

    lowering        what the backend has to say            unfinished  null, or {missing, finish}: what the machine
                                                           lacked, and the command that finishes where it is there

    A run adds masked, importance, data, search, groups (with their scores), memory, agreement, recovery, sparsity,
    tokens and latency where there are any; a sweep adds sweep. ``save`` adds measured (how fast the payload is beside
    the dense model's, see :mod:`fxprune.latency_delivered`) and earlier (other targets of the same program).
    :data:`fxprune.report_schema.REPORT` is the schema of it all.

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
            for g, c in sorted(plan.choices.items())
            if len(c.keep) < c.size
        ],
        "frozen": [{"group": g.name, "kind": str(g.kind), "size": g.size, "why": g.frozen} for g in groups if g.frozen],
        "notes": [*notes, *notes_on_ops(program.exported)],
        "parity": None,
        "payload": None,
        "files": {},
        **more,
    }


def unfinished(backend: Backend, path: Path, missing: Sequence[str]) -> dict[str, Any] | None:
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


def check_destination(path: Path, overwrite: bool = True) -> None:
    """Raise OptionError unless an artefact may be written at ``path``: call it before the work, not after."""
    if not path.exists():
        return
    where = str(path)
    if not path.is_dir():
        raise OptionError(
            "the output is a directory, but a file lies there", where=where, cure="remove it or choose another --out"
        )
    found = {p.name for p in path.iterdir()}
    if not found:
        return
    if not overwrite:
        raise OptionError("the output exists already", where=where, cure="choose another --out, or allow overwriting")
    try:
        report = read_report(path)
    except LoadError as error:
        raise OptionError(
            "the output directory is not empty and holds no artefact, so it is left alone",
            where=where,
            why=error.what,
            cure="choose another --out",
        ) from None
    foreign = sorted(found - {REPORT, *report["files"]})
    if foreign:
        raise OptionError(
            "the output directory holds files that fxprune did not write, so it is left alone",
            where=where,
            why=", ".join(foreign[:5]),
            cure="move them, or choose another --out",
        )


def read_report(path: Path) -> dict[str, Any]:
    """The report of the artefact in ``path``, checked for form. Raises LoadError."""
    file = path / REPORT
    if not path.is_dir():
        raise LoadError(
            "there is no such artefact",
            where=str(path),
            why="an artefact is a directory",
            cure="give the --out of fxprune compile",
        )
    try:
        size = file.stat().st_size
        if size > MAX_REPORT:
            raise LoadError("the report is too large", where=str(file), why=f"{size} bytes, the limit is {MAX_REPORT}")
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(
            "this directory is not an artefact",
            where=str(path),
            why=f"it has no {REPORT}",
            cure="give the --out of fxprune compile",
        ) from None
    except OSError as error:
        raise LoadError("the report cannot be read", where=str(file), why=error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise LoadError("the report is damaged", where=str(file), why=str(error)[:200]) from None
    if not isinstance(report, dict) or "fxprune_report" not in report:
        raise LoadError("this directory is not an artefact", where=str(file), why="it has no 'fxprune_report' version")
    if report["fxprune_report"] != VERSION:
        raise LoadError(
            "the artefact has another version",
            where=str(file),
            why=f"found {report['fxprune_report']!r}, this fxprune reads {VERSION}",
        )
    files = report.get("files")
    if not isinstance(files, dict) or not isinstance(report.get("target"), str):
        raise LoadError("the report is malformed", where=str(file), why="'files' must be an object, 'target' a string")
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):  # no separators, no leading dot: a name can never lead out of the directory
            raise LoadError("the report is malformed", where=str(file), why=f"'{name[:80]}' is not a plain file name")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("size_bytes")) is not int
        ):
            raise LoadError("the report is malformed", where=f"{file}: {name}", why="needs sha256 and size_bytes")
    return report


def check_files(path: Path, report: Mapping[str, Any], only: Iterable[str] | None = None) -> None:
    """Raise LoadError unless the files (those named in ``only``, or all) are as the report says."""
    cure = "copy it again from where it was made, or compile again"
    for name in report["files"] if only is None else only:
        file, entry = path / name, report["files"].get(name)
        if entry is None:
            raise LoadError("the report does not know this file", where=str(file), cure=cure)
        try:
            size = file.stat().st_size
            if size != entry["size_bytes"]:
                raise LoadError(
                    "the file has another size than its report says",
                    where=str(file),
                    why=f"{size} bytes, expected {entry['size_bytes']}: truncated or replaced",
                    cure=cure,
                )
            if _sha256(file) != entry["sha256"]:
                raise LoadError(
                    "the file is not the one its report describes",
                    where=str(file),
                    why="its SHA-256 differs: damaged or changed",
                    cure=cure,
                )
        except OSError as error:
            raise LoadError(
                "a file of the artefact is missing or cannot be read",
                where=str(file),
                why=error.strerror or str(error),
                cure=cure,
            ) from None


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"sha256": _sha256(path), "size_bytes": path.stat().st_size}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
