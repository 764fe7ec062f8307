"""Small models in the idioms that people bring: each has neurons to cut, and something that trips whoever assumes.

``MODELS``: name -> what makes (module, positional inputs, keyword inputs). Sizes are small, weights random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, WORDS, LENGTH = 16, 64, 40, 12
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Body(nn.Module):
    """A feed-forward on its residual: what is cut in most of these."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, H), nn.Linear(H, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def features() -> Tensor:
    return torch.randn(3, LENGTH, D)


def ids() -> Tensor:
    return torch.randint(1, WORDS, (3, LENGTH))


def picture() -> Tensor:
    return torch.randn(3, 3, 16, 16)


class Of(nn.Module):
    """A module of a function of (itself, inputs): idioms in a few lines."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.function = function
        self.body = Body()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def of(function: Callable[..., Any], x: Callable[[], Any] = features, **children: Callable[[], Any]) -> Any:
    return lambda: (Of(function, **{k: make() for k, make in children.items()}), (x(),), {})


# --- state of a module's own ---------------------------------------------------------------------------------------


class GridAtFirstCall(nn.Module):
    """Coordinates that are made once and kept (RoPE of vision, anchors)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(34, 32, 3, padding=1), nn.Linear(32, 4)
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.grid is None:
            rows, columns = torch.linspace(0, 1, x.shape[-2]), torch.linspace(0, 1, x.shape[-1])
            self.grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
        x = torch.cat([x, self.grid.expand(x.shape[0], -1, -1, -1)], 1)
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


class PositionsThatGrow(nn.Module):
    """A table of positions that is made anew when a longer text comes."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            angles = torch.arange(x.shape[1])[:, None] / 10 ** torch.linspace(0, 3, D // 2)
            self.table = torch.cat([angles.sin(), angles.cos()], -1)
        return self.body(x + self.table[: x.shape[1]])


class CausalMask(nn.Module):
    """Attention written out, with a mask that is a buffer of the longest length."""

    mask: Tensor

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out, self.body = heads, nn.Linear(D, 3 * D), nn.Linear(D, D), Body()
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.size()
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(D, -1))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return self.body(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, D)))


class ModeFlag(nn.Module):
    """Auxiliary outputs in training form, and a flag of its own that ``deploy`` sets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary, self.head, self.fused = Body(), nn.Linear(D, 2), nn.Linear(D, 3), False
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        y = self.dropout(self.body(x))
        if self.training:
            return self.head(y), self.auxiliary(y)
        return self.head(y * 2 if self.fused else y)


class WritesIntoItsDict(nn.Module):
    """As modules of sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(WORDS, D), Body()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = self.body(self.words(features["input_ids"]))
        mask = features["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        features.update({"tokens": tokens, "sentence": (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)})
        return features


# --- inputs and outputs --------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Inputs by name, some of them optional, one of them a number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.body, self.head = (
            nn.Embedding(WORDS, D),
            nn.Embedding(2, D),
            Body(),
            nn.Linear(D, 3),
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        x = self.words(input_ids)
        if token_type_ids is not None:
            x = x + self.kinds(token_type_ids)
        x = self.body(x) * scale
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return self.head((x * weights.unsqueeze(-1)).sum(1))


class PassesOn(nn.Module):
    """A wrapper that knows nothing of what it wraps (peft, accelerate)."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    cache: Any = None


class Pair(NamedTuple):
    logits: Tensor
    places: Tensor


class TwoStreams(nn.Module):
    """A text and a picture of different counts, one score for each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text, self.see, self.picture = nn.Embedding(WORDS, D), Body(), nn.Conv2d(3, D, 4, 4), Body()

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        text = self.text(self.words(input_ids)).mean(1)
        seen = self.picture(self.see(pixel_values).flatten(2).transpose(1, 2)).mean(1)
        return F.normalize(text, dim=-1) @ F.normalize(seen, dim=-1).t()


# --- shapes --------------------------------------------------------------------------------------------------------


class ClassToken(nn.Module):
    """A token expanded by ``len(x)``, and packed ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.randn(1, 1, D))
        self.norm, self.attention = nn.LayerNorm(D), nn.MultiheadAttention(D, 4, batch_first=True)
        self.body, self.head = Body(), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y = self.norm(x)
        return self.head(self.body(x + self.attention(y, y, y, need_weights=False)[0])[:, 0])


