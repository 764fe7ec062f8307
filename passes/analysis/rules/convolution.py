"""Convolutions, pooling and resampling: channels pass or are contracted, spatial dims stay."""

from __future__ import annotations

from ....ir.axis import Conflict, Dim, Dims, new_dim, total
from ..walk import Args, Walk, rule

SPATIAL = "spatial"


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(w: Walk, a: Args) -> Dims:
    """x[N, G*c, ..] * W[G*m, c, ..] -> y[N, G*m, ..]; depthwise is the case c = 1"""
    x, weight, bias, groups = a.input, a.weight, a.bias, a.groups
    if not isinstance(groups, int):
        raise Conflict("its groups are counted by an open size, such as the batch")
    if a.get("transposed"):
        return conv_transpose(w, a)
    if len(x) != len(weight):
        raise Conflict("convolution without a batch dimension")
    group = new_dim(groups)
    w.unify(x[1], group + weight[1])
    w.unify(weight[0], group + new_dim(total(weight[0]) // groups))
    return _finish(w, a, x, weight, bias, group, weight[0], x[1], transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(w: Walk, a: Args) -> Dims:
    """x[N, G*c, ..] * W[G*c, m, ..] -> y[N, G*m, ..]"""
    x, weight, bias, groups = a.input, a.weight, a.bias, a.groups
    if not isinstance(groups, int):
        raise Conflict("its groups are counted by an open size, such as the batch")
    if len(x) != len(weight):
        raise Conflict("convolution without a batch dimension")
    group = new_dim(groups)
    w.unify(x[1], weight[0])
    w.unify(weight[0], group + new_dim(total(weight[0]) // groups))
    return _finish(w, a, x, weight, bias, group, group + weight[1], weight[0], transposed=True)


def _finish(
    w: Walk,
    a: Args,
    x: Dims,
    weight: Dims,
    bias: Dims | None,
    group: Dim,
    out: Dim,
    contracted: Dim,
    *,
    transposed: bool,
) -> Dims:
    if bias is not None:
        w.unify(bias[0], out)
    # on the weight side the contracted channels sit behind the group; only the input shows all of them in one dim
    w.contract(contracted, ("input", 1))
    w.tag("produce", out)
    if any(total(d) > 1 for d in weight[2:]):
        tag = "depthwise" if a.groups == total(contracted) == total(out) else "conv"
        w.tag(tag, contracted)
        w.tag(tag, out)
    w.freeze(weight[2:], "kernel")
    w.freeze(x[2:], SPATIAL)
    if a.groups > 1:
        w.literal("groups", "sum", [group])
    spatial: Dims = w.fresh(SPATIAL)[2:]
    kernel = tuple(axis for d in weight[2:] for axis in d)
    if transposed:  # multiplies once per input position
        w.matmul([x[0], *x[2:]], (), weight[0] + kernel, weight[1], "conv")
    else:
        w.matmul([x[0], *spatial], (), weight[1] + kernel, weight[0], "conv")
    return [x[0], out, *spatial]


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "max_pool2d_with_indices",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
    "__interpolate",
)
def resample(w: Walk, a: Args) -> Dims:
    (x,) = a.tensors()
    w.freeze(x[2:], SPATIAL)
    out = w.fresh()
    if not isinstance(w.node.meta["val"], (list, tuple)):
        w.freeze(out[2:], SPATIAL)
        return [*x[:2], *out[2:]]
    for one in out:
        w.freeze(one[2:], SPATIAL)
    return type(out)([*x[:2], *one[2:]] for one in out)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(w: Walk, a: Args) -> Dims:
    """x[N, C, ..] read at grid[N, .., coordinates]; deformable attention folds its heads into N"""
    x, grid = a.input, a.grid
    w.unify(x[0], grid[0])
    w.freeze([*x[2:], *grid[1:]], "sampling grid")
    return [x[0], x[1], *grid[1:-1]]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(w: Walk, a: Args) -> Dims:
    """[N, C*r*r, H, W] <-> [N, C, H*r, W*r]"""
    x, name = a.self, w.node.target._schema.name  # type: ignore[union-attr]
    if name.endswith("channel_shuffle"):
        groups, each = new_dim(a.groups), new_dim(total(x[1]) // a.groups)
        w.unify(x[1], groups + each)
        w.freeze(groups, "channel shuffle")
        return [x[0], each + groups, *x[2:]]
    factor = new_dim((a.get("upscale_factor") or a.get("downscale_factor")) ** 2)
    w.freeze(factor, "pixel shuffle")
    w.freeze(x[2:], SPATIAL)
    out: Dims = w.fresh()
    w.freeze(out[2:], SPATIAL)
    if name.endswith("unshuffle"):
        return [x[0], x[1] + factor, *out[2:]]
    w.unify(x[1], out[1] + factor)
    return [x[0], out[1], *out[2:]]


@rule("im2col")
def im2col(w: Walk, a: Args) -> Dims:
    """[N, C, H, W] -> [N, C*k*k, L]"""
    x, out = a.self, w.fresh()
    if len(x) != 4:
        raise Conflict("im2col without a batch dimension")
    kernel = new_dim(total(out[1]) // max(total(x[1]), 1))
    w.freeze([kernel, *x[2:], out[2]], SPATIAL)
    return [x[0], x[1] + kernel, out[2]]


@rule("col2im")
def col2im(w: Walk, a: Args) -> Dims:
    """[N, C*k*k, L] -> [N, C, H, W]"""
    x, out = a.self, w.fresh()
    if len(x) != 3:
        raise Conflict("col2im without a batch dimension")
    kernel = new_dim(total(x[1]) // max(total(out[1]), 1))
    w.unify(x[1], out[1] + kernel)
    w.freeze([kernel, x[2], *out[2:]], SPATIAL)
    return [x[0], *out[1:]]
