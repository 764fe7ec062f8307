"""Token sites of real architectures, at small sizes: where tokens go, what is frozen and why, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.laws import counted_macs
from support.runs import opened_run
from torch import Tensor, nn

from fxprune import CompressionPlan, Program
from fxprune.driver.run import find_groups
from fxprune.ir.cost import CostModel
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, TokenPlan
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.merge_tokens import MergeTokens
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.process.libraries import survive_torchvision
from fxprune.request.options import Limits
from fxprune.testing import masking_error, run_flat

Made = tuple[nn.Module, Tensor]


def from_timm(name: str, **sizes: Any) -> Callable[[], Made]:
    def make() -> Made:
        survive_torchvision()
        import timm

        side = sizes.get("img_size", 64)
        model = timm.create_model(name, num_classes=5, **{"img_size": 64, "embed_dim": 48, "num_heads": 3, **sizes})
        return model.eval(), torch.randn(2, 3, side, side)

    return make


def from_transformers(name: str, **sizes: Any) -> Callable[[], Made]:
    def make() -> Made:
        survive_torchvision()
        import transformers

        stem = name.partition("For")[0]
        config = getattr(transformers, f"{stem}Config")(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=64,
            patch_size=16,
            num_labels=5,
            **({"intermediate_size": 96} if stem != "Dinov2" else {}),
            **sizes,
        )
        return getattr(transformers, name)(config).eval(), torch.randn(2, 3, 64, 64)

    return make


USABLE = {
    "vit": (from_timm("vit_tiny_patch16_224", depth=2), 17, 1),
    "vit gap": (from_timm("vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg", fc_norm=False), 16, 0),
    "vit attention pool": (from_timm("vit_base_patch16_siglip_224", depth=2), 16, 0),
    "deit": (from_timm("deit_tiny_patch16_224", depth=2), 17, 1),
    "deit distilled": (from_timm("deit_tiny_distilled_patch16_224", depth=2), 18, 2),
    "deit3": (from_timm("deit3_small_patch16_224", depth=2), 17, 1),
    "dinov2": (from_timm("vit_small_patch14_dinov2", depth=2, img_size=56), 17, 1),
    "dinov2 registers": (from_timm("vit_small_patch14_reg4_dinov2", depth=2, img_size=56), 21, 5),
    "cait": (from_timm("cait_xxs24_224", depth=2, depth_token_only=1), 16, 0),
    "hf vit": (from_transformers("ViTForImageClassification"), 17, 1),
    "hf deit": (from_transformers("DeiTForImageClassification"), 18, 2),
    "hf dinov2": (from_transformers("Dinov2ForImageClassification"), 17, 1),
}
FROZEN = {
    "swin": (
        from_timm("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(3, 3), window_size=4),
        "windows|part of the tokens|other tokens",
    ),
    "beit": (from_timm("beit_base_patch16_224", depth=3), "holds all tokens as they stood"),
    "rope": (from_timm("eva02_tiny_patch14_224", depth=3, img_size=56), "holds all tokens as they stood"),
}


def found(make: Callable[[], Made]) -> tuple[Program, Tensor]:
    model, images = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return find_groups(opened_run(model, images, limits=Limits(align=1)), tokens=True).program, images


@pytest.mark.drawn(4)
@pytest.mark.parametrize("name", USABLE)
def test_tokens_go_heads_and_neurons_go_and_the_cost_is_counted(name: str) -> None:
    make, tokens, protected = USABLE[name]
    program, images = found(make)
    flow = program.need("tokens")
    assert [(s.tokens, s.protected, s.frozen) for s in flow.sites[:2]] == [(tokens, protected, "")] * 2
    assert all(s.key for s in flow.usable)
    removed = {s.name: r for s, r in zip(flow.usable, (5, 3), strict=False)}
    dense = program.but(plan=CompressionPlan(TokenPlan("tome", removed).choices()))
    small = Pipeline(
        (MergeTokens(), PropagateAxes(), FindGroups(align=1)), start=("axes", "groups", "tokens", "plan")
    ).run(dense)
    groups = {g.name: g for g in small.need("groups") if g.prunable and str(g.kind) in ("head", "ffn")}
    before, after = ({g.name for g in p.need("groups") if g.prunable} for p in (program, small))
    assert before == after
    plan = CompressionPlan({g.name: Choice(str(g.kind), g.size, tuple(range(1, g.size))) for g in groups.values()})
    small = small.but(plan=plan)
    sliced = SliceAxes().run(small)
    assert masking_error(small, sliced, limit=1e-4) <= 1e-4
    kept = {g.axis: g.size - 1 for g in groups.values()}
    assert CostModel(small)(kept).flops == counted_macs(sliced) < CostModel(program)().flops
    assert run_flat(sliced, [images[:1].repeat(3, 1, 1, 1)])[0].shape == (3, 5)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", FROZEN)
def test_what_knows_positions_is_frozen_with_the_reason(name: str) -> None:
    import re

    make, reason = FROZEN[name]
    flow = found(make)[0].need("tokens")
    assert flow.sites
    frozen = [s for s in flow.sites if s.frozen]
    assert len(frozen) >= len(flow.sites) - 1  # nothing behind the last attention knows positions
    assert all(re.search(reason, s.frozen) for s in frozen)
