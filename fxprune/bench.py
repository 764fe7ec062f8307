"""``fxprune bench``: how fast an artefact is, beside another artefact or the dense model, in one interleaved run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import api, registry
from .artifact import PROGRAM, Artifact
from .backend import Runner
from .events import Event, OnEvent, warn_only
from .latency_clock import at_batch
from .measure import environment, latency
from .plan import CompressionPlan
from .program import Program


def bench(
    artifact: str | os.PathLike[str], *, against: api.Model | None = None, batches: Sequence[int] = (1, 32),
    seconds: float = 5.0, threads: int = 0, checkpoint: str | None = None, example_inputs: api.Inputs = None,
    trust_pickle: bool = False, on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """Median latency and throughput per batch size, of the payload as it would be deployed.

    against   an artefact's directory, or a model: then the dense model is lowered to the same target first
    batches   batch sizes; OptionError where the program was captured with a fixed batch of another size
    seconds   per batch size, both sides together
    threads   CPU threads; 0 leaves the choice to the runtime
    checkpoint, example_inputs, trust_pickle   for ``against``, as in :func:`fxprune.compile`

    Returns ``rows`` of {batch, timings: {name: Timing as plain data}}, ``environment``, ``threads`` and ``target``.
    """
    with contextlib.ExitStack() as stack:
        if threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        on_event(Event("stage", f"load {artifact}"))
        one = Artifact.read(Path(artifact))
        runners = {_label(artifact): (one.program, _runner(one, threads))}
        if against is not None:
            other = stack.enter_context(_other(against, one, checkpoint, example_inputs, trust_pickle, on_event))
            name = _label(against) if isinstance(against, str | os.PathLike) else type(against).__name__
            name = name if name not in runners else f"{name} (against)"
            runners[name] = (other.program, _runner(other, threads))
        rows = []
        for batch in batches:
            on_event(Event("stage", f"measure batch {batch}"))
            calls = {name: _call(program, run, batch) for name, (program, run) in runners.items()}
            timings = latency(calls, seconds=seconds, items=batch)
            rows.append({"batch": batch, "timings": {name: t.to_dict() for name, t in timings.items()}})
        return {"rows": rows, "environment": environment(), "threads": threads, "target": one.target}


@contextlib.contextmanager
def _other(
    against: Any, one: Artifact, checkpoint: Any, inputs: Any, trust: bool, on_event: OnEvent
) -> Iterator[Artifact]:
    if isinstance(against, str | os.PathLike) and (Path(against) / PROGRAM).is_file():
        yield Artifact.read(Path(against))
        return
    with tempfile.TemporaryDirectory(prefix="fxprune-bench-") as folder:
        yield api.apply(against, CompressionPlan(), inputs, target=one.target, out=Path(folder) / "dense",
                        checkpoint=checkpoint, trust_pickle=trust, on_event=on_event)


def _runner(artifact: Artifact, threads: int) -> Runner:
    assert artifact.path is not None
    options = {"threads": threads} if hasattr(artifact.backend, "threads") else {}
    backend = registry.backend(artifact.target, **options)
    return backend.load(artifact.path / str(artifact.report["payload"]))


def _call(program: Program, run: Runner, batch: int) -> Callable[[], Any]:
    flat = at_batch(program, batch)
    return lambda: run(flat)


def _label(path: Any) -> str:
    text = os.fspath(path)
    return Path(text).name or text
