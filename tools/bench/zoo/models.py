"""The models of tools/bench/zoo.py at their real sizes, with random weights that make a mistake show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.process.libraries import survive_torchvision
from fxprune.process.silence import quiet

# how weights are made and inputs varied is the tests' own code: they need no tools, tools may need them (as tools/soak)
sys.path.append(str(Path(__file__).resolve().parents[3] / "tests"))

from support.zoo import Built, other_inputs, scramble

__all__ = ["MODELS", "TEXT", "Built", "build", "other_inputs"]
TEXT, WORDS = (2, 64), 200  # example batch and length; token ids below WORDS


def _timm(name: str) -> Built:
    import timm

    model: Any = timm.create_model(name)
    return model, (torch.randn(2, *model.pretrained_cfg["input_size"]),), {}


def _torchvision(name: str) -> Built:
    import torchvision

    return getattr(torchvision.models, name)(), (torch.randn(2, 3, 224, 224),), {}


class PackedAttentionViT(nn.Module):
    """A ViT-B/16 whose blocks are ``nn.MultiheadAttention`` with packed projections, as torchvision builds it."""

    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12, patches: int = 196) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm1, attention, norm2, mlp in zip(self.norm1, self.attention, self.norm2, self.mlp, strict=True):
            y = norm1(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


def _text(model: str, config: str, mask: bool = False, **sizes: Any) -> Built:
    import transformers

    inputs = {"input_ids": torch.randint(5, WORDS, TEXT)}
    if mask:
        inputs["attention_mask"] = torch.ones(TEXT, dtype=torch.long)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)), (), inputs


def _image(model: str, config: str, size: int = 224, **sizes: Any) -> Built:
    import transformers

    return (
        getattr(transformers, model)(getattr(transformers, config)(**sizes)),
        (),
        {"pixel_values": torch.randn(2, 3, size, size)},
    )


def _mask2former() -> Built:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes: dict[str, Any] = {
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "out_features": stages,
    }
    config = Mask2FormerConfig(backbone_config=SwinConfig(**sizes))
    return Mask2FormerForUniversalSegmentation(config), (), {"pixel_values": torch.randn(2, 3, 256, 256)}


def _clip() -> Built:
    model, _, inputs = _text("CLIPModel", "CLIPConfig", mask=True)
    return model, (), {**inputs, "pixel_values": torch.randn(2, 3, 224, 224)}


def _whisper() -> Built:
    import transformers

    config = transformers.WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_layers=1,
        decoder_attention_heads=6,
        decoder_ffn_dim=1536,
    )
    return transformers.WhisperModel(config).get_encoder(), (), {"input_features": torch.randn(2, 80, 3000)}


_DEBERTA: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
}
_SMOLLM: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_MISTRAL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}

MODELS: dict[str, Callable[[], Built]] = {
    **{
        name: (lambda name=name: _timm(name))
        for name in (  # type: ignore[misc]
            "vit_tiny_patch16_224",
            "vit_small_patch16_224",
            "vit_base_patch16_224",
            "deit_small_patch16_224",
            "deit_tiny_distilled_patch16_224",
            "deit3_small_patch16_224",
            "beit_base_patch16_224",
            "eva02_tiny_patch14_224",
            "swin_tiny_patch4_window7_224",
            "swinv2_tiny_window8_256",
            "cait_xxs24_224",
            "pvt_v2_b0",
            "mobilevit_s",
            "mixer_s16_224",
            "convnext_tiny",
            "resnet18",
            "resnet50",
            "vgg16_bn",
            "efficientnet_b0",
            "maxvit_tiny_rw_224",
            "vit_small_patch14_dinov2",
        )
    },
    "torchvision vit_b_16": lambda: _torchvision("vit_b_16"),
    "nn.MultiheadAttention ViT-B": lambda: (PackedAttentionViT(), (torch.randn(2, 3, 224, 224),), {}),
    "BERT": lambda: _text("BertForSequenceClassification", "BertConfig", mask=True),
    "RoBERTa": lambda: _text("RobertaForSequenceClassification", "RobertaConfig", mask=True),
    "DistilBERT": lambda: _text("DistilBertForSequenceClassification", "DistilBertConfig", mask=True),
    "ELECTRA": lambda: _text("ElectraForSequenceClassification", "ElectraConfig", mask=True),
    "DeBERTa-v2": lambda: _text("DebertaV2ForSequenceClassification", "DebertaV2Config", mask=True, **_DEBERTA),
    "GPT-2": lambda: _text("GPT2LMHeadModel", "GPT2Config"),
    "OPT": lambda: _text("OPTForCausalLM", "OPTConfig"),
    "Llama": lambda: _text("LlamaForCausalLM", "LlamaConfig", **_SMOLLM),
    "Qwen2": lambda: _text("Qwen2ForCausalLM", "Qwen2Config", **_QWEN),
    "Mistral": lambda: _text("MistralForCausalLM", "MistralConfig", **_MISTRAL),
    "ModernBERT": lambda: _text("ModernBertForSequenceClassification", "ModernBertConfig", mask=True),
    "T5 encoder": lambda: _text("T5EncoderModel", "T5Config", mask=True),
    "HF ViT": lambda: _image("ViTForImageClassification", "ViTConfig"),
    "HF Swin": lambda: _image("SwinForImageClassification", "SwinConfig"),
    "SegFormer": lambda: _image("SegformerForSemanticSegmentation", "SegformerConfig", 512),
    "Mask2Former": _mask2former,
    "CLIP": _clip,
    "Whisper encoder": _whisper,
}


def build(name: str, seed: int = 0) -> Built:
    """A scrambled model in eval mode with example inputs of batch 2."""
    survive_torchvision()
    torch.manual_seed(seed)
    with quiet():
        module, args, kwargs = MODELS[name]()
    return scramble(module, seed).eval(), args, kwargs
