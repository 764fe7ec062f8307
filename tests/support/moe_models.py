"""Tiny mixtures of experts of the classes that people use: two layers, four experts, two of them at once."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.process.libraries import survive_torchvision

SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    **{"num_experts_per_tok": 2, "use_cache": False},
}
SMALL = {**SIZES, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {**SIZES, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**SMALL, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**SMALL, "head_dim": 8}),
    "gpt-oss": ("GptOssForCausalLM", {**SIZES, "num_local_experts": 4, "head_dim": 8, "sliding_window": 8}),
}
"""Family -> (class in transformers, what its config says)."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **{**SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
            **{"qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1},
        },
    )
}
FROZEN = {"deepseek-v3": "topk at topk"}


def mixture(family: str) -> Any:
    """A model with weights that are far from alike, in evaluation form."""
    survive_torchvision()
    import transformers

    name, sizes = {**MIXTURES, **OTHERS}[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
