"""The image models of tools/bench/accuracy.py: data, architectures, training, and checkpoints that are kept.

Trained here because no weights of image models come with the packages in use. A checkpoint lies under
``build/bench-models`` (ignored by git) as ``NAME-HASH.pt``; the hash is that of everything in the recipe, so an edited
recipe trains again. Training stores itself after every epoch and goes on from there when it was interrupted.

Same recipe, same machine, same weights; other machines round differently, so figures belong to a checkpoint and the
results name its hash.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / "build" / "bench-models"
DATA = ROOT.parent / "shared" / "data"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """Floating images [n, channels, height, width] and labels [n], in two splits that share no image."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def cifar(folder: Path = DATA) -> Images:
    """CIFAR-10 as ``folder/cifar10/{train,test}.npz`` holds it: 12 000 and 2 000 images, each channel standardised.

    Raises FileNotFoundError that says what to give.
    """
    import numpy as np

    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for split in ("train", "test"):
        path = folder / "cifar10" / f"{split}.npz"
        if not path.exists():
            raise FileNotFoundError(
                f"CIFAR-10 is not at {path}: give the folder that holds cifar10/train.npz and "
                "cifar10/test.npz (images uint8 [n, 32, 32, 3], labels) with --data"
            )
        with np.load(path) as file:
            parts[split] = (
                torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255,
                torch.from_numpy(file["labels"].astype("int64")),
            )
    mean, std = (f(parts["train"][0]) for f in (_channel_mean, _channel_std))
    scaled = {split: ((images - mean) / std, labels) for split, (images, labels) in parts.items()}
    return Images(*scaled["train"], *scaled["test"])


def digits(_: Path = DATA) -> Images:
    """UCI's handwritten digits [n, 1, 8, 8]; a quarter, drawn by class, is the test split."""
    from fxprune.cli.demo import digits as load

    return Images(**vars(load(seed=0)))


def _channel_mean(images: Tensor) -> Tensor:
    return images.mean((0, 2, 3), keepdim=True)


