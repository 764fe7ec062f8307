"""Normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import NotTranslatedError, Op, translates


@translates("BatchNormalization")
def batch_normalization(op: Op, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if op.flag("training_mode") or any(op.gives(i) for i in range(1, 5)):
        raise NotTranslatedError("it runs in training form: export the model in evaluation form (model.eval())")
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, op.attribute("epsilon", 1e-5))


@translates("LayerNormalization")
def layer_normalization(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if op.gives(1) or op.gives(2):
        raise NotTranslatedError("it also gives means or deviations")
    axis = op.attribute("axis", -1) % x.dim()
    shape, epsilon = list(x.shape[axis:]), op.attribute("epsilon", 1e-5)
    if weight.dim() == len(shape):
        return F.layer_norm(x, shape, weight, bias, epsilon)
    normalised = F.layer_norm(x, shape, None, None, epsilon) * weight
    return normalised if bias is None else normalised + bias


@translates("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    axis = op.attribute("axis", -1) % x.dim()
    return F.rms_norm(x, list(x.shape[axis:]), weight, op.attribute("epsilon", 1e-5))


@translates("com.microsoft::SkipLayerNormalization")
def skip_layer_normalization(
    op: Op, x: Tensor, skip: Tensor, weight: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """A residual sum and the norm behind it, as onnxruntime's optimiser writes it."""
    if op.gives(1) or op.gives(2):
        raise NotTranslatedError("it also gives means or deviations")
    total = x + skip if bias is None else x + skip + bias
    found = F.layer_norm(total, [total.shape[-1]], weight, beta, op.attribute("epsilon", 1e-5))
    return (found, found, found, total) if op.gives(3) else found


@translates("InstanceNormalization")
def instance_normalization(op: Op, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, op.attribute("epsilon", 1e-5))


@translates("GroupNormalization")
def group_normalization(op: Op, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Weights are one per group before opset 21, one per channel since."""
    groups, epsilon = op.attribute("num_groups"), op.attribute("epsilon", 1e-5)
    if weight.shape[0] != x.shape[1]:
        each = x.shape[1] // groups
        weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, weight, bias, epsilon)


@translates("LpNormalization")
def lp_normalization(op: Op, x: Tensor) -> Tensor:
    return F.normalize(x, float(op.attribute("p", 2)), op.attribute("axis", -1), eps=1e-12)


@translates("LRN")
def local_response_norm(op: Op, x: Tensor) -> Tensor:
    size = op.attribute("size")
    if size % 2 == 0:
        raise NotTranslatedError("its window is even")
    return F.local_response_norm(
        x, size, op.attribute("alpha", 1e-4), op.attribute("beta", 0.75), op.attribute("bias", 1.0)
    )


@translates("MeanVarianceNormalization")
def mean_variance_normalization(op: Op, x: Tensor) -> Tensor:
    axes = op.attribute("axes", (0, 2, 3))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (torch.sqrt((centred * centred).mean(axes, keepdim=True)) + 1e-9)
