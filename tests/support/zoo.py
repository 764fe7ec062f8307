"""Tiny models with random weights: ``build(name)`` -> (module, args, kwargs), each exported in about a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.blocks import (
    Depthwise,
    GatedFeedForward,
    GroupedQueries,
    GroupNormed,
    PixelDecoder,
    Rotary,
    Shuffle,
    Tied,
    TransposedWeights,
    WrittenAttention,
)
from support.families import FAMILIES
from support.family import Built


def _block(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    return lambda: (make(), (torch.randn(*shape),), {})


BLOCKS: dict[str, Callable[[], Built]] = {
    "multihead_vit": FAMILIES["multihead_vit"].tiny,
    "gqa_repeat": _block(lambda: GroupedQueries("repeat"), 2, 5, 24),
    "gqa_sdpa": _block(lambda: GroupedQueries("sdpa"), 2, 5, 24),
    "attention_matmul": _block(lambda: WrittenAttention("matmul"), 2, 5, 24),
    "attention_einsum": _block(lambda: WrittenAttention("einsum"), 2, 5, 24),
    "gated_ffn": _block(GatedFeedForward, 2, 5, 24),
    "transposed_weights": _block(TransposedWeights, 2, 5, 24),
    "shuffle": _block(Shuffle, 2, 3, 8, 8),
    "depthwise": _block(Depthwise, 2, 3, 8, 8),
    "tied": lambda: (Tied(), (torch.randint(0, 40, (2, 6)),), {}),
    "rotary": _block(Rotary, 2, 5, 24),
    "group_norm": _block(GroupNormed, 2, 3, 8, 8),
    "pixel_decoder": _block(PixelDecoder, 2, 3, 8, 8),
}
MODELS: dict[str, Callable[[], Built]] = {**BLOCKS, **{name: one.tiny for name, one in FAMILIES.items()}}
PARTS = {"laws": 9, "groups": 20, "capture": 20}  # models that a test takes by default; together they take all


def part(test: str) -> pytest.MarkDecorator:
    """The marker of the ``test`` whose cases are the models: its own part of them."""
    return pytest.mark.drawn(PARTS[test], first=sum(n for name, n in PARTS.items() if name < test))


def build(name: str, seed: int = 0) -> Built:
    """A scrambled tiny model in eval mode with example inputs (batch 2; token models: length 9)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, args, kwargs = MODELS[name]()
    return scramble(module, seed).eval(), args, kwargs


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make every weight, bias, position table and statistic large enough that a mistake shows; outputs stay finite.

    Matrices get standard deviation 1 / sqrt(fan in), norm weights and LayerScale 1 +- 0.3, biases 0.5, running
    variances 0.5 to 1.5. Other buffers (rotary frequencies, index tables) keep their values. Changes ``module``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)

    with torch.no_grad():
        for name, p in module.named_parameters():
            if not p.is_floating_point():
                continue
            if p.dim() == 0 or "logit_scale" in name:
                p.add_(0.1 * normal(p))
            elif p.dim() == 1:
                p.copy_(0.5 * normal(p) if name.endswith("bias") else 1 + 0.3 * normal(p))
            elif p.shape[0] == 1 or "embed" in name or "table" in name:
                p.copy_(0.5 * normal(p))
            else:
                p.copy_(normal(p) * (p.shape[0] / p.numel()) ** 0.5)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.5 * normal(b))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    return module


def other_inputs(
    args: Sequence[Any], kwargs: Mapping[str, Any], batch: int, length: int | None = None, seed: int = 1
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the same kinds with another batch size, and another length for 2-D tensors of integers."""
    generator = torch.Generator().manual_seed(seed)

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        shape = (batch, *t.shape[1:])
        if t.is_floating_point():
            return torch.randn(shape, generator=generator)
        if t.dim() == 2 and length is not None:
            shape = (batch, length)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(t.dtype)

    return tuple(map(other, args)), {k: other(v) for k, v in kwargs.items()}
