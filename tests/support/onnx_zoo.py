"""Classics as ONNX files of a few thousand weights: as PyTorch exports them, and as TensorFlow's are written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

from support.onnx_files import normal, write

make = helper.make_node


class Residual(nn.Module):
    """A ResNet's block, and a MobileNet's: depthwise in the middle where ``wide`` is not 0."""

    def __init__(self, width: int, wide: int = 0) -> None:
        super().__init__()
        inner = wide or width
        self.conv1, self.bn1 = (
            nn.Conv2d(width, inner, 1 if wide else 3, padding=0 if wide else 1),
            nn.BatchNorm2d(inner),
        )
        self.mid = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if wide else nn.Identity()
        self.conv2 = nn.Conv2d(inner, width, 1 if wide else 3, padding=0 if wide else 1)
        self.act: nn.Module = nn.ReLU6() if wide else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv2(self.mid(self.act(self.bn1(self.conv1(x))))))


class Pictures(nn.Module):
    """A small CNN with a classifier."""

    def __init__(self, wide: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(16, wide), Residual(16, wide))
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(image))).mean((2, 3)))


class Encoder(nn.Module):
    """A post-norm transformer on token ids, its attention spelt out."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.table = heads, nn.Embedding(50, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, 64), nn.Linear(64, width), nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        batch, length, width = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(attention_mask[:, None, None] == 0, -1e4)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.o(mixed))
        x = self.norm2(x + self.down(F.gelu(self.up(x))))
        return self.head(x[:, 0])


class Detector(nn.Module):
    """YOLO's idioms: SiLU, channels cut in two, pyramid by upsampling, boxes decoded over a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(48, 32, 1)
        self.e, self.out = nn.Conv2d(48, 24, 3, padding=1), nn.Conv2d(24, 9, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = F.silu(self.a(images))
        left, right = F.silu(self.b(first)).chunk(2, 1)
        joined = F.silu(self.d(torch.cat([left, right, right + F.silu(self.c(right))], 1)))
        fine = torch.cat([F.interpolate(joined, scale_factor=2.0, mode="nearest"), first], 1)
        found = self.out(F.silu(self.e(fine))).flatten(2)
        return found[:, :4].sigmoid().transpose(1, 2) * 32, found[:, 4:].sigmoid()


def randomised(model: nn.Module) -> nn.Module:
    """Norms and biases as training leaves them: no two layers have equal ones."""
    torch.manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dim() == 1 and value.is_floating_point():
            value.data = (
                torch.rand_like(value) + 0.5 if "var" in name or "norm" in name else torch.randn_like(value) * 0.2
            )
    return model.eval()


def export(
    model: nn.Module, args: tuple[Tensor, ...], path: Path, inputs: Sequence[str], outputs: Sequence[str], new: bool,
    lengths: bool = False, opset: int = 17,
) -> Path:  # fmt: skip
    """By PyTorch's exporter, the ``new`` or the old one, with the batch left open, and lengths."""
    open_dims: dict[int, str] = {0: "batch", **({1: "seq"} if lengths else {})}
    options: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs), "verbose": False}
    if new:
        dims = {i: torch.export.Dim(word) for i, word in open_dims.items()}
        options |= {"dynamo": True, "dynamic_shapes": tuple(dims for _ in inputs), "opset_version": 18}
    else:
        options |= {"dynamo": False, "dynamic_axes": dict.fromkeys(inputs, open_dims), "opset_version": opset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(randomised(model), args, str(path), **options)
    return path


def of_tensorflow(path: Path) -> Path:
    """A CNN in TensorFlow's order of dims as tf2onnx writes it: turned around every convolution, borders by hand,
    kernels reshaped in the graph, one picture at a time, names with colons."""

    def turned(value: str, name: str, perm: list[int]) -> Any:
        return make("Transpose", [value], [name], perm=perm, name=f"{name}__turn")

    to_front, to_back = [0, 3, 1, 2], [0, 2, 3, 1]
    nodes = [
        turned("serving_default_image:0", "x1", to_front),
        make("Pad", ["x1", "border"], ["x2"], name="model/conv1/Pad"),
        make("Conv", ["x2", "k1", "b1"], ["x3"], name="model/conv1/Conv2D", strides=[2, 2], kernel_shape=[3, 3]),
        turned("x3", "x4", to_back),
        make("Relu", ["x4"], ["x5"], name="model/relu1/Relu"),
        turned("x5", "x6", to_front),
        make("Conv", ["x6", "k2"], ["x7"], name="model/conv2/Conv2D", auto_pad="SAME_UPPER", strides=[2, 2]),
        make("BatchNormalization", ["x7", "g", "b", "m", "s"], ["x8"], name="model/bn2/FusedBatchNormV3"),
        make("Clip", ["x8", "zero", "six"], ["x9"], name="model/relu2/Relu6"),
        turned("x9", "x10", to_back),
        make("ReduceMean", ["x10"], ["x11"], axes=[1, 2], keepdims=0, name="model/pool/Mean"),
        make("Reshape", ["dense", "sizes"], ["matrix"], name="model/dense/kernel"),
        make("MatMul", ["x11", "matrix"], ["x12"], name="model/dense/MatMul"),
        make("Add", ["x12", "bias"], ["Identity:0"], name="model/dense/BiasAdd"),
    ]
    constants = {
        "border": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "k1": normal(16, 3, 3, 3), "b1": normal(16),
        "k2": normal(24, 16, 3, 3), "g": np.abs(normal(24)) + 0.5, "b": normal(24, seed=1), "m": normal(24, seed=2),
        "s": np.abs(normal(24, seed=3)) + 0.5, "zero": np.float32(0), "six": np.float32(6),
        "dense": normal(24, 1, 5), "sizes": np.array([24, 5]), "bias": normal(5),
    }  # fmt: skip
    inputs = {"serving_default_image:0": ("float32", [1, 16, 16, 3])}
    return write(path, nodes, inputs, ["Identity:0"], constants, opset=13)


def with_nms(source: Path, path: Path) -> Path:
    """A detector's file with the suppression of overlapping boxes behind it."""
    import onnx

    model = onnx.load(source)
    boxes, scores = (o.name for o in model.graph.output)
    model.graph.node.append(make("NonMaxSuppression", [boxes, scores, "most", "overlap"], ["kept"], name="/nms"))
    model.graph.initializer.extend(
        [helper.make_tensor("most", 7, [1], [3]), helper.make_tensor("overlap", 1, [1], [0.5])]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("kept", 7, [None, 3]))
    onnx.save(model, path)
    return path
