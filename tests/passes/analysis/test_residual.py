"""A residual stream is of kind width, whatever shape its elements have in one reader."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.laws import analysed, analysed_of
from torch import Tensor, nn

from fxprune.ir.program import Program
from fxprune.passes.analysis.residual import residual_streams


class Block(nn.Module):
    """Attention whose heads go straight into the stream, or through a projection."""

    def __init__(self, projected: bool, normed: bool, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width) if normed else nn.Identity()
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width) if projected else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w))
        return x + self.mlp(self.norm(x))


class Gated(nn.Module):
    """The stream is viewed as heads to make a gate of each (WavLM)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.gate = heads, nn.Linear(width // heads, 1)
        self.block = Block(True, True, width, heads)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        b, n, w = x.shape
        gate = self.gate(x.view(b, n, self.heads, -1)).sigmoid().permute(0, 2, 1, 3)
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) * gate, -1) @ v
        return self.block(x + self.o(y.transpose(1, 2).reshape(b, n, w)))


def kinds(program: Program) -> dict[str, int]:
    """Kind -> how many live groups."""
    live = [str(g.kind) for g in program.need("groups") if g.prunable]
    return {kind: live.count(kind) for kind in sorted(set(live))}


def net(*blocks: nn.Module) -> Program:
    model = nn.Sequential(nn.Linear(12, 32), *blocks, nn.Linear(32, 5))
    return analysed_of(model.eval(), (torch.randn(2, 6, 12),))


@pytest.mark.parametrize("normed", [True, False])
def test_heads_that_are_the_stream_are_width(normed: bool) -> None:
    program = net(Block(False, normed), Block(False, normed))
    assert kinds(program) == {"ffn": 2, "width": 2}  # heads and their width are the two factors of the stream
    stream = {g.axis for g in program.need("groups") if str(g.kind) == "width"}
    assert stream <= residual_streams(program)


def test_heads_behind_a_projection_are_heads() -> None:
    program = net(Block(True, True), Block(True, True))
    assert kinds(program) == {"ffn": 2, "head": 2, "qkv": 2, "width": 1}


def test_a_reader_that_views_the_stream_as_heads_makes_none_of_it() -> None:
    found = kinds(net(Gated()))
    assert "width" in found
    for group in net(Gated()).need("groups"):
        assert str(group.kind) not in ("head", "kv") or not any(s.parameter.startswith("0.") for s in group.slots)


@pytest.mark.parametrize("name", ["t5_encoder", "bert", "llama", "deberta_v2"])
def test_a_bias_that_all_layers_add_to_their_scores_is_no_stream(name: str) -> None:
    """Scores plus bias, softmax, projection, and the next scores plus the same bias: heads all the same."""
    program = analysed(name)
    streams = residual_streams(program)
    heads = [g for g in program.need("groups") if str(g.kind) in ("head", "kv", "query") and g.prunable]
    assert heads
    assert not {g.axis for g in heads} & streams
    assert {g.axis for g in program.need("groups") if str(g.kind) == "width" and g.prunable} <= streams


def test_layers_that_share_their_weights_keep_their_kinds() -> None:
    one = Block(True, True)
    assert kinds(net(one, one)) == {"ffn": 1, "head": 1, "qkv": 1, "width": 1}
