"""``fxprune demo``: train a small ViT on handwritten digits, compress it to ONNX, and tell honestly what happened.

Needs no network: the digits (1797 images of 8x8, the UCI test set) lie beside this file, and digits.txt says whose they
are. A quarter of them, drawn by class, is the test split; neither training nor calibration sees it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..process.events import Event, OnEvent, warn_only
from ..process.files import write_error, write_text

if TYPE_CHECKING:
    from ..artifact.artifact import Artifact

BATCHES = (1, 32)
RESULT = "demo.json"
CALIBRATION_SAMPLES = 256
LATENCY_SECONDS = 2.0  # per batch size, both models together


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection. [batch, tokens, dim] -> the same"""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(x.transpose(1, 2).reshape(batch, tokens, dim)))


class Block(nn.Module):
    """Pre-norm transformer block. [batch, tokens, dim] -> the same"""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitsViT(nn.Module):
    """A small vision transformer. images [batch, 1, 8, 8] in -1..1 -> logits [batch, 10]"""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4, hidden: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 17, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.05)
                nn.init.zeros_(module.bias)
        # Positions and patches that speak up from the start: with the usual 0.02 the first ten epochs go to them.
        nn.init.normal_(self.pos_embed, std=0.5)
        nn.init.normal_(self.patch.weight, std=0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.blocks(self.dropout(x + self.pos_embed))
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Digits:
    """images [n, 1, 8, 8] in -1..1 and labels [n], in two splits that share no image."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int = 0) -> Digits:
    """UCI's handwritten digits, a quarter held out for testing, each class in proportion.

    The same draws as scikit-learn's stratified ``train_test_split``, which made the split before: figures stay.
    """
    import numpy as np

    with np.load(Path(__file__).with_name("digits.npz")) as packed:
        pixels, classes = packed["images"], packed["labels"]
    images = torch.from_numpy(pixels).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(classes).long()
    draw, counts = np.random.RandomState(seed), np.bincount(classes)
    train: list[int] = []
    test: list[int] = []
    for label, kept in enumerate(_in_proportion(counts, len(classes) * 3 // 4, draw)):
        members = np.flatnonzero(classes == label)[draw.permutation(counts[label])].tolist()
        train += members[:kept]
        test += members[kept:]
    train, test = draw.permutation(train).tolist(), draw.permutation(test).tolist()
    return Digits(images[train], labels[train], images[test], labels[test])


def _in_proportion(counts: Any, total: int, draw: Any) -> list[int]:
    """``total`` things shared among classes in proportion to ``counts``; largest remainders go up, ties are drawn."""
    import numpy as np

    exact = counts / counts.sum() * total
    shares = np.floor(exact).astype(int)
    remainders = exact - shares
    for remainder in np.unique(remainders)[::-1]:
        left = total - int(shares.sum())
        if not left:
            break
        tied = np.flatnonzero(remainders == remainder)
        shares[draw.choice(tied, min(left, len(tied)), replace=False)] += 1
    return [int(share) for share in shares]


def train(model: nn.Module, data: Digits, *, epochs: int, seed: int = 0, lr: float = 2e-3) -> nn.Module:
    """Train ``model`` in place on the train split and return it in evaluation form."""
    shuffle = torch.Generator().manual_seed(seed)
    count, batch = len(data.train_labels), 32
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=epochs * math.ceil(count / batch), pct_start=0.15
    )
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(count, generator=shuffle).split(batch):
            loss = nn.functional.cross_entropy(model(data.train_images[index]), data.train_labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5
    """
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def run(
    out: str | Path = "fxprune-out/demo",
    *,
    flops: float | str = 0.5,
    epochs: int = 15,
    seed: int = 0,
    threads: int | None = None,
    on_event: OnEvent = warn_only,
) -> dict[str, Any]:
    """Train, compress to ONNX, and compare what would be deployed: both models as ONNX files in onnxruntime.

    Writes ``model.pt``, ``calibration.npz``, ``dense/`` and ``compressed/`` (artefacts) and ``demo.json`` into ``out``.
    ``threads`` (1 by default) serve training and onnxruntime: a model this small gains nothing from a second one, and
    two that wait for each other on a busy machine take five times as long.
    Returns what the command prints, as plain data: per model accuracy (of the test split), flops (MACs), params,
    file_bytes, latency_ms_1, latency_ms_32 (medians, interleaved), onnx_max_abs.
    """
    import numpy as np

    from ..driver import api
    from ..ir.plan import CompressionPlan
    from ..request.budget import require_budget
    from ..request.options import Budgets

    started = time.perf_counter()
    budget = require_budget(Budgets(flops=flops))
    if epochs < 1:
        raise OptionError("epochs must be at least 1", where=f"--epochs {epochs}")
    out = _own_folder(Path(out))
    on_event(Event("stage", f"train a small ViT on handwritten digits, {epochs} epochs"))
    data, threads = digits(seed), threads or 1
    with torch.random.fork_rng(), _threads(threads):
        torch.manual_seed(seed)  # initial weights and dropout
        model = train(DigitsViT(), data, epochs=epochs, seed=seed)
    trained = time.perf_counter()
    torch.save(model, out / "model.pt")
    chosen = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_SAMPLES]
    images, labels = data.train_images[chosen].numpy(), data.train_labels[chosen].numpy()
    np.savez(out / "calibration.npz", images=images, labels=labels)

    # DigitsViT is a class of this package and not of torch, so loading its pickle needs the user's word.
    common: dict[str, Any] = {
        "example_inputs": "1x1x8x8",
        "target": "onnx",
        "trust_pickle": True,
        "seed": seed,
        "on_event": on_event,
    }
    small = api.compile(
        out / "model.pt",
        flops=flops,
        data=out / "calibration.npz",
        samples=CALIBRATION_SAMPLES,
        out=out / "compressed",
        threads=threads,
        **common,
    )
    dense = api.apply(out / "model.pt", CompressionPlan(), out=out / "dense", seconds=0, **common)
    on_event(Event("stage", "measure accuracy and latency of both ONNX files"))
    result = {
        **_measure({"dense": dense, "compressed": small}, out, data, threads),
        "budget": str(budget),
        "importance": small.report["importance"],
        "batches": list(BATCHES),
        "seed": seed,
        "test_samples": len(data.test_labels),
        "calibration_samples": len(chosen),
        "epochs": epochs,
        "threads": threads,
        "artifact": str(out / "compressed"),
        "training_seconds": trained - started,
        "seconds": time.perf_counter() - started,
        "command": f"fxprune compile {out / 'model.pt'} --target onnx --flops {flops} --input 1x1x8x8 "
        f"--data {out / 'calibration.npz'} --samples {CALIBRATION_SAMPLES} --trust-pickle",
    }
    write_text(out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _measure(artifacts: Mapping[str, Artifact], out: Path, data: Digits, threads: int) -> dict[str, dict[str, Any]]:
    """What each ONNX file is worth on the test images, and how fast it is in turns with the other."""
    from ..target.timing import latency, session

    sides: dict[str, dict[str, Any]] = {}
    sessions = {}
    for name, artifact in artifacts.items():
        file = out / name / str(artifact.report["payload"])
        sessions[name] = session(file, threads)
        logits = _call(sessions[name], data.test_images.numpy())()[0]
        with torch.no_grad():
            eager = artifact.module(data.test_images)
        sides[name] = {
            "accuracy": accuracy(torch.from_numpy(logits), data.test_labels),
            **artifact.report["cost"]["compressed"],
            "file_bytes": file.stat().st_size,
            "onnx_max_abs": float((eager - torch.from_numpy(logits)).abs().max()),
        }
    for batch in BATCHES:
        feed = data.test_images[:batch].numpy()
        calls = {name: _call(running, feed) for name, running in sessions.items()}
        for name, timing in latency(calls, seconds=LATENCY_SECONDS, items=batch).items():
            sides[name][f"latency_ms_{batch}"] = timing.median_ms
    return sides


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(running: Any, feed: Any) -> Callable[[], Any]:
    (images,) = running.get_inputs()
    return lambda: running.run(None, {images.name: feed})


def _own_folder(out: Path) -> Path:
    """``out``, made if it is absent. Refuses a folder of somebody else's: a model.pt of theirs may lie there."""
    if out.exists() and not out.is_dir():
        raise OptionError(
            "the output is a directory, but a file lies there", where=str(out), cure="choose another --out"
        )
    if out.exists() and any(out.iterdir()) and not (out / RESULT).exists():
        raise OptionError(
            "the directory is not empty and no demo wrote it, so it is left alone",
            where=str(out),
            cure="choose another --out",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULT).write_text("{}\n", encoding="utf-8")
    except OSError as error:
        raise write_error(error, out) from error
    return out