def _channel_std(images: Tensor) -> Tensor:
    return images.std((0, 2, 3), keepdim=True)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut. [batch, inputs, h, w] -> [batch, width, h/s, w/s]"""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images. [batch, channels, h, w] -> logits [batch, 10]"""

    def __init__(self, channels: int, widths: list[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(inputs, width, 2 if stage and not block else 1))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class ConvolutionStem(nn.Module):
    """Strided convolutions in place of a patch projection: a ViT learns far more from 12 000 images with them.

    Takes the arguments that timm's VisionTransformer hands to its ``embed_layer``; a patch of 2^k takes k convolutions.
    [batch, channels, h, w] -> [batch, h w / patch^2, width]
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        count = patch_size.bit_length() - 1
        widths = [in_chans, *(embed_dim // 2 ** (count - 1 - i) for i in range(count))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def _resnet(**sizes: Any) -> nn.Module:
    return ResNet(**sizes)


def _vit(**sizes: Any) -> nn.Module:
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(embed_layer=ConvolutionStem, num_classes=10, **sizes)  # type: ignore[arg-type]


def _digits_vit(**sizes: Any) -> nn.Module:
    from fxprune.cli.demo import DigitsViT

    return DigitsViT(**sizes)


BUILDERS: dict[str, Callable[..., nn.Module]] = {"resnet": _resnet, "vit": _vit, "digits-vit": _digits_vit}
LOADERS: dict[str, Callable[[Path], Images]] = {"cifar10": cifar, "digits": digits}


@dataclass(frozen=True)
class Recipe:
    """How a model is made. Every field is part of the checkpoint's hash.

    data, builder, sizes    names in LOADERS and BUILDERS, and the builder's arguments
    optimiser               ``sgd`` (Nesterov 0.9) or ``adamw``, under a one-cycle schedule that peaks at ``lr``
    flip, shift             augmentation: mirror half the images, move each by up to so many pixels
    smoothing               of the labels
    bf16                    the forward pass under bfloat16 autocast (weights stay fp32): quicker on CPUs that have it
    """

    name: str
    data: str
    builder: str
    sizes: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    batch: int = 64
    optimiser: str = "sgd"
    lr: float = 0.1
    decay: float = 5e-4
    flip: bool = True
    shift: int = 4
    smoothing: float = 0.1
    bf16: bool = True
    seed: int = 0

    @property
    def hash(self) -> str:
        """Eight characters that change with the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def path(self, cache: Path = CACHE) -> Path:
        return cache / f"{self.name}-{self.hash}.pt"


RECIPES = {
    r.name: r
    for r in (
        Recipe(
            "vit-cifar",
            "cifar10",
            "vit",
            {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 6},
            epochs=24,
            batch=128,
            optimiser="adamw",
            lr=1.5e-3,
            decay=0.05,
        ),
        Recipe(
            "cnn-cifar", "cifar10", "resnet", {"channels": 3, "widths": [32, 64, 128], "blocks": 2}, epochs=16, lr=0.2
        ),
        Recipe(
            "vit-digits",
            "digits",
            "digits-vit",
            epochs=15,
            batch=32,
            optimiser="adamw",
            lr=2e-3,
            decay=0.05,
            flip=False,
            shift=0,
            smoothing=0.0,
            bf16=False,
        ),
        Recipe(
            "cnn-digits",
            "digits",
            "resnet",
            {"channels": 1, "widths": [16, 32, 64], "blocks": 1},
            epochs=10,
            lr=0.1,
            flip=False,
            shift=1,
            smoothing=0.0,
            bf16=False,
        ),
    )
}


def train_cached(
    recipe: Recipe, images: Images, cache: Path = CACHE, say: Say = print
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation form, trained now unless its checkpoint is there, and how that went.

    Returns also {"hash", "epochs", "cpu_seconds", "test_accuracy"} of the training; the accuracy is a share.
    """
    path = recipe.path(cache)
    model = _initial(recipe)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        about = _train(model, recipe, images, path.with_suffix(".partial"), say)
        _store(path, {"model": model.state_dict(), "about": about, "recipe": asdict(recipe)})
        path.with_suffix(".partial").unlink(missing_ok=True)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    return model.eval(), saved["about"]


def fingerprint(model: nn.Module) -> str:
    """Eight characters that change with the weights: the same recipe gives others on another machine."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def _initial(recipe: Recipe) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return BUILDERS[recipe.builder](**recipe.sizes)


def _train(model: nn.Module, recipe: Recipe, images: Images, partial: Path, say: Say) -> dict[str, Any]:
    """Train in place, from ``partial`` on if it is there."""
    count = len(images.train_labels)
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(model.parameters(), recipe.lr, 0.9, weight_decay=recipe.decay, nesterov=True)
    else:
        optimiser = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.decay)
    steps = recipe.epochs * (count // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=steps, pct_start=0.2)
    generator, first, spent = torch.Generator().manual_seed(recipe.seed), 0, 0.0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        first, spent = saved["epoch"], saved["cpu_seconds"]
    with torch.random.fork_rng(devices=[]):
        for epoch in range(first, recipe.epochs):
            torch.manual_seed(recipe.seed + epoch)  # dropout
            started = time.process_time()
            loss = _epoch(model.train(), recipe, images, optimiser, schedule, generator)
            spent += time.process_time() - started
            _store(
                partial,
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "generator": generator.get_state(),
                    "epoch": epoch + 1,
                    "cpu_seconds": spent,
                },
            )
            say(f"{recipe.name}: epoch {epoch + 1} of {recipe.epochs}, loss {loss:.3f}, {spent:.0f} CPU s")
    accuracy = share_right(model.eval(), images.test_images, images.test_labels)
    say(f"{recipe.name}: test accuracy {100 * accuracy:.2f} after {recipe.epochs} epochs, {spent:.0f} CPU s")
    return {"hash": recipe.hash, "epochs": recipe.epochs, "cpu_seconds": round(spent), "test_accuracy": accuracy}


def _epoch(
    model: nn.Module, recipe: Recipe, images: Images, optimiser: Any, schedule: Any, generator: torch.Generator
) -> float:
    total, count = 0.0, len(images.train_labels) // recipe.batch
    for index in torch.randperm(len(images.train_labels), generator=generator).split(recipe.batch)[:count]:
        batch = augment(images.train_images[index], recipe, generator)
        # the quick attention is slow backwards in bfloat16 on CPUs
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16), sdpa_kernel(SDPBackend.MATH):
            logits = model(batch.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits.float(), images.train_labels[index], label_smoothing=recipe.smoothing)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        total += loss.item()
    return total / count


def augment(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The same images, some mirrored, each moved within a border of zeros."""
    if recipe.flip:
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    if recipe.shift:
        size, (height, width) = recipe.shift, batch.shape[2:]
        padded = functional.pad(batch, (size,) * 4)
        moves = torch.randint(0, 2 * size + 1, (2, len(batch)), generator=generator)
        rows = (moves[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (moves[1][:, None] + torch.arange(width))[:, None, None, :]
        batch = padded[
            torch.arange(len(batch))[:, None, None, None],
            torch.arange(batch.shape[1])[None, :, None, None],
            rows,
            columns,
        ]
    return batch


@torch.no_grad()
def share_right(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 200) -> float:
    """Share of images whose largest logit is the label."""
    right = sum(
        int((model(x).argmax(-1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    )
    return right / len(labels)


def _store(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".new")
    torch.save(content, aside)
    aside.replace(path)
