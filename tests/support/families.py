"""The list of model families, one for all: as tests build them, tiny, and as tools/bench/zoo.py does, at real size."""

from __future__ import annotations

from typing import Any

import torch

from support.blocks import MultiheadViT
from support.family import (
    WORDS,
    Family,
    build_mask2former,
    build_maxvit,
    build_mixer,
    build_vgg,
    encoders_of,
    hf_family,
    real_timm,
    real_torchvision,
    timm_family,
    vit_family,
)

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
_REAL_DEBERTA: dict[str, Any] = {
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
_REAL_WHISPER: dict[str, Any] = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 1,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
}

_TINY_SWIN: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 1, 1, 1],
    "num_heads": [3, 3, 6, 6],
    "window_size": 4,
}
_TINY_MASK2FORMER: dict[str, Any] = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 48,
    "dim_feedforward": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_queries": 5,
    "num_labels": 4,
}

FAMILIES: dict[str, Family] = {
    "multihead_vit": Family(
        lambda: (MultiheadViT(), (torch.randn(2, 3, 32, 32),), {}),
        {
            "torchvision vit_b_16": real_torchvision("vit_b_16"),
            "nn.MultiheadAttention ViT-B": lambda: (
                MultiheadViT(768, 12, 3072, 12, patch=16, patches=196, classes=1000),
                (torch.randn(2, 3, 224, 224),),
                {},
            ),
        },
    ),
    "vit": vit_family(
        "vit_tiny_patch16_224",
        "vit_tiny_patch16_224",
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "deit_small_patch16_224",
    ),
    "deit_distilled": vit_family("deit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224"),
    "deit3": vit_family("deit3_small_patch16_224", "deit3_small_patch16_224"),
    "dinov2": vit_family("vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"),
    "beit": vit_family("beit_base_patch16_224", "beit_base_patch16_224"),
    "eva02": vit_family("eva02_tiny_patch14_224", "eva02_tiny_patch14_224"),
    "cait": vit_family("cait_xxs24_224", "cait_xxs24_224"),
    "mixer": Family(build_mixer, {"mixer_s16_224": real_timm("mixer_s16_224")}),
    "swin": timm_family(
        "swin_tiny_patch4_window7_224",
        56,
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(3, 6),
    ),
    "swinv2": timm_family(
        "swinv2_tiny_window8_256",
        64,
        "swinv2_tiny_window8_256",
        img_size=64,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(3, 6),
    ),
    "pvt_v2": timm_family(
        "pvt_v2_b0", 64, "pvt_v2_b0", embed_dims=(16, 24, 32, 48), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 6)
    ),
    "mobilevit": timm_family("mobilevit_xxs", 64, "mobilevit_s"),
    "convnext": timm_family("convnext_atto", 64, "convnext_tiny", dims=(16, 24, 32, 48), depths=(1, 1, 2, 1)),
    "resnet18": timm_family("resnet18", 32, "resnet18", channels=(8, 16, 24, 32)),
    "resnet50": timm_family("resnet50", 32, "resnet50", layers=(1, 1, 2, 1), channels=(8, 16, 24, 32)),
    "efficientnet": timm_family("test_efficientnet", 64, "efficientnet_b0"),
    "vgg_bn": Family(build_vgg, {"vgg16_bn": real_timm("vgg16_bn")}),
    "maxvit": Family(build_maxvit, {"maxvit_tiny_rw_224": real_timm("maxvit_tiny_rw_224")}),
    "bert": hf_family("BertForSequenceClassification", "BertConfig", "masked", _BERT, "BERT"),
    "roberta": hf_family(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        "masked",
        {**_BERT, "pad_token_id": 1},
        "RoBERTa",
        tiny_model="RobertaForMaskedLM",
    ),
    "distilbert": hf_family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        "masked",
        {"vocab_size": WORDS, "dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 64, "max_position_embeddings": 32},
        "DistilBERT",
        tiny_inputs="text",
    ),
    "electra": hf_family(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        "masked",
        {**_BERT, "embedding_size": 24},
        "ELECTRA",
        tiny_inputs="text",
    ),
    "deberta_v2": hf_family(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        "masked",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        "DeBERTa-v2",
        _REAL_DEBERTA,
    ),
    "gpt2": hf_family(
        "GPT2LMHeadModel",
        "GPT2Config",
        "text",
        {
            "vocab_size": WORDS,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "GPT-2",
    ),
    "opt": hf_family(
        "OPTForCausalLM",
        "OPTConfig",
        "text",
        {**{k: v for k, v in _BERT.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 48},
        "OPT",
    ),
    "llama": hf_family("LlamaForCausalLM", "LlamaConfig", "text", _LLAMA, "Llama", _SMOLLM),
    "qwen2": hf_family(
        "Qwen2ForCausalLM", "Qwen2Config", "text", {k: v for k, v in _LLAMA.items() if k != "head_dim"}, "Qwen2", _QWEN
    ),
    "mistral": hf_family(
        "MistralForCausalLM", "MistralConfig", "text", {**_LLAMA, "sliding_window": 4}, "Mistral", _MISTRAL
    ),
    "modernbert": hf_family("ModernBertForSequenceClassification", "ModernBertConfig", "masked", _MODERN, "ModernBERT"),
    "t5_encoder": hf_family("T5EncoderModel", "T5Config", "masked", _T5, "T5 encoder", tiny_inputs="text"),
    "hf_vit": hf_family("ViTForImageClassification", "ViTConfig", "image", _HF_VIT, "HF ViT"),
    "hf_swin": hf_family("SwinForImageClassification", "SwinConfig", "image", _HF_SWIN, "HF Swin"),
    "segformer": hf_family(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        "image",
        {
            "hidden_sizes": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 6],
            "decoder_hidden_size": 32,
            "image_size": 64,
        },
        "SegFormer",
        image=512,
    ),
    "mask2former": Family(
        build_mask2former(64, _TINY_SWIN, **_TINY_MASK2FORMER),
        {"Mask2Former": build_mask2former(256, {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]})},
    ),
    "whisper_encoder": encoders_of(
        hf_family("WhisperModel", "WhisperConfig", "sound", _WHISPER, "Whisper encoder", _REAL_WHISPER)
    ),
    "clip": hf_family("CLIPModel", "CLIPConfig", "both", _CLIP, "CLIP"),
}
