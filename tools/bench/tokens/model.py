"""The vision transformer of tools/bench/tokens.py: 196 patches and a class token, trained here and kept.

CIFAR-10 images are brought from 32x32 to 56x56, so that patches of 4x4 give 197 tokens. Training at that length from
the start is out of a CPU's reach, so a recipe goes through stages: most epochs at 28x28 (50 tokens), then a few at
56x56, with the position embedding interpolated in between (timm's ``resample_abs_pos_embed``). Random crops are brought
to the stage's size, so that the short stage already sees the scales of the long one.

The last ``held`` images of the train split are no part of training: they calibrate and select. Test images only judge.
A checkpoint lies beside those of ``accuracy/models.py`` as ``NAME-HASH.pt``, the hash being that of everything in the
recipe, and training goes on after an interruption from the last whole epoch.
``python tools/bench/tokens.py --prepare`` trains what is not there.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.accuracy.models import BUILDERS, CACHE, Images, Say, _store, share_right


@dataclass(frozen=True)
class Stage:
    """Epochs at one size.

    size    of the images; with the recipe's patches it fixes the number of tokens
    lr      where the one-cycle schedule of this stage peaks
    crop    smallest side of a random crop, as a share of the image's
    mix     share of batches in which a rectangle of each image is that of another (cutmix)
    fused   attention in one kernel: quicker from a few hundred tokens on, slower backwards below
    """

    size: int
    epochs: int
    lr: float
    crop: float
    mix: float = 0.0
    fused: bool = False


@dataclass(frozen=True)
class Recipe:
    """How the model is made. Every field is part of the checkpoint's hash.

    sizes   arguments of timm's VisionTransformer, which gets ``img_size`` from the stage
    held    train images that training does not see
    bf16    forward passes under bfloat16 autocast while training (weights stay fp32)
    """

    name: str
    data: str = "cifar10"
    builder: str = "vit"
    sizes: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    batch: int = 64
    decay: float = 0.05
    smoothing: float = 0.1
    held: int = 2000
    bf16: bool = True
    seed: int = 0

    @property
    def hash(self) -> str:
        """Eight characters that change with the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    @property
    def size(self) -> int:
        """Of the images that the trained model takes."""
        return self.stages[-1].size

    def path(self, cache: Path = CACHE) -> Path:
        return cache / f"{self.name}-{self.hash}.pt"


