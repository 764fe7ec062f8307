"""How fast the delivered file is: the payload itself beside the dense program, lowered in the same way, in turns.

What is in ``report["measured"]``:

    target, device, versions, date   what ran, where and when
    rows     one per batch size and count of threads: see :func:`row_of`
    why      why there is nothing, or no dense figure; null otherwise

Nothing is decided by it: the plan was made before, and is the same whatever the clock says. It takes the lowering of
the dense program, ``SECONDS`` of timing, and at most about 30 s where single calls are long (``LONGEST``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import memory
from ..errors import FxpruneError, OptionError, spell
from ..ir.program import Program
from ..ir.provenance import first_line
from ..process.environment import versions
from ..process.events import Event, OnEvent
from ..process.files import publish, sha256_of
from ..process.silence import quiet
from ..report.units import mebi
from ..request.latency import MISS, LatencyGoal
from ..target.backend import Backend, Lowered, Runner
from ..target.clock import Clock, PairedLatency, batch_for, device_of
from ..target.footprint import footprint
from ..target.latency_table import RUNTIMES, today
from .files import PAGE, REPORT, check_destination, read_report
from .manifest import MANIFEST

SECONDS = 2.0  # of timing, both programs together; 0 leaves it out
LONGEST = 1.0  # seconds that one call of the dense program may take
LARGEST = 2 * 2**30  # bytes of dense weights: lowering them takes long
_RUNTIMES = (*RUNTIMES, "triton", "tensorrt", "torch-tensorrt", "tensorrt_rtx")
Additions = dict[str, Any]


@dataclass(frozen=True)
class DeliveredLatency:
    """Times a payload once it is written, for ``Artifact.save``: what it returns goes into the report.

    asked   batch, threads and seconds;  by: the command, as the report states it
    dense   the program before anything was cut, ready to be lowered; None where it is not at hand
    held    a clock of this run with the dense program already lowered to the same target
    """

    asked: LatencyGoal
    by: str
    dense: Program | None = None
    held: Clock | None = None
    tell: OnEvent = lambda _: None

    @property
    def seconds(self) -> float:
        """What was asked for, else ``SECONDS``."""
        return SECONDS if self.asked.seconds is None else self.asked.seconds

    def __call__(self, backend: Backend, lowered: Lowered, program: Program, report: Mapping[str, Any]) -> Additions:
        """``measured``, and ``latency`` with what was delivered where time was the budget. Raises nothing of a
        target's: what cannot be measured is said instead."""
        if not self.seconds:
            return {"measured": _describe(backend, program, [], "it was left out (`--seconds 0`)")}
        if lowered.missing:
            return {"measured": _describe(backend, program, [], f"not finished: {'; '.join(lowered.missing)}")}
        why = "" if self.dense is None else _too_large(self.dense)
        if why:
            return {"measured": _describe(backend, program, [], why)}
        self.tell(Event("stage", "measure the latency of the result" + (", beside the dense model" * bool(self.dense))))
        try:
            with quiet():
                row, why = self._row(backend, lowered, program, report)
        except Exception as error:  # of any runtime, and none of it makes the artefact worse
            said = (
                error.what + (f": {error.why}" if error.why else "")
                if isinstance(error, FxpruneError)
                else first_line(error) or type(error).__name__
            )
            return {"measured": _describe(backend, program, [], said[:400])}
        found: Additions = {"measured": _describe(backend, program, [] if row is None else [row], why)}
        foretold = report.get("latency")
        if foretold and row is not None and _same_setting(foretold, row, backend, report):
            found["latency"] = {**foretold, "delivered": compare_delivered(foretold, report.get("budget"), row)}
        return found

    def _row(
        self, backend: Backend, lowered: Lowered, program: Program, report: Mapping[str, Any]
    ) -> tuple[dict[str, Any] | None, str]:
        """The measured row, and why there is none or no dense figure in it."""
        batch = batch_for(self.dense or program, self.asked.batch)
        macs = report["cost"]["ratio"]["flops"]
        with self._clock(backend, program, batch) as clock:

            def load() -> Runner:
                return clock.backend.load(lowered.payload)

            if self.dense is None:
                timing = clock.alone(load(), self.seconds)
                row = {
                    **_row_at(batch, self.asked.threads, self.by),
                    "compressed_ms": timing.median_ms,
                    "rounds": timing.samples,
                }
                return row, spell("the dense model was not at hand: name it with `--against`")
            took = clock.dense_seconds()
            if took > LONGEST:
                return None, f"one call of the dense model takes {took:.1f} s, {LONGEST:g} s is the limit here"
            return row_of(clock.beside(load, self.seconds), batch, self.asked.threads, macs, self.by), ""

    @contextlib.contextmanager
    def _clock(self, backend: Backend, program: Program, batch: int) -> Iterator[Clock]:
        if self.held is not None and self.held.batch == batch:
            yield self.held
            return
        with Clock(backend, self.dense or program, batch, self.asked.threads) as clock:
            yield clock


