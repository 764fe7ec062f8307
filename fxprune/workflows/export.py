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
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifact import delivered
from ..artifact.artifact import Artifact
from ..artifact.delivered import Stopwatch
from ..artifact.evidence import Evidence, Payload, failed, gates_of, gather, read_evidence
from ..artifact.gates import FAILED, PASSED, UNFINISHED, Gate, Limits, gate, junit, worst
from ..artifact.manifest import (
    EVIDENCE,
    MANIFEST,
    Manifest,
    check_delivery,
    fingerprints,
    read_manifest,
    sealed,
    write_manifest,
    wrong_files,
)
from ..data.batch import Calibration
from ..data.fingerprint import fingerprint
from ..data.sources import load_data
from ..driver.api import OF_A_PLAN
from ..driver.apply import PlanLike, apply_plan, lines_of, read_plan
from ..driver.finish import finish
from ..driver.measure_latency import lowerable
from ..driver.run import Inputs, Model, Run, open_model
from ..errors import FxpruneError, LoadError, LoweringError, MissingDevice, OptionError, VerifyError
from ..ir.spec import build, parse
from ..process.environment import environment, versions
from ..process.events import Event, OnEvent, Transcript, warn_only
from ..process.files import published, sha256_of, write_error
from ..process.silence import silence
from ..registry import lookup
from ..request.latency import LatencyWish
from ..request.request import Request
from ..target.backend import Backend
from ..target.parity import check_parity

CARRIED = 256  # MiB of data