class Windows(nn.Module):
    """Feed-forwards on windows of 4x4, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.body, self.head = nn.Conv2d(3, D, 2, 2), Body(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = self.body(x).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head(x.mean((1, 2)))


class Strided(nn.Module):
    """A length that is divided: a strided convolution, every other place, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two, self.head = nn.Conv1d(D, D, 3, 2, 1), Body(), Body(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2))
        return self.head(self.two(x[:, ::2]))


class Detector(nn.Module):
    """What is above a threshold: as many places as there are, two indexings with one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())
        self.out = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.out(self.net(x)).flatten(2).transpose(1, 2).flatten(0, 1)
        scores = y[:, 4].sigmoid()
        keep = scores > 0.5
        return y[keep], scores[keep]


class GroupsOfTheBatch(nn.Module):
    """A kernel for each sample: the batch is folded into the groups of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1))
        self.mix, self.kernel = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1)
        self.tail = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        kernel = self.kernel[None] * self.mix(y.mean((2, 3))).sigmoid().view(b, 1, c, 1, 1)
        y = F.conv2d(y.reshape(1, b * c, h, w), kernel.reshape(b * c, c, 3, 3), padding=1, groups=b)
        return self.tail(y.view(b, c, h, w))


class TemporalShift(nn.Module):
    """Channels of neighbouring frames, written into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :-1, :4] = x[:, 1:, :4]
        out[:, 1:, 4:8] = x[:, :-1, 4:8]
        out[:, :, 8:] = x[:, :, 8:]
        return self.head(self.body(out))


# --- weights -------------------------------------------------------------------------------------------------------


class TiedWords(nn.Module):
    """The table of words is the classifier as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(WORDS, D), Body(), nn.Linear(D, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x)))


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 8))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return (self.encoder(one) * self.encoder(two)).sum(-1)


class Normalised(nn.Module):
    """Weight norm as a parametrisation, and a spectral one that does not move when evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(D, H))
        self.b, self.head = nn.Linear(H, D), nn.utils.parametrizations.spectral_norm(nn.Linear(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(torch.relu(self.a(x))))


class Response(nn.Module):
    """Global response normalisation between two pointwise layers (ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, D, 4, 4), nn.Linear(D, H), nn.Linear(H, D)
        self.gamma, self.beta, self.head = nn.Parameter(torch.rand(H)), nn.Parameter(torch.rand(H)), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(x))
        length = y.norm(dim=(1, 2), keepdim=True)
        y = self.gamma * (y * length / (length.mean(-1, keepdim=True) + 1e-6)) + self.beta + y
        return self.head((x + self.down(y)).mean((1, 2)))


class LowRank(nn.Module):
    """A frozen layer with an update of rank two beside it (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H).requires_grad_(False), nn.Linear(H, D).requires_grad_(False)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x) + self.b(self.a(x))))


class Gated(nn.Module):
    """One layer for gate and value, taken apart by ``chunk``; heads that share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * H, bias=False), nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def small_cnn() -> nn.Sequential:
    layers = (
        nn.Sequential(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b, s in ((3, 16, 1), (16, 32, 2), (32, 32, 2))
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def wrapped(model: Callable[[], nn.Module], x: Callable[[], Any]) -> Callable[[], Made]:
    return lambda: (model(), (x(),), {})


def by_name(model: Callable[[], nn.Module], **given: Callable[[], Any]) -> Callable[[], Made]:
    return lambda: (model(), (), {name: make() for name, make in given.items()})


def mask() -> Tensor:
    return torch.ones(3, LENGTH, dtype=torch.long)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, H, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(D, 3))


def half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype)


