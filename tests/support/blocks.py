"""Small hand-made modules, each with one structure that the axis analysis must read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadViT(nn.Module):
    """A ViT around ``nn.MultiheadAttention``: packed in_proj, class token first, pre-norm."""

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int, hidden: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            y, _ = self.attention(y, y, y, need_weights=False)
            x = x + y
            return x + self.mlp(self.norm2(x))

    def __init__(
        self,
        width: int = 48,
        heads: int = 3,
        hidden: int = 64,
        depth: int = 2,
        *,
        patch: int = 8,
        patches: int = 16,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.layers = nn.Sequential(*(self.Layer(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class GroupedQueries(nn.Module):
    """Grouped-query attention. ``how``: ``repeat`` (repeat_interleave) or ``sdpa`` (enable_gqa)."""

    def __init__(self, how: str, width: int = 24, heads: int = 6, groups: int = 2, size: int = 8) -> None:
        super().__init__()
        self.how, self.heads, self.groups, self.size = how, heads, groups, size
        self.q, self.o = nn.Linear(width, heads * size), nn.Linear(heads * size, width)
        self.k, self.v = nn.Linear(width, groups * size), nn.Linear(width, groups * size)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.groups, self.size).transpose(1, 2)
        v = self.v(x).view(b, t, self.groups, self.size).transpose(1, 2)
        if self.how == "repeat":
            k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "sdpa")
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class WrittenAttention(nn.Module):
    """Attention written out. ``how``: ``matmul`` (fused qkv, softmax(QK^T)V) or ``einsum`` (separate projections)."""

    def __init__(self, how: str, width: int = 24, heads: int = 3, size: int = 8) -> None:
        super().__init__()
        self.how, self.heads, self.size = how, heads, size
        inner = heads * size
        self.qkv = nn.ModuleList(
            [nn.Linear(width, 3 * inner)] if how == "matmul" else [nn.Linear(width, inner) for _ in range(3)]
        )
        self.o = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.how == "matmul":
            q, k, v = self.qkv[0](x).reshape(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            y = torch.softmax(q @ k.transpose(-2, -1) * self.size**-0.5, -1) @ v
            return self.o(y.transpose(1, 2).reshape(b, t, -1))
        q, k, v = (p(x).view(b, t, self.heads, self.size) for p in self.qkv)
        weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q, k) * self.size**-0.5, -1)
        return self.o(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


class GatedFeedForward(nn.Module):
    """Gate and up projection in one weight, split in halves; RMS norm in front, residual around."""

    def __init__(self, width: int = 24, hidden: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class TransposedWeights(nn.Module):
    """GPT-2's way: weights [in, out] through ``addmm``, qkv by ``split``, causal attention."""

    def __init__(self, width: int = 24, heads: int = 3, hidden: int = 32) -> None:
        super().__init__()
        self.heads, self.width = heads, width

        def weight(i: int, o: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(i, o) / i**0.5)

        self.w_qkv, self.b_qkv = weight(width, 3 * width), nn.Parameter(torch.zeros(3 * width))
        self.w_o, self.b_o = weight(width, width), nn.Parameter(torch.zeros(width))
        self.w_1, self.b_1 = weight(width, hidden), nn.Parameter(torch.zeros(hidden))
        self.w_2, self.b_2 = weight(hidden, width), nn.Parameter(torch.zeros(width))

    @staticmethod
    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = self.project(x, self.w_qkv, self.b_qkv).split(self.width, 2)
        q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.project(y, self.w_o, self.b_o)
        return x + self.project(F.gelu(self.project(x, self.w_1, self.b_1)), self.w_2, self.b_2)


class Shuffle(nn.Module):
    """Concatenation, grouped conv with batch norm, channel shuffle, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.norm, self.last, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1).relu_()
        z = self.norm(self.grouped(y))
        n, c, h, w = z.shape
        z = z.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head((y + self.last(F.relu(z))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excite: 1x1, depthwise 3x3, gate, 1x1."""

    def __init__(self, width: int = 8, hidden: int = 24) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, hidden, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden, bias=False)
        self.squeeze, self.excite = nn.Conv2d(hidden, 8, 1), nn.Conv2d(8, hidden, 1)
        self.down, self.skip = nn.Conv2d(hidden, width, 1, bias=False), nn.Conv2d(width, width, 1, 2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.silu(self.norm2(self.depthwise(F.silu(self.norm1(self.up(x)), inplace=True))))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((self.norm3(self.down(y)) + self.skip(x)).mean((2, 3)))


class Tied(nn.Module):
    """Token embedding tied to the output projection, with a feed-forward in between."""

    def __init__(self, words: int = 40, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


class Rotary(nn.Module):
    """Attention with rotary positions computed from a buffer, inside a ``no_grad`` region."""

    def __init__(self, width: int = 24, heads: int = 3, size: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.o = nn.Linear(heads * size, width)
        self.register_buffer("inverse", 100.0 ** -(torch.arange(0, size, 2) / size), persistent=False)

    @torch.no_grad()
    def tables(self, t: int) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(t).float(), self.get_buffer("inverse"))
        both = torch.cat([angle, angle], -1)
        return both.cos(), both.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, self.heads, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        cos, sin = self.tables(t)

        def turn(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat([-second, first], -1) * sin

        y = F.scaled_dot_product_attention(turn(q), turn(k), v)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class GroupNormed(nn.Module):
    """Two convolutions with group norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.silu(self.norm(self.a(x))))))


class PixelDecoder(nn.Module):
    """A decoder: conv, pixel shuffle, transposed conv, skip connection by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 32, 3, padding=1)
        self.again, self.wide = nn.Conv2d(8 + 3, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.up(F.relu(self.down(x))), 2)
        return self.head(F.relu(self.wide(F.relu(self.again(torch.cat([y, x], 1))))))


class Layer(nn.Module):
    """Attention and a feed-forward part around one residual stream; ``norm``: pre, post or rms (pre)."""

    def __init__(self, norm: str, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm, self.heads = norm, heads
        self.norm1, self.norm2 = ((nn.RMSNorm if norm == "rms" else nn.LayerNorm)(width) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.gamma = nn.Parameter(torch.linspace(-0.5, 1.5, width))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).reshape(b, t, c))

    def feed(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(F.gelu(self.fc1(x))), 0.1, self.training)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm == "post":
            x = self.norm1(x + self.attend(x, mask))
            return self.norm2(x + self.feed(x))
        x = x + self.attend(self.norm1(x), mask)
        return x + self.feed(self.norm2(x)) * self.gamma


class Encoder(nn.Module):
    """Token ids and a padding mask -> mean hidden state."""

    def __init__(
        self, norm: str = "pre", width: int = 24, heads: int = 3, hidden: int = 32, depth: int = 2, bias: bool = True
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(norm, width, heads, hidden, bias) for _ in range(depth))
        self.last = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x, seen = self.embed(input_ids), attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, seen)
        weight = attention_mask[..., None].float()
        return {"embedding": (self.last(x) * weight).sum(1) / weight.sum(1)}


class ResidualConvolutions(nn.Module):
    """A residual block of convolutions with batch norm, stride and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.norm(self.b(F.relu(self.a(x))))).mean((2, 3)))


class Parallel(nn.Module):
    """Two branches that read the same norm and meet before the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.a1, self.a2, self.b1, self.b2 = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(x + (self.a2(F.gelu(self.a1(y))) + self.b2(F.gelu(self.b1(y)))))