def row_of(reading: PairedLatency, batch: int, threads: int, macs: float, by: str) -> dict[str, Any]:
    """A row of the report.

    batch, threads          samples per call, CPU threads (0: the runtime's own choice)
    dense_ms, compressed_ms medians of one call;  rounds: in which each was timed once
    ratio, error            median of the rounds' own ratios and its standard error
    speedup                 1 / ratio;  realised: that over what the MACs promise, ``1 / macs``
    by                      the command that measured it

    >>> row = row_of(PairedLatency(0.625, 0.01, 5.0, 8.0, 50), 8, 1, 0.5, "compile")
    >>> row["speedup"], row["realised"]
    (1.6, 0.8)
    """
    speedup = 1.0 / reading.ratio
    return {
        **_row_at(batch, threads, by),
        "dense_ms": reading.dense_ms,
        "compressed_ms": reading.ms,
        "ratio": reading.ratio,
        "error": reading.error,
        "speedup": speedup,
        "realised": speedup * macs,
        "rounds": reading.rounds,
    }


def _row_at(batch: int, threads: int, by: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("dense_ms", "compressed_ms", "ratio", "error", "speedup", "realised"))
    return {"batch": batch, "threads": threads, **nothing, "rounds": 0, "by": by}


def compare_delivered(
    latency: Mapping[str, Any], budget: Mapping[str, Any] | None, row: Mapping[str, Any]
) -> dict[str, Any]:
    """What was foretold of the latency, held against the delivered file.

    achieved_ms   as in the rounds of the search: the measured share of the table's dense latency; where milliseconds
                  were asked for, those that the clock saw
    ratio, error  of the dense latency in the same rounds;  met: None where time was not the budget
    """
    target = latency.get("target")
    absolute = target is not None and budget is not None and not budget["relative"]
    achieved = row["compressed_ms"] if absolute else row["ratio"] * latency["dense_ms"]
    return {
        "achieved_ms": achieved,
        "ratio": row["ratio"],
        "error": row["error"],
        "rounds": row["rounds"],
        "met": None if target is None else achieved <= (1 + MISS) * target,
    }


def _same_setting(
    latency: Mapping[str, Any], row: Mapping[str, Any], backend: Backend, report: Mapping[str, Any]
) -> bool:
    """Whether a row is of what the latency was foretold for: this target, this batch, these threads."""
    same = report["target"] == backend.name and report.get("target_options", backend.options) == backend.options
    return same and row["dense_ms"] is not None and all(latency[k] == row[k] for k in ("batch", "threads"))


def check_dense(cost: Mapping[str, Any], report: Mapping[str, Any], where: str) -> None:
    """Raise OptionError where a dense model is not the one that the artefact came from: by MACs and parameters."""
    mine = report["cost"]["dense"]
    for key, words in (("flops", "MACs"), ("params", "parameters")):
        if cost[key] != mine[key]:
            raise OptionError(
                "this is not the dense model of the artefact",
                where=where,
                why=f"it has {cost[key]} {words}, the artefact came from {mine[key]}",
                cure="name the model that was compressed; `--input` gives the shapes it had then",
            )


def record(path: Path, rows: Sequence[Mapping[str, Any]], backend: Backend, program: Program) -> dict[str, Any]:
    """Write measured rows into the report of the artefact in ``path``, and its page anew; returns the report.

    Rows of other batch sizes and threads stay, where the same target measured them on the same device. The directory
    is exchanged as a whole: no reader finds a page that the report does not describe. Raises OptionError for part of a
    signed delivery.
    """
    from ..ir.plan import CompressionPlan
    from ..report.render import render
    from .compare import pictures_of

    path = Path(os.path.realpath(path))
    if (path.parent / MANIFEST).is_file():
        raise OptionError(
            "the artefact is part of a delivery that was signed off",
            where=str(path),
            why=f"its {MANIFEST} states the hash of every file",
            cure="record into the artefact that fxprune compile wrote, or export again",
        )
    check_destination(path)
    report = read_report(path)
    told, old = _describe(backend, program, [], ""), report.get("measured") or {}
    same = all(old.get(k) == told[k] for k in ("target", "device", "versions"))
    kept = {(r["batch"], r["threads"]): dict(r) for r in old.get("rows", ()) if same}
    kept.update({(r["batch"], r["threads"]): dict(r) for r in rows})
    report["measured"] = {**told, "rows": [kept[k] for k in sorted(kept)]}
    with publish(path) as directory:
        for name in report["files"]:
            if name != PAGE:
                _link_file(path / name, directory / name)
        page = render(report, CompressionPlan.read(path / "plan.json"), pictures_of(path, report))
        (directory / PAGE).write_text(page, encoding="utf-8")
        report["files"][PAGE] = {"sha256": sha256_of(directory / PAGE), "size_bytes": (directory / PAGE).stat().st_size}
        (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _link_file(source: Path, destination: Path) -> None:
    """The same bytes under another name, without a copy where the disk allows it."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _describe(backend: Backend, program: Program, rows: list[dict[str, Any]], why: str) -> dict[str, Any]:
    gpu = backend.runs_on() == "cuda" and torch.cuda.is_available()
    return {
        "target": backend.text,
        "device": torch.cuda.get_device_name() if gpu else device_of(program),
        "versions": {k: v for k, v in versions().items() if k in _RUNTIMES},
        "date": today(),
        "rows": rows,
        "why": spell(why) or None,
    }


def _too_large(dense: Program) -> str:
    """Why the dense weights are too much to lower as well, or ""."""
    weights, budget = footprint(dense)["weights"], memory.find_budget()
    if weights > LARGEST:
        return f"the dense weights take {mebi(weights)}, {mebi(LARGEST)} is the limit here (fxprune bench has none)"
    if budget is not None and weights > budget:
        return spell(f"the dense weights, lowered, take {mebi(weights)}, more than `--memory` allows")
    return ""
