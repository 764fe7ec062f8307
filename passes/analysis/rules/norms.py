"""Normalisation: parameters follow their channels; statistics over an axis make cutting it inexact."""

from __future__ import annotations

from ....ir.axis import Dims, new_dim, total
from ..walk import Args, Walk, rule


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm")
def batch_norm(w: Walk, a: Args) -> Dims:
    """Exact per channel with running statistics; with batch statistics every other dim is reduced over."""
    x = a.input
    for tensor in (a.weight, a.bias, a.running_mean, a.running_var):
        if tensor is not None:
            w.unify(x[1], tensor[0])
    if len(x) > 3:
        w.tag("conv", x[1])
    if a.running_mean is None or a.get("training", False):
        w.freeze([x[0], *x[2:]], "batch statistics")
    return list(x)


@rule("instance_norm")
def instance_norm(w: Walk, a: Args) -> Dims:
    x = a.input
    for tensor in (a.weight, a.bias, a.running_mean, a.running_var):
        if tensor is not None:
            w.unify(x[1], tensor[0])
    w.freeze(x[2:], "instance statistics")
    return list(x)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(w: Walk, a: Args) -> Dims:
    x, rank = a.input, len(a.normalized_shape)
    for tensor in (a.get("weight"), a.get("bias")):
        if tensor is not None:
            for p, q in zip(x[-rank:], tensor, strict=True):
                w.unify(p, q)
    for i in range(len(x) - rank, len(x)):
        w.statistic(x[i], i)
    w.literal("normalized_shape", "shape", x[-rank:])
    return list(x)


@rule("group_norm")
def group_norm(w: Walk, a: Args) -> Dims:
    """Channels are groups x within; whole groups can go exactly, channels inside them change the statistics."""
    x = a.input
    group, within = new_dim(a.num_groups), new_dim(total(x[1]) // a.num_groups)
    w.unify(x[1], group + within)
    for tensor in (a.weight, a.bias):
        if tensor is not None:
            w.unify(x[1], tensor[0])
    w.statistic(within, 1)
    w.literal("num_groups", "sum", [group])
    w.freeze(x[2:], "group statistics")
    return list(x)
