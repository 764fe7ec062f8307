"""Measuring for tools/bench/tokens.py: what the product makes of a cell, and how good and how fast that is.

What a results file already holds under a cell's key is not measured again, and neither is a latency that it already
holds. A reducer's plans of equal counts are one model, whichever schedule found them, and are measured once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from bench.accuracy.tasks import of_program
from bench.record import commit, describe_error
from bench.tokens.cells import FIGURES, Cell, Record, key, reducer
from bench.tokens.compare import pack_bits
from bench.tokens.model import Split
from bench.tokens.sweep import Sweep
from fxprune.artifact.artifact import Artifact
from fxprune.data import Batch
from fxprune.errors import FxpruneError
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.process.events import Event
from fxprune.process.jobs import session
from fxprune.process.silence import quiet
from fxprune.target.timing import latency


def reduce(
    model: nn.Module, example: Tensor, cell: Cell, data: Sequence[Batch], samples: int, out: Path | None
) -> tuple[Artifact, list[str]]:
    """What the product makes of ``model``, and its warnings; as ONNX in ``out`` where that is given."""
    notes: list[str] = []

    def hear(event: Event) -> None:
        if event.kind == "warning":
            notes.append(event.text)

    with quiet():
        made = fxprune.compile(
            model,
            example,
            flops=cell.ratio,
            prune=cell.prune,
            tokens=cell.tokens,
            data=data,
            samples=samples,
            seed=cell.seed,
            recover=cell.recover,
            out=out,
            target="eager" if out is None else "onnx",
            seconds=0,
            on_event=hear,
        )
    return made, notes


def state_counts(model: nn.Module, example: Tensor, cell: Cell, removed: Sequence[int], out: Path) -> Artifact:
    """The model as ONNX in ``out``, losing ``removed`` tokens at its attentions."""
    with quiet():
        return fxprune.compile(
            model,
            example,
            tokens=f"{reducer(cell.row, cell.seed)}:r={','.join(map(str, removed))}",
            recover="none",
            out=out,
            target="onnx",
            seconds=0,
            on_event=lambda _: None,
        )


def dense_onnx(model: nn.Module, example: Tensor, out: Path) -> Path:
    """The dense model's ONNX file, written once per ``out``."""
    if not out.exists():
        with quiet():
            fxprune.apply(model, CompressionPlan(), example, target="onnx", out=out, seconds=0, on_event=lambda _: None)
    return payload(out)


def payload(folder: Path) -> Path:
    """The ONNX file of an artefact."""
    return folder / str(Artifact.read(folder).report["payload"])


@torch.no_grad()
def logits_of(forward: Callable[[Batch], Tensor], images: Tensor, batch: int = 50) -> Tensor:
    """[n, classes], a few images at a time."""
    return torch.cat([forward(Batch((part,))).float() for part in images.split(batch)])