RECIPE = Recipe(
    "vit-tokens",
    sizes={"patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4},
    stages=(Stage(28, 36, 1.2e-3, 0.6, mix=0.25), Stage(56, 3, 3e-4, 0.75, fused=True)),
)


@dataclass(frozen=True)
class Split:
    """Images as the model takes them [n, 3, size, size], and labels [n]."""

    images: Tensor
    labels: Tensor


def resize(images: Tensor, size: int) -> Tensor:
    """Whole images at another size. [n, c, h, w] -> [n, c, size, size]"""
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


def splits(recipe: Recipe, images: Images) -> tuple[Split, Split]:
    """The held-out part of the train split and the test split, at the trained model's size."""
    held = slice(len(images.train_labels) - recipe.held, None)
    return (
        Split(resize(images.train_images[held], recipe.size), images.train_labels[held]),
        Split(resize(images.test_images, recipe.size), images.test_labels),
    )


def train_cached(
    recipe: Recipe, images: Images, cache: Path = CACHE, say: Say = print
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation form, trained now unless its checkpoint is there, and how that went.

    Returns also {"hash", "cpu_seconds", "epoch_seconds" per stage, "held_accuracy", "test_accuracy"}; shares.
    """
    path = recipe.path(cache)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model, about = _train(recipe, images, path.with_suffix(".partial"), say)
        _store(path, {"model": model.state_dict(), "about": about, "recipe": asdict(recipe)})
        path.with_suffix(".partial").unlink(missing_ok=True)
    saved = torch.load(path, weights_only=True)
    model = build(recipe, recipe.size)
    model.load_state_dict(saved["model"])
    return model.eval(), saved["about"]


def build(recipe: Recipe, size: int) -> nn.Module:
    """An untrained model for images of ``size``, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return BUILDERS[recipe.builder](img_size=size, **recipe.sizes)


def carry_over(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with its position embedding interpolated to the grid of ``model``."""
    from timm.layers import resample_abs_pos_embed

    mine = model.state_dict()["pos_embed"]
    side = round((mine.shape[1] - 1) ** 0.5)
    held = state["pos_embed"]
    moved = held if held.shape == mine.shape else resample_abs_pos_embed(held, [side, side], num_prefix_tokens=1)
    return {**state, "pos_embed": moved}


def _train(recipe: Recipe, images: Images, partial: Path, say: Say) -> tuple[nn.Module, dict[str, Any]]:
    """Stage after stage, from ``partial`` on if it is there."""
    fit = len(images.train_labels) - recipe.held
    pool = Split(images.train_images[:fit], images.train_labels[:fit])
    saved: dict[str, Any] = torch.load(partial, weights_only=True) if partial.exists() else {"stage": 0, "epoch": 0}
    spent: list[float] = list(saved.get("cpu_seconds", [0.0] * len(recipe.stages)))
    generator = torch.Generator().manual_seed(recipe.seed)
    if "generator" in saved:
        generator.set_state(saved["generator"])
    for number in range(saved["stage"], len(recipe.stages)):
        stage = recipe.stages[number]
        model = build(recipe, stage.size)
        if "model" in saved:
            model.load_state_dict(carry_over(saved["model"], model))
        optimiser = torch.optim.AdamW(model.parameters(), stage.lr, weight_decay=recipe.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, stage.lr, pct_start=0.15, total_steps=stage.epochs * (fit // recipe.batch)
        )
        if saved["epoch"]:
            optimiser.load_state_dict(saved["optimiser"])
            schedule.load_state_dict(saved["schedule"])
        held = Split(resize(images.train_images[fit:], stage.size), images.train_labels[fit:])
        for epoch in range(saved["epoch"], stage.epochs):
            started = time.process_time()
            loss = _epoch(model.train(), recipe, stage, pool, optimiser, schedule, generator)
            spent[number] += time.process_time() - started
            last = epoch + 1 == stage.epochs
            saved = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
                "cpu_seconds": spent,
                "stage": number + last,
                "epoch": 0 if last else epoch + 1,
            }
            _store(partial, saved)
            right = 100 * share_right(_quick(model.eval(), recipe.bf16), held.images, held.labels)
            say(
                f"{recipe.name}: {stage.size}x{stage.size}, epoch {epoch + 1} of {stage.epochs}, loss {loss:.3f}, "
                f"held-out accuracy {right:.2f}, {sum(spent):.0f} CPU s"
            )
    model = build(recipe, recipe.size)
    model.load_state_dict(saved["model"])
    return model, _verdict(model.eval(), recipe, images, spent, say)


def _verdict(model: nn.Module, recipe: Recipe, images: Images, spent: list[float], say: Say) -> dict[str, Any]:
    held, test = (share_right(model, part.images, part.labels, 50) for part in splits(recipe, images))
    say(f"{recipe.name}: test accuracy {100 * test:.2f}, held-out {100 * held:.2f}, {sum(spent):.0f} CPU s")
    return {
        "hash": recipe.hash,
        "cpu_seconds": round(sum(spent)),
        "held_accuracy": held,
        "test_accuracy": test,
        "epoch_seconds": [round(s / stage.epochs, 1) for s, stage in zip(spent, recipe.stages, strict=True)],
    }


def _quick(model: nn.Module, bf16: bool) -> Any:
    def run(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(images)

    return run


def _epoch(
    model: nn.Module,
    recipe: Recipe,
    stage: Stage,
    pool: Split,
    optimiser: Any,
    schedule: Any,
    generator: torch.Generator,
) -> float:
    total, count = 0.0, len(pool.labels) // recipe.batch
    for index in torch.randperm(len(pool.labels), generator=generator).split(recipe.batch)[:count]:
        batch, labels = crop(pool.images[index], stage, generator), pool.labels[index]
        other, share = labels, 0.0
        if torch.rand((), generator=generator) < stage.mix:
            batch, share = mix(batch, generator)
            other = labels.roll(1)
        kernel = SDPBackend.FLASH_ATTENTION if stage.fused else SDPBackend.MATH
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16), sdpa_kernel(kernel):
            logits = model(batch.contiguous(memory_format=torch.channels_last)).float()
        loss = sum(
            weight * functional.cross_entropy(logits, target, label_smoothing=recipe.smoothing)
            for weight, target in ((1 - share, labels), (share, other))
            if weight
        )
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        total += loss.item()
    return total / count


def crop(batch: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """A random square of each image at the stage's size, half of them mirrored. [n, c, h, w] -> [n, c, size, size]"""
    count = len(batch)
    side = stage.crop + (1 - stage.crop) * torch.rand(count, generator=generator)
    middle = (1 - side) * (2 * torch.rand(2, count, generator=generator) - 1)
    flip = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float()
    where = torch.zeros(count, 2, 3)
    where[:, 0, 0], where[:, 1, 1] = side * flip, side
    where[:, 0, 2], where[:, 1, 2] = middle
    grid = functional.affine_grid(where, [count, batch.shape[1], stage.size, stage.size], align_corners=False)
    return functional.grid_sample(batch, grid, padding_mode="reflection", align_corners=False)


def mix(batch: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Every image with one rectangle of its neighbour in the batch, and the rectangle's share of the area."""
    height, width = batch.shape[2:]
    cut = float(torch.rand((), generator=generator)) ** 0.5
    rows, columns = round(cut * height), round(cut * width)
    top = int(torch.randint(0, height - rows + 1, (), generator=generator))
    left = int(torch.randint(0, width - columns + 1, (), generator=generator))
    made = batch.clone()
    made[:, :, top : top + rows, left : left + columns] = batch.roll(1, 0)[
        :, :, top : top + rows, left : left + columns
    ]
    return made, rows * columns / (height * width)
