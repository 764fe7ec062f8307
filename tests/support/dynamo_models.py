"""Tiny models that dynamo makes one graph of, or several, and how they are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EAGER: dict[str, Any] = {"inner": "eager"}
L2: dict[str, Any] = {"flops": 0.5, "importance": "l2", **EAGER}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mlp(nn.Module):
    """Buffers, a plain tensor attribute, and an output that reads both. [batch, 8] -> [batch, 4]"""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.shift = torch.tensor([0.5, 0.0, -0.5, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale + self.shift


class Plain(nn.Module):
    """Nothing that reads the training flag. [batch, 8] -> [batch, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tied(nn.Module):
    """Ids to logits with the embedding as classifier. [batch, n] -> [batch, n, 20]"""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.ffn = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.ffn(x))


class Broken(nn.Module):
    """Two feed-forward parts with a graph break between them, inside a submodule's frame. [batch, 8] -> [batch, 8]"""

    def __init__(self) -> None:
        super().__init__()
        self.first = Breaking()
        self.second = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.across = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.across[0](x + self.ffn(x))
        torch._dynamo.graph_break()
        return self.across[1](x)


def run(model: nn.Module, *args: Any, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """(compiled model, output of its first call), without gradients."""
    compiled = torch.compile(model, backend="fxprune", options=options, **more)
    with torch.no_grad():
        return compiled, compiled(*args)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.ffn(x) + self.calls


class Branching(nn.Module):
    """One graph per flag: with another head, or with the features that the feed-forward part works on."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.more = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, more: bool = False, features: bool = False) -> Any:
        if features:
            return self.one[1](self.one[0](x))
        y = self.one(x)
        return self.more(y) if more else y
