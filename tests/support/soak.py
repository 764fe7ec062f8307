"""Random small models and wishes, each from a seed; ``check`` compiles one and holds it against every law."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import BudgetInfeasible, FxpruneError, NothingToPrune
from fxprune.testing import relative_error
from support.laws import (
    TOLERANCE,
    analysed_of,
    cost_is_counted,
    counted_macs,
    empty_plan_is_identity,
    shapes_are_predicted,
)

WORDS = 40


class Attention(nn.Module):
    """Fused or separate projections, grouped queries, fused or written out, causal or not."""

    def __init__(
        self, width: int, heads: int, groups: int, size: int, how: str, fused: bool, bias: bool, causal: bool
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.how, self.causal = heads, groups, size, how, causal
        sizes = [heads * size, groups * size, groups * size]
        self.parts = sizes
        self.qkv = nn.ModuleList(
            [nn.Linear(width, sum(sizes), bias=bias)] if fused else [nn.Linear(width, s, bias=bias) for s in sizes]
        )
        self.out = nn.Linear(heads * size, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        flat = self.qkv[0](x).split(self.parts, -1) if len(self.qkv) == 1 else [p(x) for p in self.qkv]
        q, k, v = (
            z.view(b, t, n, self.size).transpose(1, 2)
            for z, n in zip(flat, (self.heads, self.groups, self.groups), strict=True)
        )
        if self.heads != self.groups:
            k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / self.size**0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """Two layers, or a gated pair."""

    def __init__(self, width: int, hidden: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(F.gelu(y) if self.gate is None else F.silu(self.gate(x)) * y)


class Layer(nn.Module):
    """Norm in front or behind, around attention and feed-forward."""

    def __init__(self, draw: random.Random, width: int, causal: bool) -> None:
        super().__init__()
        groups, bias = draw.choice([1, 2, 3, 4]), draw.random() < 0.7
        heads, norm = groups * draw.choice([1, 1, 2, 3]), draw.choice([nn.LayerNorm, nn.RMSNorm])
        self.attention = Attention(
            width,
            heads,
            groups,
            draw.choice([4, 6, 8]),
            draw.choice(["fused", "written"]),
            draw.random() < 0.5,
            bias,
            causal,
        )
        self.mlp = FeedForward(width, draw.randrange(9, 70), draw.random() < 0.4, bias)
        self.norms, self.first = nn.ModuleList([norm(width), norm(width)]), draw.random() < 0.6

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = x + part(norm(x)) if self.first else norm(x + part(x))
        return x


class Transformer(nn.Module):
    """Pictures in patches (class token or mean), or words."""

    def __init__(self, draw: random.Random, words: bool) -> None:
        super().__init__()
        width, self.words = draw.choice([16, 24, 30, 40]), words
        self.side = draw.choice([8, 12, 16, 24])
        count = (self.side // 4) ** 2
        self.embed = nn.Embedding(WORDS, width) if words else nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if not words and draw.random() < 0.6 else None
        self.position = nn.Parameter(torch.randn(1, count + (self.token is not None), width) * 0.2)
        self.layers = nn.ModuleList(
            Layer(draw, width, words and draw.random() < 0.5) for _ in range(draw.randrange(1, 5))
        )
        self.head = nn.Linear(width, draw.choice([WORDS if words else 7, 5]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.words else self.embed(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        if not self.words:
            x = x + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(x if self.words else x[:, 0] if self.token is not None else x.mean(1))


class Convolutions(nn.Module):
    """Residual and plain stages, with and without norm, grouped or depthwise."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width = draw.choice([8, 12, 16])
        self.stem, self.side, self.stages = nn.Conv2d(3, width, 3, 1, 1), draw.choice([8, 12, 16]), nn.ModuleList()
        self.residual = []
        for _ in range(draw.randrange(1, 4)):
            inner, groups = draw.choice([8, 12, 20, 24]), draw.choice([1, 1, 2, 4])
            depthwise = draw.random() < 0.3
            norm = nn.BatchNorm2d(inner) if draw.random() < 0.7 else nn.Identity()
            middle = nn.Conv2d(inner, inner, 3, 1, 1, groups=inner if depthwise else groups, bias=draw.random() < 0.5)
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(width, inner, 1), norm, nn.ReLU(), middle, nn.SiLU(), nn.Conv2d(inner, width, 1)
                )
            )
            self.residual.append(draw.random() < 0.6)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage, residual in zip(self.stages, self.residual, strict=True):
            x = x + stage(x) if residual else stage(x)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A model with random weights, what it takes, and what is asked of it."""

    model: nn.Module
    inputs: Any  # batch -> tensor
    options: dict[str, Any]


def case(seed: int) -> Case:
    """The case of a seed: the same on every machine."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind = draw.choice(["image", "image", "words", "conv"])
    model: Any = Convolutions(draw) if kind == "conv" else Transformer(draw, kind == "words")
    with torch.no_grad():  # as far from their initial values as trained ones
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    length = draw.randrange(3, 12)

    def inputs(batch: int) -> Tensor:
        if kind == "words":
            return torch.randint(0, WORDS, (batch, length))
        return torch.randn(batch, 3, model.side, model.side)

    options: dict[str, Any] = {
        draw.choice(["flops", "flops", "params"]): round(draw.uniform(0.3, 0.95), 2),
        "align": draw.choice([1, 1, 2, 4, 8]),
        "floor": draw.choice([0.0, 0.1, 0.3]),
        "seed": seed,
        "importance": draw.choice(["random", "l1", "l2"]),
    }
    if draw.random() < 0.35:
        options |= {
            "data": [inputs(6) for _ in range(4)],
            "recover": draw.choice(["none", "ridge", "auto", "bias"]),
            "importance": draw.choice(["fisher", "trajectory{probes=2,samples=8}", "activation", "obs"]),
        }
    if kind == "image" and "flops" in options and draw.random() < 0.3:
        options |= {
            "prune": draw.choice(["tokens", "heads,ffn,tokens"]),
            "tokens": draw.choice(["tome{", "prune{score=received-value,", "transform{"])
            + "schedule=constant,share=0.5}",
        }
    elif kind != "conv" and draw.random() < 0.2:
        options["prune"] = draw.choice(["ffn", "heads", "heads,ffn,qk,v"])
    return Case(model.eval(), inputs, options)


