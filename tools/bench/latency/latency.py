"""How much of the saved MACs becomes saved time, and whether budgets of latency are met.

    python tools/bench/latency.py [--part shares|budgets|plans] [--models deit_tiny,..] [--targets onnx,..]
                                  [--batches 1,8,32] [--ratios 0.75,0.5,0.35] [--threads 1] [--out build/latency.json]

shares   speed-up divided by 1 / (MACs / dense MACs), the *realised share*, of plans by magnitude (random weights: time
         does not look at them). To reach: at least 0.95 for transformers on onnx at batch 8
budgets  ``--latency R``: predicted against achieved, rounds. To reach: within 5 % of R
plans    a ViT trained on digits: a plan by ``--latency R`` against plans by FLOPs of the same measured latency (their
         budget is moved until it is within 2 %), accuracy on the test images, with recovery. To reach: at least as good

Models   DeiT-Ti, DeiT-S, DeiT-B, ResNet-50 at 224x224 (timm); BERT-base at 128 tokens (transformers)
Targets  onnx (ONNX Runtime), and eager, inductor and trt where their backend is there and runs here
Latency  dense and pruned lowered in the same way and timed in turns; the ratio is the median of the rounds' ratios, its
         standard error beside it. With one thread the clock is the process's CPU time, which other work on the machine
         hardly moves; the load average is noted in every record all the same

Records are written one by one, and those that are there are not measured again (``--again`` does). Exit code 1 when a
target is missed (``--check``).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fxprune
from bench.lists import names, numbers
from bench.record import read, write
from fxprune import registry
from fxprune.driver.measure_latency import lowerable
from fxprune.driver.run import Run, find_groups, open_model
from fxprune.errors import FxpruneError
from fxprune.process.events import Transcript
from fxprune.process.libraries import survive_torchvision
from fxprune.request.request import Request
from fxprune.target.clock import SURELY, Clock

Record = dict[str, Any]
MODELS = ("deit_tiny", "deit_small", "deit_base", "bert_base", "resnet50")
TARGETS, PARTS = ("onnx", "eager", "inductor", "trt"), ("shares", "budgets", "plans")
RATIOS, BATCHES = (0.75, 0.5, 0.35), (1, 8, 32)
SHARE, AT_BATCH, MISS = 0.95, 8, 0.05
KEY = ("part", "model", "target", "batch", "threads", "ratio")


def build(name: str) -> tuple[torch.nn.Module, Any]:
    """(a model with random weights, example inputs)."""
    survive_torchvision()
    torch.manual_seed(0)
    if name == "bert_base":
        import transformers

        config = transformers.BertConfig()
        model = transformers.BertForSequenceClassification(config)
        ids = torch.randint(1000, 30000, (2, 128))
        return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    import timm

    full = name if name == "resnet50" else f"{name}_patch16_224"
    return timm.create_model(full).eval(), torch.randn(2, 3, 224, 224)


class Records:
    """What has been measured, on disk after every measurement."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path, self.again = path, again
        self.all: list[Record] = read(path)["measured"] if path.exists() else []

    def missing(self, **key: Any) -> bool:
        """Whether there is no record of this; with ``--again`` there is none before this run."""
        return self.again or self.find(**key) is None

    def find(self, **key: Any) -> Record | None:
        """The record with these values."""
        return next((r for r in self.all if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, record: Record) -> None:
        """In the place of the one with the same key."""
        record = {**record, "load_average": round(os.getloadavg()[0], 1)}
        self.all = [r for r in self.all if any(r.get(k) != record.get(k) for k in KEY)] + [record]
        write(self.path, "latency", measured=self.all)
        print(json.dumps({k: v for k, v in record.items() if k not in ("rounds", "layers")}), flush=True)


def shares(records: Records, model: str, target: str, args: argparse.Namespace) -> None:
    """Realised shares of one model on one target."""
    cells = [
        (b, r)
        for b in args.batches
        for r in args.ratios
        if records.missing(part="shares", model=model, target=target, batch=b, threads=args.threads, ratio=r)
    ]
    if not cells:
        return
    module, inputs = build(model)
    dense, small = _dense(module, inputs), {}
    for ratio in sorted({r for _, r in cells}, reverse=True):
        small[ratio] = fxprune.compile(module, inputs, flops=ratio, importance="l2", on_event=lambda event: None)
    for batch in sorted({b for b, _ in cells}):
        with Clock(registry.backend(target), dense, batch, args.threads, args.seconds, SURELY) as clock:
            for ratio in [r for b, r in cells if b == batch]:
                macs = small[ratio].report["cost"]["ratio"]["flops"]
                read = clock.read(small[ratio].program)
                records.add(
                    {
                        "part": "shares",
                        "model": model,
                        "target": target,
                        "batch": batch,
                        "threads": args.threads,
                        "ratio": ratio,
                        "macs": macs,
                        "latency": read.ratio,
                        "error": read.error,
                        "dense_ms": read.dense_ms,
                        "ms": read.ms,
                        "rounds_timed": read.rounds,
                        "speedup": 1 / read.ratio,
                        "realised": macs / read.ratio,
                    }
                )


def _dense(module: torch.nn.Module, inputs: Any) -> Any:
    """The dense program as a run of the tool lowers it."""
    request, tell = Request(), Transcript(lambda event: None)
    run = Run.of(request, open_model(request, tell, module, inputs), tell)
    return lowerable(find_groups(run).program)


def budgets(records: Records, model: str, target: str, args: argparse.Namespace) -> None:
    """Budgets of latency of one model on one target."""
    for batch in args.batches:
        for ratio in args.ratios:
            key = {
                "part": "budgets",
                "model": model,
                "target": target,
                "batch": batch,
                "threads": args.threads,
                "ratio": ratio,
            }
            if not records.missing(**key):
                continue
            module, inputs = build(model)
            try:
                made = fxprune.compile(
                    module,
                    inputs,
                    latency=ratio,
                    importance="l2",
                    target=target,
                    batch=batch,
                    threads=args.threads,
                    on_event=lambda event: None,
                )
            except FxpruneError as error:
                records.add({**key, "error": str(error)})
                continue
            told = made.report["latency"]
            records.add(
                {
                    **key,
                    "macs": made.report["cost"]["ratio"]["flops"],
                    "predicted": told["predicted_ms"] / told["dense_ms"],
                    "achieved": told["achieved_ratio"],
                    "miss": told["achieved_ratio"] / ratio - 1,
                    "rounds": told["rounds"],
                    "table": told["table"]["sha256"],
                }
            )


def plans(records: Records, target: str, args: argparse.Namespace) -> None:
    """By time against by FLOPs, at the same measured latency, on digits."""
    from fxprune.cli.demo import DigitsViT, digits, train

    for ratio in args.ratios:
        key = {
            "part": "plans",
            "model": "digits_vit",
            "target": target,
            "batch": AT_BATCH,
            "threads": args.threads,
            "ratio": ratio,
        }
        if not records.missing(**key):
            continue
        data = digits(seed=0)
        torch.manual_seed(0)
        module = train(DigitsViT(), data, epochs=30).eval()
        train_images, test_images, test_labels = data.train_images, data.test_images, data.test_labels
        options: dict[str, Any] = {
            "data": train_images[:512],
            "samples": 512,
            "target": target,
            "on_event": lambda event: None,
        }
        inputs, dense = test_images[:2], _dense(module, test_images[:2])

        def accuracy(made: Any) -> float:
            with torch.no_grad():
                return float((made.module(test_images).argmax(1) == test_labels).float().mean())  # noqa: B023

        timed = fxprune.compile(module, inputs, latency=ratio, batch=AT_BATCH, threads=args.threads, **options)
        with Clock(registry.backend(target), dense, AT_BATCH, args.threads, args.seconds, SURELY) as clock:
            wanted = clock.read(timed.program).ratio
            flops, at, made = wanted, 1.0, None
            for _ in range(6):
                made = fxprune.compile(module, inputs, flops=min(0.99, flops), **options)
                at = clock.read(made.program).ratio
                if abs(at / wanted - 1) <= 0.02:
                    break
                flops *= (wanted / at) ** 1.0
        assert made is not None
        records.add(
            {
                **key,
                "latency_plan": {
                    "latency": wanted,
                    "accuracy": accuracy(timed),
                    "macs": timed.report["cost"]["ratio"]["flops"],
                },
                "flops_plan": {
                    "latency": at,
                    "accuracy": accuracy(made),
                    "macs": made.report["cost"]["ratio"]["flops"],
                },
            }
        )


def check(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """(targets met, targets missed), a sentence each. What was not measured is in neither."""
    met: list[str] = []
    missed: list[str] = []
    for r in records:
        name = f"{r['model']} on {r['target']}, batch {r['batch']}, {r['ratio']:g}"
        if r["part"] == "shares" and r["target"] == "onnx" and r["batch"] == AT_BATCH and r["model"] != "resnet50":
            (met if r["realised"] >= SHARE else missed).append(f"{name}: {r['realised']:.3f} of the MACs' speed-up")
        elif r["part"] == "budgets":
            fine = "miss" in r and abs(r["miss"]) <= MISS
            (met if fine else missed).append(f"{name}: " + (f"{r['miss']:+.1%}" if "miss" in r else r["error"]))
        elif r["part"] == "plans":
            one, two = r["latency_plan"], r["flops_plan"]
            (met if one["accuracy"] >= two["accuracy"] else missed).append(
                f"{name}: by time {one['accuracy']:.4f} at {one['latency']:.3f}, by FLOPs {two['accuracy']:.4f} at "
                f"{two['latency']:.3f}"
            )
    return met, missed


def runs_here(target: str) -> bool:
    """Whether the backend is registered and this machine can run it."""
    try:
        registry.backend(target)
    except (FxpruneError, ImportError):
        return False
    return target != "trt" or torch.cuda.is_available()


def parser() -> argparse.ArgumentParser:
    """Options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", type=names(PARTS), default=list(PARTS))
    made.add_argument("--models", type=names(MODELS), default=list(MODELS))
    made.add_argument("--targets", type=names(TARGETS), default=list(TARGETS))
    made.add_argument("--batches", type=numbers(int), default=list(BATCHES))
    made.add_argument("--ratios", type=numbers(float), default=list(RATIOS))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seconds", type=float, default=8.0, help="of timing, per cell")
    made.add_argument("--out", type=Path, default=Path("build/latency.json"))
    made.add_argument("--again", action="store_true", help="measure anew what is there")
    made.add_argument("--check", action="store_true", help="hold --out against the targets and stop")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, or check."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    records = Records(args.out, args.again)
    if not args.check:
        parts: dict[str, Callable[..., None]] = {"shares": shares, "budgets": budgets}
        for target in filter(runs_here, args.targets):
            for part in args.part:
                for model in args.models if part in parts else ():
                    parts[part](records, model, target, args)
            if "plans" in args.part:
                plans(records, target, args)
    met, missed = check(records.all)
    for word, texts in (("met", met), ("missed", missed)):
        for text in texts:
            print(f"{word + ':':8}{text}")
    return int(bool(missed)) if args.check else 0
