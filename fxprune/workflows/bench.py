"""``fxprune bench``: how fast an artefact is, beside another artefact or the dense model, in one interleaved run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact.artifact import Artifact
from ..artifact.delivered import check_dense, record, row_of
from ..artifact.files import PROGRAM
from ..driver import api
from ..errors import MissingDevice, OptionError
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process.environment import environment
from ..process.events import Event, OnEvent, warn_only
from ..target.backend import Runner
from ..target.clock import at_batch, pair_latencies
from ..target.timing import sample_times, timing


def bench(
    artifact: str | os.PathLike[str],
    *,
    against: api.Model | None = None,
    batches: Sequence[int] = (1, 32),
    threads: int = 0,
    seconds: float = 5.0,
    checkpoint: str | None = None,
    example_inputs: api.Inputs = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    recorded: bool = False,
    on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """Median latency and throughput per batch size, of the payload as it would be deployed.

    against   an artefact's directory, or a model: then the dense model is lowered to the same target first
    batches   batch sizes; OptionError where the program was captured with a fixed batch of another size
    seconds   per batch size, both sides together
    threads   CPU threads; 0 leaves the choice to the runtime
    checkpoint, example_inputs, trust_pickle, model_args   for ``against``, as in :func:`fxprune.compile`; inputs are by
              default in the shapes that the artefact was made with
    recorded  write what was measured into the artefact's report and page; ``against`` is then the dense model it came
              from, and OptionError says so where it is another one

    Returns ``rows`` of {batch, timings: {name: Timing as plain data}}, ``environment``, ``threads`` and ``target``.
    """
    with contextlib.ExitStack() as stack:
        if threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        if recorded and against is None:
            raise OptionError(
                "there is nothing to record",
                where="--record",
                why="a report holds latency beside the dense model's",
                cure="name it with `--against`",
            )
        on_event(Event("stage", f"load {artifact}"))
        one = Artifact.read(Path(artifact))
        runners = {_label(artifact): (one.program, runner_of(one, threads))}
        if against is not None:
            other = stack.enter_context(
                _other(against, one, checkpoint, example_inputs, trust_pickle, model_args, on_event)
            )
            name = _label(against) if isinstance(against, str | os.PathLike) else type(against).__name__
            name = name if name not in runners else f"{name} (against)"
            if recorded:
                _check_recordable(one, other, str(against))
            runners[name] = (other.program, runner_of(other, threads))
        rows, readings = [], []
        for batch in batches:
            on_event(Event("stage", f"measure batch {batch}"))
            calls = {name: call_at(program, run, batch) for name, (program, run) in runners.items()}
            samples, counts = sample_times(calls, seconds=seconds)
            timings = {name: timing(values, counts[name], batch) for name, values in samples.items()}
            rows.append({"batch": batch, "timings": {name: t.to_dict() for name, t in timings.items()}})
            if recorded:
                small, dense = samples.values()
                readings.append(
                    row_of(pair_latencies(dense, small), batch, threads, one.report["cost"]["ratio"]["flops"], "bench")
                )
        if recorded:
            record(Path(artifact), readings, one.backend, one.program)
        return {"rows": rows, "environment": environment(), "threads": threads, "target": one.backend.text}


@contextlib.contextmanager
def _other(
    against: Any, one: Artifact, checkpoint: Any, inputs: Any, trust: bool, model_args: Any, on_event: OnEvent
) -> Iterator[Artifact]:
    if isinstance(against, str | os.PathLike) and (Path(against) / PROGRAM).is_file():
        yield Artifact.read(Path(against))
        return
    with tempfile.TemporaryDirectory(prefix="fxprune-bench-") as folder:
        inputs = inputs_like(one.program) if inputs is None else inputs
        yield api.apply(
            against,
            CompressionPlan(),
            inputs,
            target=one.backend.text,
            out=Path(folder) / "dense",
            seconds=0,
            checkpoint=checkpoint,
            trust_pickle=trust,
            model_args=model_args,
            on_event=on_event,
        )


def inputs_like(program: Program) -> api.Inputs:
    """The example inputs of a pruned program, for the dense one that it came from; None where they are of two kinds."""
    args, kwargs = program.example_inputs
    if args and kwargs:
        return None
    return dict(kwargs) if kwargs else tuple(args)


def _check_recordable(one: Artifact, other: Artifact, where: str) -> None:
    check_dense(other.report["cost"]["compressed"], one.report, where)
    if other.backend.text != one.backend.text:
        raise OptionError(
            "the two were lowered to different targets",
            where=where,
            why=f"{other.backend.text}, not {one.backend.text}",
            cure="name the dense model itself",
        )


def runner_of(artifact: Artifact, threads: int = 0) -> Runner:
    """The artefact's payload as it would be deployed. ``threads``: CPU threads, 0 leaves the choice to the runtime."""
    assert artifact.path is not None
    backend, unfinished = artifact.backend, artifact.report.get("unfinished")
    if unfinished:
        raise MissingDevice(
            "the artefact is not finished, so there is nothing to time",
            where=str(artifact.path),
            why="; ".join(unfinished["missing"]),
            cure=unfinished["finish"],
        )
    backend = backend.with_threads(threads)
    run, device = backend.load(artifact.path / str(artifact.report["payload"])), backend.runs_on()
    if device == "cpu":
        return run
    return lambda flat: run([t.to(device) if isinstance(t, torch.Tensor) else t for t in flat])


def call_at(program: Program, run: Runner, batch: int) -> Callable[[], Any]:
    """One call of ``run`` on made-up inputs of this batch size. Raises OptionError where another one is fixed."""
    flat = at_batch(program, batch)
    return lambda: run(flat)


def _label(path: Any) -> str:
    text = os.fspath(path)
    return Path(text).name or text
