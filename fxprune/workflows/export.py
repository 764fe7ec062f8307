"""``fxprune export``: the step between a plan and a release. No search: a model, a plan, data and limits go in; what
comes out is a directory with a payload per target and ``manifest.json``, which says what passed.

    DIR/manifest.json           see :mod:`fxprune.artifact.manifest`
    DIR/evidence.safetensors    the data (or as much of it as was asked to be carried) and what the models said
    DIR/onnx/ DIR/trt/ ...      an artefact per target

``fxprune verify DIR`` measures everything again from these files alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact import delivered
from ..artifact.artifact import Artifact
from ..artifact.delivered import DeliveredLatency
from ..artifact.evidence import Evidence, Payload, fail_gate, gates_of, gather
from ..artifact.gates import PASSED, UNFINISHED, Gate, Limits, gate, worst
from ..artifact.manifest import (
    EVIDENCE,
    MANIFEST,
    Manifest,
    check_delivery,
    fingerprints,
    read_manifest,
    seal,
    write_manifest,
    wrong_files,
)
from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..driver.apply import PlanLike, apply_plan, lines_of, read_plan
from ..driver.finish import finish
from ..driver.measure_latency import lowerable
from ..driver.run import Inputs, Model, Opened, Run, load_more, open_model
from ..errors import LoweringError, MissingDevice, OptionError, VerifyError
from ..ir.spec import build, parse
from ..process.environment import environment, versions
from ..process.events import Event, OnEvent, Transcript, warn_only
from ..process.files import publish, sha256_of
from ..process.silence import silence
from ..registry import lookup
from ..request.latency import LatencyGoal
from ..request.options import OF_A_PLAN
from ..request.request import Request
from ..target.backend import Backend
from .verify import hand_over

CARRIED = 256  # MiB of data


def export(
    model: Model,
    plan: PlanLike,
    example_inputs: Inputs = None,
    *,
    targets: Sequence[str],
    data: Any = None,
    data_samples: int = 128,
    out: str | os.PathLike[str],
    verify: Any,
    limits: Limits | None = None,
    metric: str = "auto",
    samples: int = 256,
    seed: int = 0,
    recover: str | None = None,
    carry: float = CARRIED,
    junit_file: str | os.PathLike[str] | None = None,
    force: bool = False,
    seconds: float = 2.0,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Manifest:
    """Apply ``plan``, lower to every target, measure every gate, and write all of it into ``out``; the manifest.

    targets   ``("onnx", "trt{dtype=fp16}")``: a subfolder each
    verify    data, as calibration data is given elsewhere (labels optional); never what the plan was made from
    limits    see :class:`fxprune.artifact.gates.Limits`; parity is checked in any case
    metric    see :mod:`fxprune.data.metrics`
    samples   of the data, a seeded choice where it holds more
    carry     MiB of data that may lie in the delivery, so that it can be verified without the model
    recover, data, data_samples   fit what stays to what the dense model does on calibration data, as
              :func:`fxprune.compile` does it (``auto`` where data is given, else ``none``)
    force     do everything again even where ``out`` holds what the same request passed with before
    seconds   to spend on each latency

    The same request gives the same files, but for measured times. Where ``out`` already holds a delivery of the same
    request that passed and is whole, it is left as it is. Gates that fail are no exception: the manifest says so in its
    ``status``, and what failed lies there to be looked at. Raises FxpruneError for a request that cannot be carried
    out; ``out`` stays as it was then.
    """
    limits, out = limits or Limits(), Path(out)
    backends = _backends(targets)
    chosen = read_plan(plan)
    check_delivery(out)
    how = _recovery(recover, data)
    request = Request(seed=seed, limits=OF_A_PLAN, samples=samples)
    tell = Transcript(on_event)
    loading: dict[str, Any] = {"checkpoint": checkpoint, "trust_pickle": trust_pickle, "model_args": model_args}
    judged = open_model(request, tell, model, example_inputs, data=verify, **loading)
    judge, calibration = judged.data, None  # it judges the result, it is no part of it
    assert judge is not None
    if data is not None:
        calibration = load_more(tell, judged, data, data_samples, seed)
    opened = replace(judged, data=calibration)
    asked = {
        "targets": list(targets),
        "limits": dataclasses.asdict(limits),
        "metric": metric,
        "samples": samples,
        "seed": seed,
        "carry_mib": carry,
        "recover": how,
    }
    plan_hash = hashlib.sha256(chosen.to_json().encode()).hexdigest()
    dense = fingerprint(opened.dense, calibration, seed)
    said = [repr(sorted(asked.items())), plan_hash, repr(sorted(versions().items())), dense]
    key = fingerprint(opened.dense, judge, seed, said)
    kept = None if force else _find_unchanged(out, key)
    if kept is not None:
        on_event(Event("note", f"{out} holds the result of this request already and is whole; nothing was done"))
        return hand_over(kept, junit_file)
    with lines_of(chosen):
        decided = apply_plan(Run.of(request, opened, tell), chosen, how)
        small = finish(decided)
    on_event(Event("stage", "run the dense and the pruned model over the data"))
    with silence():
        evidence = gather(opened.dense, small.program, judge, metric)
    watch = DeliveredLatency(
        LatencyGoal(limits.batch, limits.threads, seconds=min(seconds, delivered.SECONDS)),
        "export",
        lowerable(decided.unfitted),
    )
    release = _Release(opened, judge, small, evidence, limits, seconds, watch, tell)
    with publish(out) as directory:
        entries = {f: _deliver(release, backend, text, directory / f) for f, (text, backend) in backends.items()}
        carried = evidence.tensors(int(carry * 2**20))
        if carried:
            from safetensors.torch import save_file

            save_file(carried, directory / EVIDENCE)
        request_facts = {"sha256": key, **asked}
        manifest = _manifest(release, request_facts, plan_hash, _origin(model), entries, carried, directory)
        write_manifest(manifest, directory)
    return hand_over(manifest, junit_file)


def _recovery(recover: str | None, data: Any) -> str:
    """How what stays is fitted. Raises OptionError where data and recovery do not go together."""
    how = recover or ("none" if data is None else "auto")
    if (how == "none") != (data is None):
        raise OptionError(
            "recovery and calibration data go together",
            where=f"--recover {how}",
            why="what stays is fitted to what the dense model does on data",
            cure="give both, or neither",
        )
    return how


@dataclass(frozen=True)
class _Release:
    """What is delivered, and all that it is measured by.

    judge  the data of the gates;  small: the pruned model;  watch: what times a payload beside the dense model
    """

    opened: Opened
    judge: Calibration
    small: Artifact
    evidence: Evidence
    limits: Limits
    seconds: float
    watch: DeliveredLatency
    tell: Transcript


def _manifest(
    release: _Release,
    request: dict[str, Any],
    plan_hash: str,
    model: dict[str, Any],
    entries: dict[str, Any],
    carried: Mapping[str, Any],
    directory: Path,
) -> Manifest:
    """What the delivery in ``directory`` says of itself.

    request  as it was asked for;  model: where it came from;  entries: of the targets;  carried: tensors of the data
    """
    opened, judge, evidence = release.opened, release.judge, release.evidence
    data = opened.data
    return seal(
        {
            "name": opened.name,
            "status": worst(e["status"] for e in entries.values()),
            "request": request,
            "inputs": {
                "model": {**model, "program_sha256": fingerprint(opened.dense, None, 0)},
                "plan": {"sha256": plan_hash},
                "data": {**_origin(judge.origin), "samples": evidence.samples, "labelled": judge.labelled},
                "calibration": None if data is None else {**_origin(data.origin), "samples": data.samples},
            },
            "metric": {
                "name": evidence.metric,
                "output": evidence.output,
                "dense": evidence.value,
                "samples": evidence.samples,
                "sha256": evidence.digest,
            },
            "carried": {
                "batches": sum(k.startswith("input.") and k.endswith(".0") for k in carried),
                "of": len(evidence.inputs),
            },
            "cost": release.small.report["cost"],
            "targets": entries,
            "versions": versions(),
            "environment": environment(),
            "files": fingerprints(directory),
        }
    )


def _deliver(release: _Release, backend: Backend, text: str, folder: Path) -> dict[str, Any]:
    """Lower to one target and measure it: its entry in the manifest."""
    small, limits = release.small, release.limits
    release.tell.stage(f"lower to {text}, verify and measure")
    entry: dict[str, Any] = {"target": text, "status": UNFINISHED, "payload": "", "latency": None}
    gates: list[Gate] = []
    try:
        with silence():
            backend = backend.with_data(release.opened.data).with_source(release.opened.source)
            made = Artifact(small.program, small.plan, small.report, backend, extras=small.extras)
            made.save(folder, measure=release.watch)
            lacking = (made.report.get("unfinished") or {}).get("missing", ())
            if lacking:
                raise MissingDevice("the target is not finished", where=text, why="; ".join(map(str, lacking)))
            entry["payload"] = str(made.report["payload"])
            parity = made.report["parity"]
            gates.append(gate("parity", parity["max_rel"], parity["tolerance"], "relative"))
            payload = Payload.of(backend, small.program, folder / entry["payload"], limits.threads)
            more, clock = gates_of(payload, release.evidence, limits, release.seconds)
            gates += more
            entry["latency"] = None if clock is None else {**clock.to_dict(), "batch": limits.batch}
    except (MissingDevice, VerifyError, LoweringError) as error:
        name = (
            "target" if isinstance(error, MissingDevice) else "parity" if isinstance(error, VerifyError) else "lowering"
        )
        gates.append(fail_gate(name, error))
        if name != "target":
            shutil.rmtree(folder, ignore_errors=True)
    return {**entry, "status": worst(g.status for g in gates), "gates": [g.to_dict() for g in gates]}


def _backends(targets: Sequence[str]) -> dict[str, tuple[str, Backend]]:
    """Folder -> (text, backend) of every target. Raises OptionError for one that is unknown or named twice."""
    made: dict[str, tuple[str, Backend]] = {}
    for text in targets:
        name, options = parse(text, "--target")
        folder = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
        if folder in made:
            raise OptionError("a target is named twice", where=f"--target {text}", cure="name each once")
        made[folder] = (text, build(lookup("backend", name), options, f"the target '{name}'", "--target"))
    if not made:
        raise OptionError("no target is named", where="--target", cure="`--target onnx`")
    return made


def _find_unchanged(out: Path, key: str) -> Manifest | None:
    """The manifest that lies there, where it is of the same request, passed, and every file is as it says."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    same = manifest["request"].get("sha256") == key and manifest["status"] == PASSED
    return manifest if same and not wrong_files(out, manifest) else None


def _origin(source: Any) -> dict[str, Any]:
    """What can be said of an input without this machine's paths: the name, and a file's hash."""
    if not isinstance(source, str | os.PathLike):
        return {"origin": type(source).__name__}
    path = Path(source)
    hashed = {"sha256": sha256_of(path)} if path.is_file() else {}
    return {"origin": path.name or str(source), **hashed}


__all__ = ["CARRIED", "export"]
