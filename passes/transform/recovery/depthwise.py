"""Depthwise convolutions in recovery: a small system per channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ....ir.dataflow import Family, bind, family
from ....ir.patches import pads_of
from ....process.ranks import add_up


def is_depthwise(node: Node) -> bool:
    """Whether ``node`` is a convolution with one filter for each channel of a picture."""
    if node.op != "call_function" or family(node) is not Family.CONVOLUTION:
        return False
    given = bind(node)
    weight = given.get("weight")
    if not isinstance(weight, Node) or given.get("transposed") or isinstance(given.get("padding"), str):
        return False
    shape = weight.meta["val"].shape
    return len(shape) == 4 and shape[1] == 1 and int(given.get("groups", 1)) == int(shape[0]) > 1


def sample_rows(
    node: Node, kernel: Sequence[int], x: Tensor, outputs: Sequence[Tensor], most: int
) -> tuple[Tensor, list[Tensor]]:
    """(what a convolution of pictures reads [n, channels, taps], ``outputs`` there [n, channels] each), on an even grid
    of about ``most`` output positions: nothing is unfolded that is not looked at.

    x   its input [batch, channels, h, w];  outputs: like its output
    """
    stride, pad, dilation = pads_of(node, 2)
    size = outputs[0].shape
    step = max(1, math.ceil((size[0] * size[2] * size[3] / most) ** 0.5 - 0.01))
    top, left = (min(step // 2, size[i] - 1) for i in (2, 3))
    x = functional.pad(x, (pad[1], pad[1], pad[0], pad[0]))[:, :, top * stride[0] :, left * stride[1] :]
    wide = (stride[0] * step, stride[1] * step)
    if tuple(kernel) == (1, 1):
        taps = x[:, :, :: wide[0], :: wide[1]].flatten(2)
    else:
        taps = functional.unfold(x, tuple(kernel), tuple(dilation), (0, 0), wide)  # [batch, channels * taps, positions]
    there = [r[:, :, top::step, left::step].flatten(2).transpose(1, 2).flatten(0, 1) for r in outputs]
    channels = x.shape[1]
    c = taps.view(len(x), channels, -1, taps.shape[-1]).permute(0, 3, 1, 2).reshape(-1, channels, kernel[0] * kernel[1])
    return c, there


class ChannelMoments:
    """Sums over rows of inputs ``c`` [n, channels, taps] and residuals ``r`` [n, channels], fp64, about zero."""

    def __init__(self, channels: int, taps: int) -> None:
        zeros = torch.zeros
        self.sums = {
            "rows": zeros((), dtype=torch.float64),
            "cc": zeros(channels, taps, taps, dtype=torch.float64),
            "cr": zeros(channels, taps, dtype=torch.float64),
            "c": zeros(channels, taps, dtype=torch.float64),
            "r": zeros(channels, dtype=torch.float64),
            "rr": zeros(channels, dtype=torch.float64),
        }

    def add(self, c: Tensor, r: Tensor) -> None:
        """Take in rows."""
        c, r = c.double().cpu(), r.double().cpu()
        by_channel = c.transpose(0, 1).contiguous()  # [channels, n, taps]
        self.sums["rows"] += len(r)
        self.sums["cc"] += by_channel.transpose(1, 2) @ by_channel
        self.sums["cr"] += (by_channel.transpose(1, 2) @ r.T[..., None])[..., 0]
        self.sums["c"] += c.sum(0)
        self.sums["r"] += r.sum(0)
        self.sums["rr"] += r.square().sum(0)

    def finish(self, centred: bool) -> ChannelSystem | None:
        """The normal equations over the rows of all processes; None without a row."""
        sums = add_up(self.sums)
        rows = float(sums["rows"])
        if not rows:
            return None
        mean_c, mean_r = sums["c"] / rows, sums["r"] / rows
        if not centred:
            mean_c, mean_r = torch.zeros_like(mean_c), torch.zeros_like(mean_r)
        g = sums["cc"] / rows - mean_c[:, :, None] * mean_c[:, None, :]
        b = sums["cr"] / rows - mean_c * mean_r[:, None]
        return ChannelSystem(g, b, sums["rr"] / rows - mean_r.square(), mean_c, mean_r, int(rows))


@dataclass(frozen=True)
class ChannelSystem:
    """Per channel: g [channels, taps, taps], b, mean_c [channels, taps], rr, mean_r [channels]; see ``System``."""

    g: Tensor
    b: Tensor
    rr: Tensor
    mean_c: Tensor
    mean_r: Tensor
    rows: int

    def ridge(self, rel: float) -> Tensor:
        """Change of the weights, [channels, taps]: a ridge anchored at the current ones, channel by channel; none for a
        channel whose input never changes."""
        power = self.g.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(self.g.shape[1], dtype=self.g.dtype)
        damped = self.g + (rel * power.clamp_min(0) + 1e-12 * power.max().clamp_min(1e-30))[:, None, None] * eye
        change = torch.linalg.solve(damped, self.b[..., None])[..., 0]
        return torch.where(torch.isfinite(change).all(1, keepdim=True), change, torch.zeros_like(change))

    def bias(self, change: Tensor) -> Tensor:
        """Change of the bias that makes the mean right after the weights moved. [channels]"""
        return self.mean_r - (change * self.mean_c).sum(1)

    def error(self, change: Tensor | None = None, bias: Tensor | None = None) -> float:
        """Mean over rows of |target - output|^2 after weights and bias moved by these."""
        left, mean = self.rr, self.mean_r
        if change is not None:
            left = left - 2 * (change * self.b).sum(1) + ((self.g @ change[..., None])[..., 0] * change).sum(1)
            mean = mean - (change * self.mean_c).sum(1)
        if bias is not None:
            mean = mean - bias
        return float(left.clamp_min(0).sum() + mean.square().sum())