def export(
    model: Model,
    plan: PlanLike,
    example_inputs: Inputs = None,
    *,
    targets: Sequence[str],
    verify: Any,
    out: str | os.PathLike[str],
    limits: Limits | None = None,
    metric: str = "auto",
    samples: int = 256,
    carry: float = CARRIED,
    junit_file: str | os.PathLike[str] | None = None,
    recover: str | None = None,
    data: Any = None,
    data_samples: int = 128,
    force: bool = False,
    seconds: float = 2.0,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
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
    how = recover or ("none" if data is None else "auto")
    if (how == "none") != (data is None):
        raise OptionError(
            "recovery and calibration data go together",
            where=f"--recover {how}",
            why="what stays is fitted to what the dense model does on data",
            cure="give both, or neither",
        )
    request = Request(seed=seed, limits=OF_A_PLAN, samples=samples)
    tell = Transcript(on_event)
    judged = open_model(
        request, tell, model, example_inputs, checkpoint=checkpoint, trust_pickle=trust_pickle, data=verify
    )
    judge, calibration = judged.data, None  # it judges the result, it is no part of it
    assert judge is not None
    if data is not None:
        calibration = load_data(data, judged.source, samples=data_samples, seed=seed)
    opened = replace(judged, data=calibration)
    dense = opened.dense
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
    said = [
        repr(sorted(asked.items())),
        plan_hash,
        repr(sorted(versions().items())),
        fingerprint(dense, calibration, seed),
    ]
    key = fingerprint(dense, judge, seed, said)
    kept = None if force else _unchanged(out, key)
    if kept is not None:
        on_event(Event("note", f"{out} holds the result of this request already and is whole; nothing was done"))
        return _told(kept, junit_file)
    with lines_of(chosen):
        decided = apply_plan(Run.of(request, opened, tell), chosen, how)
        small = finish(decided)
    on_event(Event("stage", "run the dense and the pruned model over the data"))
    with silence():
        evidence = gather(dense, small.program, judge, metric)
    watch = Stopwatch(
        LatencyWish(limits.batch, limits.threads, seconds=min(seconds, delivered.SECONDS)),
        "export",
        lowerable(decided.unfitted),
    )
    with published(out) as directory:
        entries = {
            folder: _deliver(
                small, backend, text, directory / folder, evidence, limits, seconds, calibration, watch, on_event
            )
            for folder, (text, backend) in backends.items()
        }
        carried = evidence.tensors(int(carry * 2**20))
        if carried:
            from safetensors.torch import save_file

            save_file(carried, directory / EVIDENCE)
        manifest = sealed(
            {
                "name": opened.name,
                "status": worst(e["status"] for e in entries.values()),
                "request": {"sha256": key, **asked},
                "inputs": {
                    "model": {**_origin(model), "program_sha256": fingerprint(dense, None, 0)},
                    "plan": {"sha256": plan_hash},
                    "data": {**_origin(judge.origin), "samples": evidence.samples, "labelled": judge.labelled},
                    "calibration": None
                    if calibration is None
                    else {**_origin(calibration.origin), "samples": calibration.samples},
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
                "cost": small.report["cost"],
                "targets": entries,
                "versions": versions(),
                "environment": environment(),
                "files": fingerprints(directory),
            }
        )
        write_manifest(manifest, directory)
    return _told(manifest, junit_file)


def verify(
    directory: str | os.PathLike[str],
    *,
    data: Any = None,
    latency: bool = True,
    seconds: float = 2.0,
    junit_file: str | os.PathLike[str] | None = None,
    on_event: OnEvent = warn_only,
) -> Manifest:
    """Check a delivery again, from its files alone: hashes, parity, and every gate that it was made under.

    data      the data, where the delivery does not carry all of it: tensors by name; its hash must be the recorded one
    latency   False leaves latency gates out, on a machine that is not the one they are about

    The files are only read, but a payload that is compiled code (an inductor package, a TensorRT engine) is code, and
    measuring it runs it: the seal does not say who made it.

    Returns the manifest with the statuses and gates as they were found now. Raises LoadError where the directory is no
    delivery, or its manifest is damaged; everything else that is wrong fails a gate.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    on_event(Event("stage", "check the files"))
    wrong = wrong_files(directory, manifest)
    entries: dict[str, Any] = {}
    for folder, entry in manifest["targets"].items():
        on_event(Event("stage", f"check {entry['target']}"))
        files = Gate("files", FAILED if wrong else PASSED, why=wrong)
        if wrong:  # what was tampered with is not run
            entries[folder] = {**entry, "status": FAILED, "gates": [files.to_dict()]}
            continue
        with silence():
            gates = [files, *_again(directory, manifest, folder, data, latency, seconds)]
        entries[folder] = {**entry, "status": worst(g.status for g in gates), "gates": [g.to_dict() for g in gates]}
    found = {
        **manifest,
        "status": worst(e["status"] for e in entries.values()),
        "targets": entries,
        "environment": environment(),
        "versions": versions(),
    }
    return _told(found, junit_file)


def _again(directory: Path, manifest: Manifest, folder: str, data: Any, timed: bool, seconds: float) -> list[Gate]:
    """The gates of one delivered target, measured now."""
    entry = manifest["targets"][folder]
    recorded = [Gate(**g) for g in entry["gates"]]
    unmet = [g for g in recorded if g.status != PASSED]
    signed = Gate("sign-off", worst(g.status for g in recorded), why="; ".join(f"{g.name}: {g.why}" for g in unmet))
    if not entry["payload"] or any(g.name in ("target", "lowering") for g in unmet):
        return [signed]
    limits = _limits(manifest)
    try:
        artifact = Artifact.read(directory / folder)
        payload = Payload.of(artifact.backend, artifact.program, directory / folder / entry["payload"], limits.threads)
        evidence = read_evidence(directory / EVIDENCE, manifest["metric"], artifact.program)
        if evidence is not None and data is not None and not evidence.complete:
            evidence = _supplied(evidence, artifact, data, manifest)
    except FxpruneError as error:
        return [signed, failed("load", error)]
    seed = int(manifest["request"]["seed"])
    try:
        parity = check_parity(payload.program, payload.run, what="the payload", tolerance=payload.tolerances, seed=seed)
        again = gate("parity", parity.max_rel, parity.tolerance, "relative")
    except FxpruneError as error:
        again = failed("parity", error)
    missing = (
        ""
        if evidence is not None and evidence.complete
        else "the delivery does not carry all of its data, and none was given (--data)"
    )
    gates, _ = gates_of(
        payload, evidence if evidence is not None and evidence.inputs else None, limits, seconds, missing, timed
    )
    if not timed:
        gates = [g for g in gates if g.name != "latency"]
    return [signed, again, *gates]


def _supplied(evidence: Evidence, artifact: Artifact, data: Any, manifest: Manifest) -> Evidence:
    """The evidence with all of its data, given from outside. Raises LoadError where it is not the recorded data."""
    from ..artifact.evidence import batches_for, digest_of
    from ..intake.load import load as load_model

    request = manifest["request"]
    loaded = load_model(artifact.program.exported)
    found = load_data(data, loaded, samples=int(request["samples"]), seed=int(request["seed"]))
    inputs, labels = batches_for(artifact.program, found)
    if digest_of(inputs, labels) != evidence.digest:
        raise LoadError(
            "the data is not what the delivery was measured on",
            where=str(data),
            why="its SHA-256 differs",
            cure="give the file that fxprune export was given",
        )
    return replace(evidence, inputs=inputs, labels=labels)


def _deliver(
    small: Artifact,
    backend: Backend,
    text: str,
    folder: Path,
    evidence: Evidence,
    limits: Limits,
    seconds: float,
    calibration: Calibration | None,
    watch: Stopwatch,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Lower to one target and measure it: its entry in the manifest."""
    on_event(Event("stage", f"lower to {text}, verify and measure"))
    entry: dict[str, Any] = {"target": text, "status": UNFINISHED, "payload": "", "latency": None}
    gates: list[Gate] = []
    try:
        with silence():
            backend = backend.with_data(calibration) if hasattr(backend, "with_data") else backend
            made = Artifact(small.program, small.plan, small.report, backend, extras=small.extras)
            made.save(folder, measure=watch)
            lacking = (made.report.get("unfinished") or {}).get("missing", ())
            if lacking:
                raise MissingDevice("the target is not finished", where=text, why="; ".join(map(str, lacking)))
            entry["payload"] = str(made.report["payload"])
            parity = made.report["parity"]
            gates.append(gate("parity", parity["max_rel"], parity["tolerance"], "relative"))
            payload = Payload.of(backend, small.program, folder / entry["payload"], limits.threads)
            more, clock = gates_of(payload, evidence, limits, seconds)
            gates += more
            entry["latency"] = None if clock is None else {**clock.to_dict(), "batch": limits.batch}
    except (MissingDevice, VerifyError, LoweringError) as error:
        name = (
            "target" if isinstance(error, MissingDevice) else "parity" if isinstance(error, VerifyError) else "lowering"
        )
        gates.append(failed(name, error))
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
        raise OptionError("no target is named", where="--target", cure="--target onnx")
    return made


def _unchanged(out: Path, key: str) -> Manifest | None:
    """The manifest that lies there, where it is of the same request, passed, and every file is as it says."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    same = manifest["request"].get("sha256") == key and manifest["status"] == PASSED
    return manifest if same and not wrong_files(out, manifest) else None


def _limits(manifest: Mapping[str, Any]) -> Limits:
    known = {f.name for f in dataclasses.fields(Limits)}
    given = manifest["request"]["limits"]
    if set(given) != known or not all(type(given[k]) is int for k in ("batch", "threads")):
        raise LoadError("the manifest is malformed", where="request.limits", why=f"needs {', '.join(sorted(known))}")
    return Limits(**given)


def _origin(source: Any) -> dict[str, Any]:
    """What can be said of an input without this machine's paths: the name, and a file's hash."""
    if not isinstance(source, str | os.PathLike):
        return {"origin": type(source).__name__}
    path = Path(source)
    hashed = {"sha256": sha256_of(path)} if path.is_file() else {}
    return {"origin": path.name or str(source), **hashed}


def _told(manifest: Manifest, junit_file: str | os.PathLike[str] | None) -> Manifest:
    """The manifest, after the JUnit report was written where one was asked for."""
    if junit_file is not None:
        gates = {e["target"]: [Gate(**g) for g in e["gates"]] for e in manifest["targets"].values()}
        path = Path(junit_file)
        aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(junit(str(manifest["name"]), gates))
            os.replace(aside, path)
        except OSError as error:
            raise write_error(error, path) from error
        finally:
            aside.unlink(missing_ok=True)
    return manifest


__all__ = ["CARRIED", "export", "verify"]
