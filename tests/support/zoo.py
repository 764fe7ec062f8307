"""Tiny models with random weights: ``build(name)`` -> (module, args, kwargs), each exported in about a second."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.process.libraries import survive_torchvision
from fxprune.process.silence import quiet
from support.blocks import (
    Depthwise,
    GatedFeedForward,
    GroupedQueries,
    GroupNormed,
    MultiheadViT,
    PixelDecoder,
    Rotary,
    Shuffle,
    Tied,
    TransposedWeights,
    WrittenAttention,
)

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
WORDS = 60


def _timm(name: str, size: int = 32, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        survive_torchvision()
        with quiet():
            import timm

        return timm.create_model(name, num_classes=10, **options), (torch.randn(2, 3, size, size),), {}

    return build


def _vit(name: str, **options: Any) -> Callable[[], Built]:
    return _timm(name, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **options)


def _vgg() -> Built:
    survive_torchvision()
    from timm.models.vgg import VGG

    model = VGG([8, 8, "M", 16, "M", 24, "M"], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=0.01)
    return model, (torch.randn(2, 3, 64, 64),), {}


def _mixer() -> Built:
    survive_torchvision()
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return model, (torch.randn(2, 3, 32, 32),), {}


def _maxvit() -> Built:
    survive_torchvision()
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(24, 48),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=(16, 24),
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4)),
    )
    return MaxxVit(config, img_size=32, num_classes=10), (torch.randn(2, 3, 32, 32),), {}


def _hf(model: str, config: str, sizes: Mapping[str, Any], inputs: str = "text") -> Callable[[], Built]:
    """``model`` and ``config`` are class names of transformers, ``sizes`` the fields that make it tiny."""

    def build() -> Built:
        survive_torchvision()
        with quiet():
            import transformers

            logging.getLogger("transformers").setLevel(logging.ERROR)
            module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return module, (), INPUTS[inputs](module.config)

    return build


def _mask2former() -> Built:
    survive_torchvision()
    with quiet():
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=24,
            depths=[2, 1, 1, 1],
            num_heads=[3, 3, 6, 6],
            window_size=4,
            out_features=stages,
        )
        config = Mask2FormerConfig(
            backbone_config=backbone,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=48,
            dim_feedforward=48,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=4,
            num_queries=5,
            num_labels=4,
        )
        return Mask2FormerForUniversalSegmentation(config), (), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _whisper_encoder() -> Built:
    model, _, kwargs = _hf("WhisperModel", "WhisperConfig", _WHISPER, "sound")()
    return model.get_encoder(), (), kwargs


def _tokens(_config: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (2, 9))}


def _tokens_and_mask(_config: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def _pixels(config: Any) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None) or 32
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _both(_config: Any) -> dict[str, Tensor]:
    return {**_tokens_and_mask(_config), "pixel_values": torch.randn(2, 3, 32, 32)}


def _sound(config: Any) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)}


INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "text": _tokens,
    "masked": _tokens_and_mask,
    "image": _pixels,
    "both": _both,
    "sound": _sound,
}


def _block(make: Callable[[], nn.Module], *shape: int) -> Callable[[], Built]:
    return lambda: (make(), (torch.randn(*shape),), {})


_BERT = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_LLAMA = {
    **_BERT,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_T5 = {"vocab_size": WORDS, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 3}
_HF_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_HF_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
_CLIP = {
    "text_config": {**_BERT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": _HF_VIT,
    "projection_dim": 24,
}
_WHISPER = {
    "vocab_size": WORDS,
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_MODERN = {
    **_BERT,
    "num_attention_heads": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
}

TIMM: dict[str, Callable[[], Built]] = {
    "vit": _vit("vit_tiny_patch16_224"),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224"),
    "dinov2": _vit("vit_small_patch14_reg4_dinov2"),
    "beit": _vit("beit_base_patch16_224"),
    "eva02": _vit("eva02_tiny_patch14_224"),
    "cait": _timm("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3),
    "mixer": _mixer,
    "swin": _timm("swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=24, depths=(2, 2), num_heads=(3, 6)),
    "swinv2": _timm("swinv2_tiny_window8_256", 64, img_size=64, embed_dim=24, depths=(2, 2), num_heads=(3, 6)),
    "pvt_v2": _timm("pvt_v2_b0", 64, embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 6)),
    "mobilevit": _timm("mobilevit_xxs", 64),
    "convnext": _timm("convnext_atto", 64, dims=(16, 24, 32, 48), depths=(1, 1, 2, 1)),
    "resnet18": _timm("resnet18", 32, channels=(8, 16, 24, 32)),
    "resnet50": _timm("resnet50", 32, layers=(1, 1, 2, 1), channels=(8, 16, 24, 32)),
    "efficientnet": _timm("test_efficientnet", 64),
    "vgg_bn": _vgg,
    "maxvit": _maxvit,
}
HF: dict[str, Callable[[], Built]] = {
    "bert": _hf("BertForSequenceClassification", "BertConfig", _BERT, "masked"),
    "roberta": _hf("RobertaForMaskedLM", "RobertaConfig", {**_BERT, "pad_token_id": 1}, "masked"),
    "distilbert": _hf(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 64, "max_position_embeddings": 32},
    ),
    "electra": _hf("ElectraForSequenceClassification", "ElectraConfig", {**_BERT, "embedding_size": 24}),
    "deberta_v2": _hf(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        "masked",
    ),
    "gpt2": _hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": WORDS,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": _hf(
        "OPTForCausalLM",
        "OPTConfig",
        {**{k: v for k, v in _BERT.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 48},
    ),
    "llama": _hf("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": _hf("Qwen2ForCausalLM", "Qwen2Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "mistral": _hf("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "modernbert": _hf("ModernBertForSequenceClassification", "ModernBertConfig", _MODERN, "masked"),
    "t5_encoder": _hf("T5EncoderModel", "T5Config", _T5),
    "hf_vit": _hf("ViTForImageClassification", "ViTConfig", _HF_VIT, "image"),
    "hf_swin": _hf("SwinForImageClassification", "SwinConfig", _HF_SWIN, "image"),
    "segformer": _hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 6],
            "decoder_hidden_size": 32,
            "image_size": 64,
        },
        "image",
    ),
    "mask2former": _mask2former,
    "whisper_encoder": _whisper_encoder,
    "clip": _hf("CLIPModel", "CLIPConfig", _CLIP, "both"),
}
BLOCKS: dict[str, Callable[[], Built]] = {
    "multihead_vit": _block(MultiheadViT, 2, 3, 32, 32),
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
MODELS: dict[str, Callable[[], Built]] = {**BLOCKS, **TIMM, **HF}
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
