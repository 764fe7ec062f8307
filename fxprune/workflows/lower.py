"""``fxprune lower``: an artefact for another target, or finished on the machine that has what its target needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import registry
from ..artifact.artifact import Artifact
from ..artifact.delivered import DeliveredLatency, check_dense
from ..artifact.files import check_destination
from ..data.batch import Calibration
from ..data.fixed_sizes import fit_sizes
from ..data.sources import load_data
from ..driver.measure_latency import lowerable
from ..driver.run import Run, find_groups, open_model
from ..errors import OptionError
from ..intake.load import load as load_model
from ..ir.cost import CostModel
from ..ir.program import Program
from ..process.events import Event, OnEvent, Transcript, warn_only
from ..process.silence import quiet, silence
from ..request.latency import LatencyGoal
from ..request.options import OF_A_PLAN
from ..request.request import Request
from .bench import inputs_like

MOST_EARLIER = 32


def lower(
    artifact: str | os.PathLike[str],
    *,
    target: str | None = None,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    samples: int = 128,
    against: Any = None,
    batch: int = 1,
    threads: int = 0,
    seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Artifact:
    """Lower and verify the pruned program that ``artifact`` holds; nothing is searched and no weight changes.

    target   as for :func:`fxprune.compile`; by default the one that the artefact was made for, with its options
    out      where the result goes; by default it replaces ``artifact``, whose old payload goes once this one is whole
    data, samples   calibration data, for targets that look at it: ``trt{dtype=fp16}`` checks every value against the
             end of float16 on it. Texts and pictures are read as ``against`` reads them
    against  the dense model that the artefact came from (a path or what :func:`fxprune.compile` takes), lowered in the
             same way to be timed beside the result; without it the result is timed alone
    batch, threads, seconds   of that timing, as in :func:`fxprune.compile`
    checkpoint, example_inputs, trust_pickle, model_args   for ``against``

    Parity and latency of the target that it had before stay in the report, under ``earlier``.

    What this machine lacks is told as a warning, and in the report under ``unfinished``. Raises FxpruneError, and
    leaves the artefact as it was.
    """
    on_event(Event("stage", f"load {os.fspath(artifact)}"))
    made = Artifact.read(Path(artifact))
    backend = made.backend if target is None else registry.target(target)
    destination = Path(artifact) if out is None else Path(out)
    if out is not None and destination.exists() and Path(artifact).exists() and destination.samefile(artifact):
        raise OptionError(
            "the output is the artefact itself", where=f"--out {destination}", cure="leave `--out` away to replace it"
        )
    check_destination(destination)
    wish = LatencyGoal(batch, threads, seconds=seconds)
    run = None
    if against is not None:
        request = Request(seed=int(made.report["seed"]), limits=OF_A_PLAN)
        inputs = inputs_like(made.program) if example_inputs is None else example_inputs
        tell = Transcript(on_event)
        opened = open_model(
            request, tell, against, inputs, checkpoint=checkpoint, trust_pickle=trust_pickle, model_args=model_args
        )
        run = Run.of(request, opened, tell)
    if data is not None:
        backend = backend.with_data(_calibration(made, run, data, samples))
    if run is not None:
        backend = backend.with_source(run.opened.source)
    dense = None if run is None else _dense(run, made, str(against))
    made.report["earlier"] = _earlier(made, backend.text)
    made.backend = backend
    on_event(Event("stage", f"lower to {backend.text}, verify and save"))
    with quiet():
        made.save(destination, measure=DeliveredLatency(wish, "lower", dense, tell=on_event))
    for missing in missing_of(made.report):
        on_event(Event("warning", f"not finished: {missing}"))
    return made


def _calibration(made: Artifact, run: Run | None, data: Any, samples: int) -> Calibration:
    """The data as the pruned program takes its inputs; tokenizer and picture sizes are those of the dense model."""
    source = load_model(made.program.exported) if run is None else run.opened.source
    found = load_data(data, source, samples=samples, seed=int(made.report["seed"]))
    return fit_sizes(made.program, found)[0]


def _dense(run: Run, made: Artifact, where: str) -> Program:
    """The dense program as it is lowered. Raises OptionError where the artefact did not come from it."""
    with silence():
        program = find_groups(run).program
        check_dense(vars(CostModel(program)()), made.report, where)
        return lowerable(program)


def _earlier(made: Artifact, target: str) -> list[dict[str, Any]]:
    """What the report knows of other targets: the newest of each, the one that is left now among them."""
    report, left = made.report, made.backend.text
    mine = {
        "target": left,
        "payload": report.get("payload"),
        "parity": report.get("parity"),
        "measured": report.get("measured"),
    }
    finished = not report.get("unfinished") and mine["parity"] is not None
    found = [one for one in report.get("earlier", ()) if one["target"] not in (left, target)]
    return [*found, mine][-MOST_EARLIER:] if finished and left != target else found


def missing_of(report: dict[str, Any]) -> list[str]:
    """What the machine lacked that lowered this artefact, in words."""
    return list((report.get("unfinished") or {}).get("missing", ()))
