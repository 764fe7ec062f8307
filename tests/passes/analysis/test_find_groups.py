"""What is found in every model of the zoo, with no hints: kinds, names, reasons, floors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import zoo
from support.laws import analysed
from torch import Tensor, nn

from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.group import Kind
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes

# Counted from the configurations in zoo.py: two blocks each give two groups of heads and two of neurons; a gated or
# pooled classifier gives one more FFN, a bias network (Swin v2) one per block; one-head stages give no heads.
FOUND = {
    "multihead_vit": "ffn:2 head:2 qkv:2 width:1",
    "gqa_repeat": "kv:1 qk:1 query:1 v:1",
    "gqa_sdpa": "kv:1 qk:1 query:1 v:1",
    "attention_matmul": "head:1 qkv:1",
    "attention_einsum": "head:1 qk:1 v:1",
    "gated_ffn": "ffn:1",
    "transposed_weights": "ffn:1 head:1 qk:1 v:1",
    "shuffle": "channel:4",
    "depthwise": "channel:3 ffn:1",
    "tied": "ffn:1 width:1",
    "rotary": "head:1 qk:1 v:1",
    "group_norm": "channel:2 width:1",
    "pixel_decoder": "channel:4",
    "vit": "ffn:2 head:2 qkv:2 width:1",
    "deit_distilled": "ffn:2 head:2 qkv:2 width:1",
    "deit3": "ffn:2 head:2 qkv:2 width:1",
    "dinov2": "ffn:2 head:2 qkv:2 width:1",
    "beit": "ffn:2 head:2 qkv:2 width:1",
    "eva02": "ffn:2 head:2 qkv:2 width:1",
    "cait": "ffn:4 head:6 qk:2 qkv:2 v:2 width:1",
    "mixer": "ffn:4 width:1",
    "swin": "ffn:4 head:4 qkv:4 width:2",
    "swinv2": "ffn:8 head:4 qkv:4 width:2",
    "pvt_v2": "channel:3 ffn:4 head:3 qkv:4 width:4",
    "mobilevit": "channel:22 ffn:15 head:6 qkv:6 width:3",
    "convnext": "ffn:5 width:4",
    "resnet18": "channel:13",
    "resnet50": "channel:15",
    "efficientnet": "channel:11 ffn:2",
    "vgg_bn": "channel:5 ffn:1",
    "maxvit": "channel:3 ffn:6 head:4 qk:4 v:4 width:2",
    "bert": "ffn:3 head:2 qk:2 v:2 width:1",
    "roberta": "ffn:2 head:2 qk:2 v:2 width:1",
    "distilbert": "ffn:3 head:2 qk:2 v:2 width:1",
    "electra": "ffn:4 head:2 qk:2 v:2 width:1",
    "deberta_v2": "ffn:3 head:2 qk:2 v:2 width:1",
    "gpt2": "ffn:2 head:2 qk:2 v:2 width:1",
    "opt": "ffn:2 head:2 qk:2 v:2 width:1",
    "llama": "ffn:2 kv:2 qk:2 query:2 v:2 width:1",
    "qwen2": "ffn:2 kv:2 qk:2 query:2 v:2 width:1",
    "mistral": "ffn:2 kv:2 qk:2 query:2 v:2 width:1",
    "modernbert": "ffn:3 head:2 qkv:2 width:1",
    "t5_encoder": "ffn:2 head:2 qk:2 v:2",
    "hf_vit": "ffn:2 head:2 qk:2 v:2 width:1",
    "hf_swin": "ffn:4 head:4 qk:4 v:4 width:2",
    "segformer": "channel:4 ffn:8 head:3 qk:4 v:4 width:4",
    "mask2former": "channel:1 ffn:10 head:8 qk:7 v:7 width:3",
    "whisper_encoder": "channel:1 ffn:2 head:2 qk:2 v:2",
    "clip": "ffn:4 head:4 qk:4 v:4",
}


def live(program: Program) -> dict[str, int]:
    counts = Counter(str(g.kind) for g in program.need("groups") if g.prunable)
    return dict(sorted(counts.items()))


@zoo.part("groups")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_groups_of_the_zoo(name: str) -> None:
    want = {k: int(n) for k, n in (word.split(":") for word in FOUND[name].split())}
    assert live(analysed(name)) == want


def test_the_table_covers_the_zoo() -> None:
    assert FOUND.keys() == zoo.MODELS.keys()


def find(module: nn.Module, *inputs: Tensor, **options: object) -> Program:
    program = capture(module, inputs)
    return Pipeline((PropagateAxes(), FindGroups(**options))).run(program)  # type: ignore[arg-type]


class FeedForward(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 100) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def test_names_are_module_and_kind_and_unique() -> None:
    names = [g.name for g in analysed("vit").need("groups")]
    assert "blocks.0.attn.qkv:head" in names
    assert "blocks.1.mlp.fc1:ffn" in names
    assert len(names) == len(set(names))


def test_grouped_queries_give_whole_kv_groups() -> None:
    groups = {g.name: g for g in analysed("llama").need("groups")}
    kv = groups["model.layers.0.self_attn.q_proj:kv"]
    assert (kv.size, kv.kind) == (2, Kind.KV)
    reached = {s.parameter.split(".")[-2] for s in kv.slots}
    assert reached == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert groups["model.layers.0.self_attn.q_proj:query"].size == 3


def test_layers_that_share_a_bias_table_have_heads_of_their_own() -> None:
    heads = [g for g in analysed("t5_encoder").need("groups") if g.kind == Kind.HEAD]
    assert [g.prunable for g in heads] == [True, True]
    assert not {s.parameter for s in heads[0].slots} & {s.parameter for s in heads[1].slots}


def test_norms_make_a_cut_inexact_and_nothing_else_does() -> None:
    for group in analysed("vit").need("groups"):
        if group.prunable:
            assert group.exact == (group.kind != Kind.WIDTH)


class SelectiveKernel(nn.Module):
    """Two branches weighed per channel by a softmax over the branches, as in SK-Net and ResNeSt: no attention."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, channels, 5, padding=2)
        self.weigh, self.last = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], 1)
        weights = self.weigh(both.sum(1).mean((2, 3), keepdim=True)).view(x.shape[0], 2, -1, 1, 1).softmax(1)
        return self.last((both * weights).sum(1))


