"""Non-linear functions, element by element, and softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import Op, translates


@translates("Relu")
def relu(op: Op, x: Tensor) -> Tensor:
    return F.relu(x)


@translates("Sigmoid")
def sigmoid(op: Op, x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@translates("Tanh")
def tanh(op: Op, x: Tensor) -> Tensor:
    return torch.tanh(x)


@translates("Gelu", "com.microsoft::Gelu")
def gelu(op: Op, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=op.attribute("approximate", "none"))


@translates("com.microsoft::FastGelu")
def fast_gelu(op: Op, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@translates("com.microsoft::BiasGelu")
def bias_gelu(op: Op, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@translates("com.microsoft::QuickGelu")
def quick_gelu(op: Op, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.attribute("alpha", 1.702) * x)


@translates("HardSigmoid")
def hard_sigmoid(op: Op, x: Tensor) -> Tensor:
    alpha, beta = op.attribute("alpha", 0.2), op.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@translates("HardSwish")
def hard_swish(op: Op, x: Tensor) -> Tensor:
    return F.hardswish(x)


@translates("LeakyRelu")
def leaky_relu(op: Op, x: Tensor) -> Tensor:
    return F.leaky_relu(x, op.attribute("alpha", 0.01))


@translates("PRelu")
def prelu(op: Op, x: Tensor, slope: Tensor) -> Tensor:
    per_channel = x.dim() > 1 and slope.dim() == x.dim() - 1 and slope.shape[0] == slope.numel()
    if per_channel:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@translates("Elu")
def elu(op: Op, x: Tensor) -> Tensor:
    return F.elu(x, op.attribute("alpha", 1.0))


@translates("Selu")
def selu(op: Op, x: Tensor) -> Tensor:
    alpha, gamma = op.attribute("alpha", 1.67326319217681884765625), op.attribute("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@translates("Celu")
def celu(op: Op, x: Tensor) -> Tensor:
    return F.celu(x, op.attribute("alpha", 1.0))


@translates("Softplus")
def softplus(op: Op, x: Tensor) -> Tensor:
    return F.softplus(x)


@translates("Softsign")
def softsign(op: Op, x: Tensor) -> Tensor:
    return F.softsign(x)


@translates("Mish")
def mish(op: Op, x: Tensor) -> Tensor:
    return F.mish(x)


@translates("ThresholdedRelu")
def relu_above(op: Op, x: Tensor) -> Tensor:
    return F.threshold(x, op.attribute("alpha", 1.0), 0.0)


@translates("Softmax")
def softmax(op: Op, x: Tensor) -> Tensor:
    return _over_rows(op, x, torch.softmax)


@translates("LogSoftmax")
def log_softmax(op: Op, x: Tensor) -> Tensor:
    return _over_rows(op, x, torch.log_softmax)


def _over_rows(op: Op, x: Tensor, do: Callable[..., Tensor]) -> Tensor:
    """Before opset 13 the axis and all behind it are one row."""
    if op.opset >= 13:
        return do(x, op.attribute("axis", -1))
    axis = op.attribute("axis", 1)
    if axis % x.dim() == x.dim() - 1:
        return do(x, -1)
    return do(x.flatten(axis), -1).reshape(x.shape)