def closeness(dense: Tensor, other: Tensor) -> dict[str, float]:
    """How near ``other`` is to ``dense`` (logits [n, classes]): share of equal answers in percent, and the mean KL
    divergence from dense in nats."""
    agreed = (dense.argmax(-1) == other.argmax(-1)).double().mean()
    spread = functional.kl_div(other.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
    return {"agreement": round(100 * float(agreed), 3), "kl": round(float(spread), 5)}


def tokens_of(program: Program) -> list[int]:
    """Tokens that the attention of each block takes, in order: its queries; of explicit attention, the softmax's rows.

    Single rows, such as a class token's attention that a score reads, are no block's attention.
    """
    nodes = list(program.exported.graph.nodes)
    fused = [n.args[0] for n in nodes if "scaled_dot_product" in str(n.target)]
    spelt = [n for n in nodes if "softmax" in str(n.target)]
    shapes = [n.meta["val"].shape for n in fused or spelt]
    return [int(shape[-2]) for shape in shapes if len(shape) == 4 and shape[-2] != 1]


def count_macs(program: Program, image: Tensor) -> int:
    """Multiply-accumulates that PyTorch's own counter sees while one image runs through (it does not know the fused
    attention of CPUs)."""
    forward = of_program(program)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(Batch((image,)))
    return int(counter.get_total_flops()) // 2


def time_pair(dense: Path, small: Path, images: Tensor, batch: int, threads: int, seconds: float) -> Record:
    """Both files in ONNX Runtime on the CPU, interleaved; medians in milliseconds and what is realised of the ideal."""
    feed = images[:batch].contiguous().numpy()
    calls: dict[str, Callable[[], Any]] = {}
    for name, path in (("dense", dense), ("reduced", small)):
        running = session(path, threads)
        inputs = {running.get_inputs()[0].name: feed}
        calls[name] = lambda running=running, inputs=inputs: running.run(None, inputs)  # type: ignore[misc]
    found = latency(calls, seconds=seconds, rounds=10_000, items=batch)
    return {
        **{f"{name}_ms": round(t.median_ms, 4) for name, t in found.items()},
        **{f"{name}_spread": round(t.spread, 4) for name, t in found.items()},
        "rounds": found["dense"].samples,
        "threads": threads,
        "speedup": round(found["dense"].median_ms / found["reduced"].median_ms, 4),
    }


@dataclass
class Bench:
    """The model on its way through the cells.

    fit, judge   held-out images that methods see, and others on which closeness to dense is measured
    test         images that only accuracy sees
    further      others that no method saw: accuracy on them too, so that less is chance
    folder       for ONNX files
    save         called with all records after every measurement
    """

    model: nn.Module
    weights: str
    fit: Split
    judge: Split
    test: Split
    samples: int
    folder: Path
    save: Callable[[Sequence[Record]], None]
    say: Callable[[str], None] = print
    further: Split | None = None
    records: list[Record] = field(default_factory=list)
    threads: int = 1
    seconds: float = 20.0
    dense: dict[str, Any] = field(default_factory=dict)
    _judged: Tensor = field(default_factory=lambda: torch.empty(0))
    _sweep: Sweep | None = None

    def open(self) -> None:
        """The dense model's own figures."""
        run = _eager(self.model)
        self._judged = logits_of(run, self.judge.images)
        artifact = fxprune.apply(self.model, CompressionPlan(), self.example, on_event=lambda _: None)
        answers = logits_of(run, self.test.images)
        self.dense = {
            "accuracy": right(answers, self.test.labels),
            "images": len(self.test.labels),
            "macs": int(artifact.report["cost"]["dense"]["flops"]),
            "counted": count_macs(artifact.program, self.test.images[:1]),
            "tokens": tokens_of(artifact.program),
        }

    @property
    def example(self) -> Tensor:
        return self.fit.images[:2]

    def run(self, cells: Sequence[Cell], batches: Mapping[Cell, Sequence[int]]) -> None:
        """Measure what is not measured yet; ``batches`` says at which sizes a cell is timed. A method that fails leaves
        a record that says why."""
        for cell in cells:
            self._one(cell, batches.get(cell, ()))

    def _one(self, cell: Cell, batches: Sequence[int]) -> None:
        record = cell.record(self.samples, self.weights)
        held = next((r for r in self.records if key(r) == key(record)), None)
        todo = [b for b in batches if str(b) not in (held or {}).get("latency", {})]
        judged = held is not None and held.get("images") == len(self.test.labels)
        more = self.further if "further" not in (held or {}) else None
        if judged and not todo and more is None:
            return
        if held is not None and "accuracy" in held:
            record = dict(held)
        started = time.perf_counter()
        try:
            if cell.tokens_alone:
                if not judged:
                    record |= self._measure_tokens(cell, record)
                if more is not None:
                    record["further"] = self._further(cell, record, more)
                if todo:
                    record["latency"] = {**record.get("latency", {}), **self._of_counts(cell, record, todo)}
                self._keep(record, started)
                return
            folder = self.folder / name_of(record) if todo else None
            artifact, notes = reduce(self.model, self.example, cell, self._data(), self.samples, folder)
            took = time.perf_counter() - started
            if "accuracy" not in record:
                record |= {**self._figures(artifact), "notes": notes, "compile_seconds": round(took, 1)}
            if more is not None:
                record["further"] = answer(of_program(artifact.program), more)
            if folder is not None:
                record["latency"] = {
                    **record.get("latency", {}),
                    **{str(b): self._time(folder, b, record["macs"]) for b in todo},
                }
        except FxpruneError as error:  # such as a budget below what a reducer reaches: that is a result
            record["error"] = describe_error(error)
        self._keep(record, started)

    def _measure_tokens(self, cell: Cell, held: Record) -> Record:
        """Figures of tokens alone. A plan that ``held`` has from a run on fewer test images is not made again."""
        if "tokens_per_block" in held:
            macs, tokens = held["macs"], held["tokens_per_block"]
            run = self._planner().of_counts(cell, tokens, macs)
        else:
            run, macs, tokens = self._planner().plan(cell)
        same = self._same(cell, tokens, macs)
        figures = {name: same[name] for name in FIGURES} if same else self._answers(run)
        return {**figures, "macs": macs, "share": round(macs / self.dense["macs"], 4), "tokens_per_block": tokens}

    def _further(self, cell: Cell, record: Record, further: Split) -> Record:
        """Accuracy of tokens alone on the further images."""
        macs, tokens = record["macs"], record["tokens_per_block"]
        same = next((r for r in self._twins(cell, tokens, macs) if "further" in r), None)
        if same is not None:
            return dict(same["further"])
        return answer(self._planner().of_counts(cell, tokens, macs), further)

    def _planner(self) -> Sweep:
        if self._sweep is None:
            self._sweep = Sweep(self.model, self.example, self._data())
        return self._sweep

    def _twins(self, cell: Cell, tokens: Sequence[int], macs: int) -> list[Record]:
        """Measurements of the same reducer with the same counts, by whichever schedule: they are the same model."""
        return [
            r
            for r in self.records
            if (r["row"], r["recover"], r["seed"]) == (cell.row, "none", cell.seed)
            and (r.get("macs"), r.get("tokens_per_block")) == (macs, list(tokens))
        ]

    def _same(self, cell: Cell, tokens: Sequence[int], macs: int, batch: int | None = None) -> Record | None:
        """A twin that was judged on all test images, or timed at a batch size."""
        return next(
            (
                r
                for r in self._twins(cell, tokens, macs)
                if (
                    str(batch) in r.get("latency", {})
                    if batch is not None
                    else r.get("images") == len(self.test.labels)
                )
            ),
            None,
        )

    def _of_counts(self, cell: Cell, record: Record, batches: Sequence[int]) -> Record:
        """Latency per batch size. Time only looks at the counts, so the artefact is made by them."""
        found = {b: self._same(cell, record["tokens_per_block"], record["macs"], b) for b in batches}
        todo = [b for b, same in found.items() if same is None]
        latency = {str(b): same["latency"][str(b)] for b, same in found.items() if same is not None}
        if todo:
            folder = self.folder / name_of(record)
            removed = self._planner().count_removed(cell, record["tokens_per_block"], record["macs"])
            artifact = state_counts(self.model, self.example, cell, removed, folder)
            if (made := int(artifact.report["cost"]["compressed"]["flops"])) != record["macs"]:
                raise ValueError(f"{name_of(record)}: {made} MACs were made of {record['macs']}")
            latency |= {str(b): self._time(folder, b, record["macs"]) for b in todo}
        return latency

    def _keep(self, record: Record, started: float) -> None:
        record |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit()}
        self.records = [r for r in self.records if key(r) != key(record)] + [record]
        self.say(line(record))
        self.save(self.records)

    def _data(self) -> list[Batch]:
        return [Batch((part,)) for part in self.fit.images[: self.samples].split(32)]

    def _figures(self, artifact: Artifact) -> Record:
        run = of_program(artifact.program)
        program, macs = artifact.program, int(artifact.report["cost"]["compressed"]["flops"])
        return {
            **self._answers(run),
            "macs": macs,
            "share": round(macs / self.dense["macs"], 4),
            "counted": count_macs(program, self.test.images[:1]),
            "tokens_per_block": tokens_of(program),
        }

    def _answers(self, run: Callable[[Batch], Tensor]) -> Record:
        return {**answer(run, self.test), **closeness(self._judged, logits_of(run, self.judge.images))}

    def _time(self, folder: Path, batch: int, macs: int) -> Record:
        found = time_pair(
            dense_onnx(self.model, self.example, self.folder / f"dense-{self.weights}"),
            payload(folder),
            self.judge.images,
            batch,
            self.threads,
            self.seconds,
        )
        return {**found, "realised": round(found["speedup"] * macs / self.dense["macs"], 4)}