class LinearAttention(nn.Module):
    """softmax(k) over tokens, then q (k^T v): the width beside the softmax is summed over, yet it is no head."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj((q @ (k.softmax(2).transpose(-1, -2) @ v)).transpose(1, 2).reshape(batch, tokens, width))


def test_a_softmax_over_something_else_makes_no_heads() -> None:
    assert live(find(SelectiveKernel(), torch.randn(2, 3, 8, 8))) == {"channel": 1}
    assert live(find(LinearAttention(), torch.randn(2, 5, 24))) == {"head": 1, "qkv": 1}


def test_frozen_groups_say_why_and_where() -> None:
    reasons = {g.name: g.frozen for g in analysed("vit").need("groups") if g.frozen}
    assert reasons["head:other"] == "graph output at output"
    assert reasons["blocks.0.attn.qkv:other"].startswith("unbind at unbind")


def test_macs_per_element_are_what_one_element_costs() -> None:
    """An FFN neuron costs 2 T D, a head 4 T D d + 2 T^2 d (Kwon et al. 2022, section 3; T tokens, width D, head d)."""
    module, _, _ = zoo.build("vit")
    groups = {g.name: g for g in analysed("vit").need("groups")}
    width = module.embed_dim
    tokens, dim = module.pos_embed.shape[1], width // module.blocks[0].attn.num_heads
    assert groups["blocks.0.mlp.fc1:ffn"].macs == 2 * tokens * width
    assert groups["blocks.0.attn.qkv:head"].macs == 4 * tokens * width * dim + 2 * tokens**2 * dim


@pytest.mark.parametrize(
    ("align", "floor", "levels"),
    [
        (8, 0.1, [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 100]),
        (32, 0.5, [64, 96, 100]),
        (64, 0.0, list(range(1, 101))),  # too short for two steps of 64: cut one by one
    ],
)
def test_granularity_and_floor(align: int, floor: float, levels: list[int]) -> None:
    program = find(FeedForward(), torch.randn(2, 8), align=align, floor=floor)
    (group,) = (g for g in program.need("groups") if g.prunable)
    assert group.levels() == levels


def test_allow_empty_only_where_a_bias_can_stand_in() -> None:
    ffn = find(FeedForward(), torch.randn(2, 8), allow_empty=True)
    assert [g.floor for g in ffn.need("groups") if g.prunable] == [0]
    convs = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3))
    cnn = find(convs, torch.randn(2, 3, 8, 8), allow_empty=True)
    assert [g.floor for g in cnn.need("groups") if g.prunable] == [8]


def test_user_freezes_by_pattern() -> None:
    program = find(FeedForward(), torch.randn(2, 8), freeze=("up.*",))
    assert live(program) == {}
    assert "asked to freeze 'up.*'" in {g.frozen for g in program.need("groups")}


def test_a_pattern_that_matches_nothing_is_a_typo() -> None:
    with pytest.raises(OptionError, match=r"'upp\.\*' matches no group and no parameter"):
        find(FeedForward(), torch.randn(2, 8), freeze=("up.*", "upp.*"))


@pytest.mark.parametrize("options", [{"align": 0}, {"floor": 1.5}, {"floor": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        FindGroups(**options)  # type: ignore[arg-type]


def test_an_unused_parameter_is_no_group() -> None:
    class Unused(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.zeros(33))

    program = find(Unused(), torch.randn(2, 8))
    assert all("spare" not in s.parameter for g in program.need("groups") for s in g.slots)


def test_residual_channels_are_one_group() -> None:
    """Pain: coupled layers pruned apart. All producers of a residual stream share one group."""
    groups = [g for g in analysed("resnet18").need("groups") if g.kind == Kind.CHANNEL and g.prunable]
    stream = next(g for g in groups if any(s.parameter == "layer1.0.conv2.weight" and s.position == 0 for s in g.slots))
    assert ("layer1.1.conv2.weight", 0) in {(s.parameter, s.position) for s in stream.slots}


class Windows(nn.Module):
    """Attention in windows, then patches of every second position side by side, as Swin has them."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.out, self.down, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(32, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n, per = self.window, self.window**2
        y = x.view(b, h // n, n, w // n, n, c).transpose(2, 3).reshape(-1, per, c)
        q, k, v = self.qkv(y).view(y.shape[0], per, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, per, c)
        x = x + self.out(y).view(b, h // n, w // n, n, n, c).transpose(2, 3).reshape(b, h, w, c)
        return self.head(self.down(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)).mean((1, 2)))


@pytest.mark.parametrize("window", [2, 4])
def test_heads_are_heads_where_the_positions_they_look_at_are_taken_apart(window: int) -> None:
    """In windows of two, every second position leaves one of each: the keys are a sum of single elements then."""
    program = Pipeline((PropagateAxes(), FindGroups(align=1))).run(capture(Windows(window), (torch.randn(2, 8, 8, 8),)))
    kinds = {g.name: g.kind for g in program.need("groups") if g.prunable and g.name.startswith("qkv")}
    assert kinds == {"qkv:head": Kind.HEAD, "qkv:qkv": Kind.QKV}
