"""Tiny models of the classes that people use, with random weights: two layers, sixty-four wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxprune.process.libraries import survive_torchvision

TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
GROUPED = {**TEXT, "num_attention_heads": 8, "num_key_value_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BIDIRECTIONAL = {**TEXT, "num_attention_heads": 4, "max_position_embeddings": 66}
PICTURES = {**{k: v for k, v in TEXT.items() if k != "vocab_size"}, "num_attention_heads": 4}
WHISPER = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**GROUPED, **ENDS}),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, **ENDS, "head_dim": 16}),
    "mistral": ("MistralForCausalLM", {**GROUPED, **ENDS}),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, **ENDS, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, **ENDS}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 66, **ENDS}),
    "opt": ("OPTForCausalLM", {**BIDIRECTIONAL, **ENDS, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**BIDIRECTIONAL, **ENDS}),
    "bert": ("BertForSequenceClassification", BIDIRECTIONAL),
    "roberta": ("RobertaForMaskedLM", BIDIRECTIONAL),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 66},
    ),
    "vit": ("ViTForImageClassification", {**PICTURES, "image_size": 32, "patch_size": 8}),
    "clip": ("CLIPVisionModel", {**PICTURES, "image_size": 32, "patch_size": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": 99, "d_model": 64, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 4},
            **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **{"vocab_size": 99, "d_model": 64, "max_source_positions": 50, "max_target_positions": 32},
            **{"num_mel_bins": 16, "decoder_start_token_id": 3, "begin_suppress_tokens": None},
            **WHISPER,
            **ENDS,
        },
    ),
}
"""Family -> (class in transformers, what its config says)."""


def tiny(family: str) -> Any:
    """A model of that family."""
    survive_torchvision()
    import transformers

    name, said = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**said)).eval()


def saved(family: str, folder: Path, change: Callable[[Any], Any] = lambda model: model) -> Path:
    """The folder of such a model."""
    change(tiny(family)).save_pretrained(folder)
    return folder
