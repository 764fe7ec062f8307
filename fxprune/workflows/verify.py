"""``fxprune verify``: a delivery checked again, from its files alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifact.artifact import Artifact
from ..artifact.evidence import Evidence, Payload, fail_gate, gates_of, read_evidence
from ..artifact.gates import FAILED, PASSED, Gate, Limits, gate, junit, worst
from ..artifact.manifest import EVIDENCE, Manifest, read_manifest, wrong_files
from ..data.sources import load_data
from ..errors import FxpruneError, LoadError, spell
from ..process.environment import environment, versions
from ..process.events import Event, OnEvent, warn_only
from ..process.files import write_error
from ..process.silence import silence
from ..target.parity import check_parity

pass


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
    return hand_over(found, junit_file)


def _again(directory: Path, manifest: Manifest, folder: str, data: Any, timed: bool, seconds: float) -> list[Gate]:
    """The gates of one delivered target, measured now."""
    entry = manifest["targets"][folder]
    recorded = [Gate(**g) for g in entry["gates"]]
    unmet = [g for g in recorded if g.status != PASSED]
    signed = Gate("sign-off", worst(g.status for g in recorded), why="; ".join(f"{g.name}: {g.why}" for g in unmet))
    if not entry["payload"] or any(g.name in ("target", "lowering") for g in unmet):
        return [signed]
    limits = limits_of(manifest)
    try:
        artifact = Artifact.read(directory / folder)
        payload = Payload.of(artifact.backend, artifact.program, directory / folder / entry["payload"], limits.threads)
        evidence = read_evidence(directory / EVIDENCE, manifest["metric"], artifact.program)
        if evidence is not None and data is not None and not evidence.complete:
            evidence = _supply_data(evidence, artifact, data, manifest)
    except FxpruneError as error:
        return [signed, fail_gate("load", error)]
    seed = int(manifest["request"]["seed"])
    try:
        parity = check_parity(payload.program, payload.run, what="the payload", tolerance=payload.tolerances, seed=seed)
        again = gate("parity", parity.max_rel, parity.tolerance, "relative")
    except FxpruneError as error:
        again = fail_gate("parity", error)
    missing = (
        ""
        if evidence is not None and evidence.complete
        else spell("the delivery does not carry all of its data, and none was given (`--data`)")
    )
    gates, _ = gates_of(
        payload, evidence if evidence is not None and evidence.inputs else None, limits, seconds, missing, timed
    )
    if not timed:
        gates = [g for g in gates if g.name != "latency"]
    return [signed, again, *gates]


def _supply_data(evidence: Evidence, artifact: Artifact, data: Any, manifest: Manifest) -> Evidence:
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


def limits_of(manifest: Mapping[str, Any]) -> Limits:
    """The limits that a delivery was made under. Raises LoadError where the manifest does not say them."""
    known = {f.name for f in dataclasses.fields(Limits)}
    given = manifest["request"]["limits"]
    if set(given) != known or not all(type(given[k]) is int for k in ("batch", "threads")):
        raise LoadError("the manifest is malformed", where="request.limits", why=f"needs {', '.join(sorted(known))}")
    return Limits(**given)


def hand_over(manifest: Manifest, junit_file: str | os.PathLike[str] | None) -> Manifest:
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