MODELS: dict[str, Callable[[], Made]] = {
    "grid at first call": wrapped(GridAtFirstCall, picture),
    "positions that grow": wrapped(PositionsThatGrow, features),
    "causal mask in a buffer": wrapped(CausalMask, features),
    "mode flag": wrapped(ModeFlag, features),
    "writes into its dict": lambda: (WritesIntoItsDict(), ({"input_ids": ids(), "attention_mask": mask()},), {}),
    "optional inputs left away": wrapped(Named, ids),
    "optional inputs by name": by_name(Named, input_ids=ids, token_type_ids=lambda: ids() % 2),
    "a number beside tensors": lambda: (Named(), (ids(), mask()), {"scale": 0.5}),
    "passes everything on": by_name(lambda: PassesOn(Named()), input_ids=ids, attention_mask=mask),
    "wrapper in a wrapper": wrapped(lambda: PassesOn(nn.DataParallel(CausalMask())), features),
    "a list of tensors": of(lambda m, xs: m.body(xs[0] + xs[1]), lambda: [features(), features()]),
    "outputs in a dict": of(lambda m, x: {"scores": m.body(x).mean(-1), "hidden": m.body(x)}),
    "outputs in a dataclass": of(lambda m, x: Answer(m.body(x))),
    "outputs in a named tuple": of(lambda m, x: Pair(m.body(x), x.mean(-1))),
    "None among the outputs": of(lambda m, x: (m.body(x), None, [x[:, 0], None])),
    "one input back as it came": of(lambda m, x: (m.body(x), x)),
    "texts and pictures": by_name(TwoStreams, input_ids=ids, pixel_values=picture),
    "class token by len": wrapped(ClassToken, picture),
    "torch's own encoder": wrapped(encoder, features),
    "windows": wrapped(Windows, picture),
    "strided length": wrapped(Strided, features),
    "chunks of a length": of(lambda m, x: torch.cat([m.body(part) for part in x.split(4, 1)], 1)),
    "padded to a multiple": of(lambda m, x: m.body(F.pad(x, (0, 0, 0, -x.shape[1] % 8)))[:, : x.shape[1]]),
    "two boolean indexings": wrapped(Detector, picture),
    "a kernel for each sample": wrapped(GroupsOfTheBatch, picture),
    "slices written into zeros": wrapped(TemporalShift, features),
    "tied words": wrapped(TiedWords, ids),
    "one encoder called twice": lambda: (Siamese(), (features(), features()), {}),
    "one block called three times": of(lambda m, x: m.body(m.body(m.body(x)))),
    "parametrised weights": wrapped(Normalised, features),
    "response normalisation": wrapped(Response, picture),
    "low-rank update": wrapped(LowRank, features),
    "gated, shared keys": wrapped(Gated, features),
    "batch norms, in place": wrapped(small_cnn, picture),
    "half precision": lambda: (half(CausalMask(), torch.bfloat16), (features().bfloat16(),), {}),
    "double precision": lambda: (half(small_cnn(), torch.float64), (picture().double(),), {}),
    "einsum and einops-like views": of(
        lambda m, x: m.body(torch.einsum("bnd,de->bne", x, m.mix) + x), mix=lambda: nn.Parameter(torch.randn(D, D))
    ),
    "loops over a list of modules": of(
        lambda m, x: sum(layer(x) for layer in m.layers), layers=lambda: nn.ModuleList(Body() for _ in range(2))
    ),
    "a copy of a trained block": of(lambda m, x: m.other(m.body(x)), other=lambda: copy.deepcopy(Body())),
    "detached and under no_grad": of(lambda m, x: m.body(x.detach()) + torch.no_grad()(m.frozen)(x), frozen=Body),
}
