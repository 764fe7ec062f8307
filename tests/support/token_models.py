"""A small vision transformer with what tells token sites apart: class tokens, readouts, tables, heads that need all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import CompressionPlan, TokenPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.find_token_sites import FindTokenSites
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.drop_masks import DropMasks


class Block(nn.Module):
    """Attention and a feed-forward layer. ``how``: sdpa, written, rope, bias, causal, parallel or post (norm)."""

    def __init__(self, width: int, heads: int, tokens: int, how: str) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if how == "rope":
            self.table = nn.Buffer(torch.randn(tokens, width // heads))
        if how == "bias":
            self.table = nn.Parameter(torch.randn(heads, tokens, tokens))

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "rope":
            q, k = q * self.table, k * self.table
        if self.how == "written":
            y = torch.softmax(q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, self.table if self.how == "bias" else None, is_causal=self.how == "causal"
            )
        return self.proj(y.transpose(1, 2).reshape(b, t, c))

    def feed(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "parallel":
            y = self.norm1(x)
            return x + self.attend(y) + self.feed(y)
        if self.how == "post":
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.feed(x))
        x = x + self.attend(self.norm1(x))
        return x + self.feed(self.norm2(x))


class TokenViT(nn.Module):
    """images [batch, 3, 8 size, 8 size] -> what ``read`` says.

    front   tokens in front of the patches, the first of them the class token
    read    class, mean, mean-patches, all (tokens), grid (a convolution over the patches), both (class beside mean)
    """

    def __init__(
        self,
        front: int = 1,
        read: str = "class",
        how: str = "sdpa",
        size: int = 4,
        width: int = 24,
        heads: int = 3,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.front, self.read, self.size = front, read, size
        self.patch = nn.Conv2d(3, width, 8, 8)
        tokens = front + size * size
        self.extra = nn.Parameter(torch.randn(1, front, width)) if front else None
        self.position = nn.Parameter(torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, tokens, how) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width if read == "both" else width, 5)
        self.decode = nn.Conv2d(width, 5, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        if self.extra is not None:
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.position))
        if self.read == "grid":
            return self.decode(x[:, self.front :].transpose(1, 2).reshape(x.shape[0], -1, self.size, self.size))
        if self.read == "all":
            return x
        if self.read == "both":
            return self.head(torch.cat([x[:, 0], x[:, self.front :].mean(1)], -1))
        if self.read == "mean":
            return self.head(x.mean(1))
        return self.head(x[:, self.front :].mean(1) if self.read == "mean-patches" else x[:, 0])


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that let errors show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p.shape[1] if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5 + (1.0 if p.dim() == 1 else 0.0) * 0.1)
    return model.eval()


def analysed(model: nn.Module, batch: int = 2, unmerge: bool = False, size: int = 32) -> Program:
    """The captured program with axes, groups and token flow."""
    program = capture(model, (torch.randn(batch, 3, size, size),), {})
    passes = (Clean(), DropMasks(), PropagateAxes(), FindGroups(align=1), FindTokenSites(unmerge=unmerge))
    return Pipeline(passes).run(program)


def planned(program: Program, reducer: str, counts: list[int]) -> Program:
    """``program`` with a plan that removes so many tokens at its usable sites."""
    flow = program.need("tokens")
    removed = {s.name: r for s, r in zip(flow.usable, counts, strict=False) if r}
    return program.but(plan=CompressionPlan(TokenPlan(reducer, removed, bool(flow.restored)).choices()))