def answer(run: Callable[[Batch], Tensor], split: Split) -> Record:
    """Accuracy on images, how many there are, and which were right."""
    logits = logits_of(run, split.images)
    return {
        "accuracy": right(logits, split.labels),
        "images": len(split.labels),
        "right": pack_bits(logits.argmax(-1) == split.labels),
    }


def right(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return round(100 * float((logits.argmax(-1) == labels).double().mean()), 3)


def name_of(record: Record) -> str:
    """A folder's name: readable, and different for every key."""
    kind = "-".join(filter(None, (record["row"], record["schedule"], record["recover"], f"{record['ratio']:g}")))
    return f"{kind}-{hashlib.sha256(repr(key(record)).encode()).hexdigest()[:8]}"


def line(record: Record) -> str:
    """One measurement as a line."""
    what = " ".join(filter(None, (record["row"], record["schedule"], f"recover={record['recover']}")))
    if "error" in record:
        return f"{what} at {record['ratio']:g}: {record['error'][:90]}"
    timing = "".join(
        f", batch {b}: x{t['speedup']:.2f} ({t['realised']:.2f} of ideal)" for b, t in record.get("latency", {}).items()
    )
    return (
        f"{what} at {record['ratio']:g}: {record['accuracy']:.2f} %, agreement {record['agreement']:.2f} %, KL "
        f"{record['kl']:.4f}, {record['share']:.3f} of the MACs{timing} ({record['seconds']} s)"
    )


def _eager(model: nn.Module) -> Callable[[Batch], Tensor]:
    def run(batch: Batch) -> Tensor:
        output: Tensor = model(*batch.args)
        return output

    return run
