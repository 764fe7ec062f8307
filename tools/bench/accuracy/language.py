"""Gemma 3 270M on WikiText-2: a causal language model, judged by its perplexity."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.accuracy.tasks import Forward, Missing, analyse
from bench.accuracy.weights import Say, Weights
from fxprune.data import Batch, Calibration

CONTEXT, JUDGED, COUNTED = 256, 24, 64  # tokens of a sequence; sequences judged; tokens at which MACs are counted


class Logits(nn.Module):
    """Token ids [batch, length] -> logits, without a cache of keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}


class Language:
    """Gemma 3 270M, 18 layers of 640, 4 heads on one key/value head; 4-bit weights as fp32, and word-tokenised text: a
    reference to measure losses from, no record.

    ``accuracy`` is minus the perplexity on 6144 tokens of the test file, in contexts of 256, so that more is better.
    Calibration: contexts of the validation file.
    """

    name, metric, labelled, samples = "gemma-wikitext2", "minus perplexity", False, 64

    def __init__(self, weights: Weights, folder: Path, about: dict[str, Any], data: Path, align: int) -> None:
        from fxprune.process.libraries import survive_torchvision

        survive_torchvision()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
        self.model = Logits(loaded.eval())
        self.test = _contexts(tokenizer, data / "wikitext2" / "test.txt", JUDGED)
        self.valid = _contexts(tokenizer, data / "wikitext2" / "valid.txt", 512)
        self.program = analyse(self.model, Batch((), {"input_ids": self.valid[:2, :COUNTED]}), "gemma-3-270m", align)
        self.about = about

    def example(self) -> Batch:
        return Batch((), {"input_ids": self.valid[:1, :COUNTED]})

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        """Contexts of half the length, so that twice as many texts are seen."""
        half = self.valid.reshape(-1, CONTEXT // 2)
        chosen = torch.randperm(len(half), generator=torch.Generator().manual_seed(seed))[:samples]
        batches = tuple(Batch((), {"input_ids": half[i]}) for i in chosen.split(8))
        return Calibration(batches, f"WikiText-2 valid, {len(chosen)} contexts of {CONTEXT // 2}, seed {seed}")

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        losses = []
        for ids in self.test.split(2):
            logits = forward(Batch((), {"input_ids": ids}))[:, :-1].float()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
        return -math.exp(float(torch.cat(losses).double().mean()))

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        for batch in self.calibration(samples, seed).batches:
            ids = batch.kwargs["input_ids"]
            logits = model(ids)["logits"][:, :-1]
            yield functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _contexts(tokenizer: Any, path: Path, most: int) -> Tensor:
    """Token ids [contexts, CONTEXT] from the beginning of a text."""
    if not path.exists():
        raise Missing(f"the text is not at {path}: give the folder that holds wikitext2/ with --data")
    text = path.read_text(encoding="utf-8")[: most * CONTEXT * 8]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = min(most, len(ids) // CONTEXT)
    return ids[: count * CONTEXT].view(count, CONTEXT)


def unpack(weights: Weights, say: Say) -> Path:
    """The folder that transformers loads, written from the GGUF file once. Raises Missing without the packages."""
    folder = weights.folder / "model"
    if (folder / "config.json").exists():
        return folder
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ModuleNotFoundError as missing:
        raise Missing(f"{weights.name} comes as GGUF ({missing}): pip install gguf accelerate") from None
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"{weights.name}: {weights.file} as fp32")
    name = weights.file
    tokenizer = AutoTokenizer.from_pretrained(str(weights.folder), gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(weights.folder), gguf_file=name, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
