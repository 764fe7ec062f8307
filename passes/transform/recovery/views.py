"""Noisy copies of samples: what a model should find similar to the original, more or less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from ....data.batch import Batch
from ....ir.program import Program
from ....ir.signature import padding_mask

WORST_NOISE = 0.8  # largest share of replaced tokens, and of noise in the standard deviation of a float input
CROP, LIGHT, GRAIN = 0.4, 0.5, 0.3  # strongest view of an image: side cut off; contrast and brightness; noise


def noisy(program: Program, batch: Batch, generator: torch.Generator) -> Batch:
    """A copy of ``batch`` in which each sample lost a random share of its content.

    Token ids (integer inputs whose name ends in ``ids`` and that vary) are replaced by others of the batch, ends and
    padding excepted; images (floating, [n, 1 or 3, h, w]) are cropped, shifted, relit and get a little noise (see
    :func:`view`); other floating inputs get normal noise of a random share of their standard deviation.
    """
    flat = program.flatten(batch.args, batch.kwargs)
    mask = padding_mask(program, flat)
    changed: dict[int, Tensor] = {}
    for name, value, sampled in zip(program.user_inputs, flat, _find_sampled(program, flat, batch.size), strict=True):
        if sampled:
            if value.is_floating_point():
                image = value.dim() == 4 and value.shape[1] in (1, 3) and min(value.shape[2:]) > 1
                changed[id(value)] = (view if image else _shake)(value, generator)
            elif name.endswith("ids") and value.dim() == 2 and not bool((value == value[0, 0]).all()):
                changed[id(value)] = _replace_ids(value, mask, generator)

    def copy(value: Any) -> Any:
        return changed.get(id(value), value)

    args, kwargs = pytree.tree_map(copy, (tuple(batch.args), dict(batch.kwargs)))
    return replace(batch, args=args, kwargs=kwargs)


def _find_sampled(program: Program, flat: Sequence[Any], size: int) -> list[bool]:
    """Which inputs hold one entry per sample: of as many as the batch, or of a kind of samples of their own."""
    wanted = set(program.user_inputs)
    known = [n.meta.get("val") for n in program.placeholders() if n.name in wanted]
    own = [isinstance(v, Tensor) and v.dim() > 0 and not isinstance(v.shape[0], int) for v in known]
    return [
        isinstance(value, Tensor) and value.dim() > 0 and (opened or len(value) == size)
        for value, opened in zip(flat, own, strict=True)
    ]


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of each image [n, c, h, w], in its dtype, from nearly the same to hard to recognise.

    With a strength s ~ U(0, 1) of its own, each is cropped to a square share of side 1 - 0.4 s u anywhere inside and
    resized back (bilinear, borders repeated), which shifts it by a few pixels; its contrast is scaled by 1 +- 0.5 s,
    its brightness moved by +- 0.5 s standard deviations, and noise of 0.3 s standard deviations added.
    """
    count = len(images)
    x = images.float()
    device = x.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator).to(device)

    strength = draw(1)
    side = 1 - CROP * strength * draw(1)
    centre = (1 - side) * (2 * draw(2) - 1)
    turn = torch.zeros(count, 2, 3, device=device)
    turn[:, 0, 0] = turn[:, 1, 1] = side[:, 0]
    turn[:, :, 2] = centre
    grid = functional.affine_grid(turn, list(x.shape), align_corners=False)
    x = functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    spread, four = float(images.float().std()), (count, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast = (1 + LIGHT * strength * (2 * draw(1) - 1)).reshape(four)
    brightness = (LIGHT * strength * (2 * draw(1) - 1)).reshape(four) * spread
    grain = torch.randn(images.shape, generator=generator).to(device) * (GRAIN * strength).reshape(four) * spread
    return ((x - mean) * contrast + mean + brightness + grain).to(images.dtype)


def _shake(x: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(len(x), generator=generator) * WORST_NOISE
    noise = torch.randn(x.shape, generator=generator) * share.reshape(-1, *[1] * (x.dim() - 1))
    return x + (noise * x.float().std().cpu()).to(x)


def _replace_ids(ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.cpu().bool()
    inner = real.clone()
    inner[:, 0] = False
    inner[torch.arange(len(ids)), (real.long() * torch.arange(ids.shape[1])).argmax(1)] = False
    share = torch.rand(len(ids), 1, generator=generator) * WORST_NOISE
    hit = (torch.rand(ids.shape, generator=generator) < share) & inner
    pool = ids.cpu()[inner]
    if not len(pool):
        return ids
    drawn = pool[torch.randint(len(pool), ids.shape, generator=generator)]
    return torch.where(hit, drawn, ids.cpu()).to(ids)
