"""The models of tools/bench/gpu.py with random weights, at their real size or as toys of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.process.libraries import survive_torchvision

Inputs = dict[str, Tensor] | Tensor
Built = tuple[nn.Module, Callable[[int], Inputs]]
"""A model in evaluation form, and what makes a batch for it."""
WORDS = 500  # token ids are below


def build(name: str, dry: bool) -> Built:
    """One of ``MODELS``. Raises ImportError where its library is missing."""
    survive_torchvision()
    torch.manual_seed(0)
    model, batch = MODELS[name](dry)
    return model.eval(), batch


def deit_small(dry: bool) -> Built:
    """DeiT-S: 12 blocks, 384 wide, 224x224."""
    return _vit(dry, embed_dim=384, num_heads=6)


def vit_base(dry: bool) -> Built:
    """ViT-B/16: 12 blocks, 768 wide, 224x224."""
    return _vit(dry, embed_dim=768, num_heads=12)


def _vit(dry: bool, **sizes: Any) -> Built:
    from timm.models.vision_transformer import VisionTransformer

    toy: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": 2}
    return VisionTransformer(num_classes=10 if dry else 1000, **(toy if dry else sizes)), _pictures(32 if dry else 224)


def resnet50(dry: bool) -> Built:
    """ResNet-50 at 224x224."""
    from timm.models.resnet import Bottleneck, ResNet

    layers, channels = ([1, 1, 1, 1], (16, 16, 32, 32)) if dry else ([3, 4, 6, 3], (64, 128, 256, 512))
    model = ResNet(Bottleneck, layers, num_classes=10 if dry else 1000, channels=channels)
    return model, _pictures(32 if dry else 224)


def bert_base(dry: bool) -> Built:
    """BERT-base with a classifier, 128 tokens."""
    return _bert(dry, 128)


def minilm(dry: bool) -> Built:
    """As large as all-MiniLM-L6: 6 layers, 384 wide, 64 tokens."""
    return _bert(dry, 64, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def _bert(dry: bool, length: int, **sizes: int) -> Built:
    from transformers import BertConfig, BertForSequenceClassification

    toy = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(**{**sizes, **(toy if dry else {}), "vocab_size": WORDS if dry else 30522})
    return BertForSequenceClassification(config), _sentences(16 if dry else length)


def llama_block(dry: bool) -> Built:
    """Two layers of the kind of Llama: grouped queries, a gated feed-forward, rotary positions, RMS norms."""
    return _llama(
        dry, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4, layers=2
    )


def llama_1b(dry: bool) -> Built:
    """1.1 billion parameters, as large as TinyLlama: 22 layers, 2048 wide, 32 heads in 4 groups."""
    return _llama(
        dry, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, layers=22
    )


def _llama(dry: bool, layers: int, **sizes: int) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    toy = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    words = WORDS if dry else 32000
    kept = {"num_hidden_layers": 2 if dry else layers, "vocab_size": words, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**(toy if dry else sizes), **kept, use_cache=False)), _sentences(
        16 if dry else 64
    )


def _pictures(size: int) -> Callable[[int], Inputs]:
    return lambda count: torch.randn(count, 3, size, size)


def _sentences(length: int) -> Callable[[int], Inputs]:
    def batch(count: int) -> Inputs:
        ids = torch.randint(5, WORDS, (count, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return batch


def move_inputs(inputs: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """Inputs on a device, floats in a dtype."""
    if isinstance(inputs, dict):
        return {name: value.to(device) for name, value in inputs.items()}
    return inputs.to(device, dtype or inputs.dtype)


def call(module: Any, inputs: Inputs) -> Tensor:
    """The first tensor that a module returns."""
    found = module(**inputs) if isinstance(inputs, dict) else module(inputs)
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if hasattr(found, "values") else found[0]
    return found


MODELS: dict[str, Callable[[bool], Built]] = {
    "deit_small": deit_small,
    "bert_base": bert_base,
    "resnet50": resnet50,
    "llama_block": llama_block,
    "minilm": minilm,
    "vit_base": vit_base,
    "llama_1b": llama_1b,
}
