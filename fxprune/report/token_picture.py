"""Which patches merged into which: a picture for the report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ..ir.dataflow import op_name
from ..ir.program import Program
from ..ir.token_flow import TokenFlow

IMAGES, SIDE, GAP = 4, 160, 6  # pictures, pixels of a side, pixels between
BLACK = 0.04


def token_picture(flow: TokenFlow, reduced: Program, flat: Sequence[Any]) -> bytes | None:
    """A PNG: a few inputs in the upper row, below them what is left of each behind the last site.

    Patches that were merged into one token show their common mean colour, with lines around what belongs together;
    dropped ones are black. None where the inputs are no images, or patches do not lie in rows and columns.

    reduced   the program with the token ops of a plan;  flat: its user inputs
    """
    image = next((t for t in flat if isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point()), None)
    rows, columns = flow.grid if len(flow.grid) == 2 else (0, 0)
    if image is None or not rows or image.shape[1] not in (1, 3) or image.shape[2] % rows or image.shape[3] % columns:
        return None
    place = places(reduced, flat)
    if place is None:
        return None
    front = next(s.protected for s in flow.usable)
    few = zip(image[:IMAGES].cpu(), place[:IMAGES].cpu(), strict=True)
    parts = [_pair(x, p[front:].reshape(rows, columns)) for x, p in few]
    return _png(torch.cat(parts, 2)[:, :, :-GAP])


def places(reduced: Program, flat: Sequence[Any]) -> Tensor | None:
    """Where every token of the dense model ends up: its index behind the last op, -1 where it went. [b, tokens]"""
    run = _Places(reduced)
    with torch.no_grad():
        run.run(*reduced.arguments(flat))
    return run.place


class _Places(Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.exported.graph_module)
        self.place: Tensor | None = None

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if op_name(n).startswith("fxprune::") and isinstance(value, tuple) and len(value) == 3:
            step, last = value[2], self.place
            self.place = step if last is None else torch.where(last < 0, last, step.gather(1, last.clamp_min(0)))
        return value


def _pair(image: Tensor, group: Tensor) -> Tensor:
    """The image above what is left of it, with a gap to the right. [3, 2 SIDE + GAP, SIDE + GAP]"""
    x = image.detach().float().cpu()
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-6)
    x = x.expand(3, -1, -1)
    patch = (
        x.unfold(1, x.shape[1] // group.shape[0], x.shape[1] // group.shape[0])
        .unfold(2, x.shape[2] // group.shape[1], x.shape[2] // group.shape[1])
        .mean((3, 4))
    )  # [3, rows, columns]
    shown = patch.clone()
    for g in group.unique():
        mine = group == g
        shown[:, mine] = BLACK if g < 0 else patch[:, mine].mean(1, keepdim=True)
    top, bottom = (torch.nn.functional.interpolate(t[None], (SIDE, SIDE), mode="nearest")[0] for t in (x, shown))
    big = torch.nn.functional.interpolate(group[None, None].float(), (SIDE, SIDE), mode="nearest")[0, 0]
    bottom[:, :, 1:][:, big[:, 1:] != big[:, :-1]] = 1.0
    bottom[:, 1:][:, big[1:] != big[:-1]] = 1.0
    out = torch.ones(3, 2 * SIDE + GAP, SIDE + GAP)
    out[:, :SIDE, :SIDE], out[:, SIDE + GAP :, :SIDE] = top, bottom
    return out


def _png(picture: Tensor) -> bytes:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    found = io.BytesIO()
    Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist())).save(found, "PNG")
    return found.getvalue()
