"""What a delivery is judged by: data with the dense model's figures, and the gates measured on a payload with them.

The same code runs before the delivery, beside the dense model, and after it, from ``evidence.safetensors`` alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..data.batch import Batch, Calibration
from ..data.fingerprint import add_tensor
from ..data.metrics import choose, divergence, score
from ..errors import FxpruneError, LoadError, MissingDevice, OptionError, VerifyError
from ..intake.diagnose import first_line
from ..intake.tensors import read_safetensors
from ..ir.agreement import compare, tolerance_of
from ..ir.program import Program
from ..ir.signature import output_names, samples_in
from ..target.backend import Backend, Runner
from ..target.clock import at_batch, torch_threads
from ..target.parity import eager, steady
from ..target.timing import Timing, latency
from .gates import FAILED, UNFINISHED, Gate, Limits, gate

MAX_EVIDENCE = 8 * 2**30  # bytes
_KEY = re.compile(r"(input|labels|dense|reference)\.(\d{1,6})(?:\.(\d{1,4}))?")


@dataclass(frozen=True)
class Evidence:
    """Batches of the data, and what the models say about them.

    inputs      per batch the user inputs of the graph, flat and in order
    labels      per batch, or None
    dense       per batch the dense model's output that the metric reads; None where labels are the reference
    reference   what the pruned graph returned for the first batch, all outputs
    metric, output   what is measured, and on which output
    value       the dense model's value of it, over all ``samples`` of the data
    samples     of the data; more than the batches hold where not all of it is carried
    """

    inputs: tuple[tuple[Any, ...], ...]
    labels: tuple[Tensor, ...] | None
    dense: tuple[Tensor, ...] | None
    reference: tuple[Tensor, ...]
    metric: str
    output: str
    value: float
    samples: int
    digest: str

    @property
    def complete(self) -> bool:
        """Whether all of the data is here."""
        return sum(map(samples_in, self.inputs)) == self.samples

    def tensors(self, limit: int) -> dict[str, Tensor]:
        """What ``evidence.safetensors`` holds: outputs, and whole batches of data until ``limit`` bytes are reached."""

        def size(tensors: Mapping[str, Tensor]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors.values())

        found = {f"reference.{i}": t for i, t in enumerate(self.reference)}
        found |= {f"dense.{i}": t for i, t in enumerate(self.dense or ())}
        if size(found) > limit:
            return {}
        for number, flat in enumerate(self.inputs):
            new = {f"input.{number}.{i}": t for i, t in enumerate(flat) if isinstance(t, Tensor)}
            if self.labels is not None:
                new[f"labels.{number}"] = self.labels[number]
            if size(found) + size(new) > limit:
                break
            found |= new
        return {k: t.detach().cpu().contiguous().clone() for k, t in found.items()}


def batches_for(program: Program, data: Calibration) -> tuple[tuple[tuple[Any, ...], ...], tuple[Tensor, ...] | None]:
    """The data as user inputs of the graph, per batch, and labels; cut again for a graph of one batch size.

    Raises OptionError where that leaves nothing.
    """
    flats = [tuple(program.flatten(b.args, b.kwargs)) for b in data.batches]
    labels = [b.labels for b in data.batches]
    if program.fixed_batch:
        size = samples_in(pytree.tree_leaves(program.example_inputs))
        whole = Batch(
            tuple(
                torch.cat(list(column)) if isinstance(column[0], Tensor) and column[0].dim() else column[0]
                for column in zip(*flats, strict=True)
            ),
            labels=torch.cat(labels) if data.labelled else None,  # type: ignore[arg-type]
        )
        count = whole.size
        parts = [whole.pick(torch.arange(s, s + size)) for s in range(0, count - size + 1, size)]
        flats, labels = [tuple(p.args) for p in parts], [p.labels for p in parts]
    if not flats:
        raise OptionError(
            "the data is smaller than the model's batch",
            where=data.origin,
            why="the model was captured with a fixed batch size",
            cure="give more samples",
        )
    return tuple(flats), tuple(t for t in labels if t is not None) if data.labelled else None


def digest_of(inputs: Sequence[Sequence[Any]], labels: Sequence[Tensor] | None) -> str:
    """SHA-256 of the values of the data, whatever file they came from and however they are batched."""
    digest = hashlib.sha256()
    for flat in inputs:
        for value in flat:
            if isinstance(value, Tensor):
                add_tensor(digest, value)
    for label in labels or ():
        add_tensor(digest, label)
    return digest.hexdigest()


def gather(dense: Program, small: Program, data: Calibration, wanted: str = "auto") -> Evidence:
    """Run the dense and the pruned graph over the data. Raises OptionError where no metric fits, LoadError where the
    model does not run on the data."""
    inputs, labels = batches_for(dense, data)
    names, graph = output_names(dense.exported), eager(dense.exported)

    def run(flat: Sequence[Any]) -> list[Any]:
        try:
            return graph(flat)
        except Exception as error:  # whatever torch raises for sizes that the graph was not captured for
            raise LoadError(
                "the model does not run on the data",
                where=data.origin,
                why=first_line(error),
                cure="give `--input` of the data's sizes, or data of the model's",
            ) from error

    first = run(inputs[0])
    metric, output = choose(dict(zip(names, first, strict=True)), None if labels is None else labels[0], wanted)
    place = names.index(output)
    said = tuple(run(flat)[place].detach().cpu() for flat in inputs)
    value = score(metric, said, said if labels is None else labels)
    reference = tuple(t.detach().cpu() for t in eager(small.exported)(inputs[0]))
    return Evidence(
        inputs,
        labels,
        said if labels is None else None,
        reference,
        metric,
        output,
        value,
        sum(map(samples_in, inputs)),
        digest_of(inputs, labels),
    )


def read_evidence(file: Path, about: Mapping[str, Any], program: Program) -> Evidence | None:
    """The evidence that ``manifest["metric"]`` describes; None where none is carried. Raises LoadError."""
    if not file.exists():
        return None
    if file.stat().st_size > MAX_EVIDENCE:
        raise LoadError("the evidence is too large", where=str(file), why=f"the limit is {MAX_EVIDENCE} bytes")
    inputs: dict[int, dict[int, Tensor]] = {}
    others: dict[str, dict[int, Tensor]] = {"labels": {}, "dense": {}, "reference": {}}
    for key, tensor in read_safetensors(file).items():
        match = _KEY.fullmatch(key)
        if match is None or (match[1] == "input") != (match[3] is not None):
            raise LoadError("the evidence is malformed", where=str(file), why=f"it holds '{key[:80]}'")
        if match[1] == "input":
            inputs.setdefault(int(match[2]), {})[int(match[3])] = tensor
        else:
            others[match[1]][int(match[2])] = tensor
    example = pytree.tree_leaves(program.example_inputs)
    flats = []
    for number in range(len(inputs)):
        row = inputs.get(number, {})
        if set(row) != {i for i, v in enumerate(example) if isinstance(v, Tensor)}:
            raise LoadError("the evidence is malformed", where=str(file), why=f"batch {number} lacks an input")
        flats.append(tuple(row.get(i, v) for i, v in enumerate(example)))
    columns = {word: tuple(found[i] for i in sorted(found)) for word, found in others.items()}
    if len(columns["labels"]) not in (0, len(flats)) or (columns["dense"] and len(columns["dense"]) < len(flats)):
        raise LoadError("the evidence is malformed", where=str(file), why="labels and batches differ in number")
    return Evidence(
        tuple(flats),
        columns["labels"] or None,
        columns["dense"] or None,
        columns["reference"],
        str(about["name"]),
        str(about["output"]),
        float(about["dense"]),
        int(about["samples"]),
        str(about["sha256"]),
    )


@dataclass(frozen=True)
class Payload:
    """A lowered program as it will be deployed: how it runs, what it was lowered from, what its target tolerates."""

    program: Program
    run: Runner
    tolerances: Mapping[torch.dtype, float]
    device: str = "cpu"

    @staticmethod
    def of(backend: Backend, program: Program, file: Path, threads: int) -> Payload:
        """The payload in ``file``. Raises MissingDevice where this machine cannot run it."""
        backend = backend.with_threads(threads) if threads else backend
        return Payload(program, backend.load(file), backend.tolerances(), backend.runs_on())

    @property
    def tolerance(self) -> float:
        """The largest accepted relative difference."""
        return tolerance_of(self.program, self.tolerances)


def gates_of(
    payload: Payload, evidence: Evidence | None, limits: Limits, seconds: float, missing: str = "", timed: bool = True
) -> tuple[list[Gate], Timing | None]:
    """Every gate on a payload but those of its files: on the data, by the metric, by the clock.

    missing  why there is no evidence, or not all of it
    timed    False leaves the latency unmeasured, as on a machine that is not the target
    """
    found: list[Gate] = []
    outputs: list[Tensor] = []
    if evidence is None:
        found.append(Gate("data-parity", UNFINISHED, limit=payload.tolerance, unit="relative", why=missing))
    else:
        try:
            place = output_names(payload.program.exported).index(evidence.output)
            difference, outputs = _on_data(payload, evidence, place)
            found.append(gate("data-parity", difference, payload.tolerance, "relative"))
        except FxpruneError as error:
            found.append(fail_gate("data-parity", error, payload.tolerance))
        except Exception as error:  # whatever the target's runtime raises
            found.append(Gate("data-parity", FAILED, why=f"the payload does not run: {error}"[:400]))
    whole = evidence is not None and evidence.complete and bool(outputs)
    for name, limit in (("drop", limits.max_drop), ("kl", limits.max_kl)):
        if limit is None:
            continue
        if not whole or evidence is None:
            found.append(Gate(name, UNFINISHED, limit=limit, why=missing or "the payload did not run over the data"))
        else:
            found.append(_metric_gate(name, limit, evidence, outputs))
    clock = None
    if limits.max_latency_ms is not None:
        if not timed:
            found.append(Gate("latency", UNFINISHED, limit=limits.max_latency_ms, unit="ms", why="it was not measured"))
        else:
            clock = time_of(payload, limits, seconds)
            found.append(
                gate(
                    "latency",
                    clock.median_ms,
                    limits.max_latency_ms,
                    "ms",
                    f"median {clock.median_ms:.3f} ms at batch {limits.batch}, the limit is "
                    f"{limits.max_latency_ms:g} ms",
                )
            )
    return found, clock


def fail_gate(name: str, error: FxpruneError, limit: float | None = None) -> Gate:
    """A gate that an error failed; a missing device leaves it unfinished."""
    status = UNFINISHED if isinstance(error, MissingDevice) else FAILED
    why = "; ".join(filter(None, (error.what, error.where, error.why)))
    return Gate(name, status, limit=limit, why=why[:2000])


def _metric_gate(name: str, limit: float, evidence: Evidence, outputs: Sequence[Tensor]) -> Gate:
    if name == "kl":
        if evidence.metric != "agreement" or evidence.dense is None:
            return Gate(
                name,
                FAILED,
                limit=limit,
                unit="nats",
                why="there is no divergence to measure: the data has labels, or the output no classes",
            )
        return gate(name, divergence(outputs, evidence.dense), limit, "nats")
    value = score(evidence.metric, outputs, evidence.dense or evidence.labels or ())
    words = "labels" if evidence.dense is None else "the dense model"
    return gate(
        name,
        evidence.value - value,
        limit,
        evidence.metric,
        f"{evidence.metric} against {words} falls from {evidence.value:.4f} to {value:.4f}",
    )


def _on_data(payload: Payload, evidence: Evidence, place: int) -> tuple[float, list[Tensor]]:
    """(largest relative difference from the graph, the metric's output per batch). Raises VerifyError."""
    reference, names = eager(payload.program.exported), output_names(payload.program.exported)
    worst, outputs = 0.0, []
    for number, flat in enumerate(evidence.inputs):
        want, got = reference(flat), payload.run(flat)
        wanted = [want] if number or not evidence.reference else [want, list(evidence.reference)]
        for one in wanted:  # and what the graph returned where the delivery was made
            if len(one) != len(got):
                raise VerifyError("the payload returns another number of outputs", why=f"{len(got)}, not {len(one)}")
            worst = max(worst, _difference(reference, flat, got, one, names, payload.tolerance, number))
        outputs.append(got[place].detach().cpu())
    return worst, outputs


def _difference(
    reference: Runner,
    flat: Sequence[Any],
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    names: Sequence[str],
    limit: float,
    number: int,
) -> float:
    def largest(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
        return max(
            compare(a, b, limit, what="the payload", where=f"output '{n}'", label=f"batch {number} of the data")[1]
            for n, a, b in zip(names, one, two, strict=True)
        )

    try:
        return largest(got, want)
    except VerifyError:
        kept = steady(reference, flat, want, limit)  # samples at which the graph itself jumps say nothing
        if kept is None:
            raise
        return largest([t.cpu()[kept] for t in got], [t.cpu()[kept] for t in want])


def time_of(payload: Payload, limits: Limits, seconds: float) -> Timing:
    """Latency of one call at the asked batch size. Raises OptionError for a graph of another, fixed one."""
    flat = at_batch(payload.program, limits.batch)
    flat = [t.to(payload.device) if isinstance(t, Tensor) else t for t in flat]
    with torch_threads(limits.threads):
        call: Callable[[], Any] = lambda: payload.run(flat)  # noqa: E731
        return latency({"payload": call}, seconds=seconds, items=limits.batch)["payload"]