def refused_well(error: FxpruneError, folder: Path) -> None:
    """A refusal says what would mend it, and leaves nothing behind."""
    assert error.cure, error
    assert error.why, error
    assert not folder.exists(), "a refused request left something behind"


def check(seed: int, folder: Path) -> str:
    """Compile the case of ``seed`` into ``folder`` and hold it against the laws; returns what came of it: ``done``, or
    why there was nothing to do. Raises AssertionError for a broken law, and whatever fxprune should not raise."""
    one = case(seed)
    example = one.inputs(2)
    with torch.no_grad():
        before = one.model(example)
    try:
        made = fxprune.compile(one.model, example, out=folder, on_event=lambda _: None, **one.options)
    except (BudgetInfeasible, NothingToPrune) as error:
        refused_well(error, folder)
        return type(error).__name__
    with torch.no_grad():
        assert torch.equal(one.model(example), before), "the caller's model was changed"
    report, metric = made.report, next(m for m in ("flops", "params") if m in one.options)
    assert report["cost"]["ratio"][metric] <= one.options[metric]
    assert report["masked"]["max_rel"] <= TOLERANCE
    back = fxprune.load(folder)
    for batch in (1, 3):
        x = one.inputs(batch)
        with torch.no_grad():
            want, got = made.module(x), back(x)
            assert torch.equal(got, back(x)), "a second call differs"
        assert got.shape == one.model(x).shape
        assert relative_error([got], [want]) <= 1e-6, "saving changed the outputs"
    if not (made.plan.tokens and not made.plan.tokens.empty):
        assert (
            abs(counted_macs(made.program) - report["cost"]["compressed"]["flops"])
            <= 1e-6 * report["cost"]["dense"]["flops"]
        )
    again = fxprune.apply(one.model, made.plan, example, on_event=lambda _: None)
    assert {k: v.shape for k, v in again.program.tensors.items()} == {
        k: v.shape for k, v in made.program.tensors.items()
    }
    if seed % 5 == 0:
        program = analysed_of(one.model, (example,))
        shapes_are_predicted(program)
        empty_plan_is_identity(program)
        plain = made.plan.tokens is None and not {"qk", "v"} & {c.kind for c in made.plan.choices.values()}
        if plain and one.options.get("recover", "none") == "none":
            cost_is_counted(program, made.plan, made.program)
    return "done"
