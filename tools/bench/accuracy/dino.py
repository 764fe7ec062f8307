"""DINOv2 ViT-S/14 out of an ONNX file that holds it as the backbone of a saliency network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, PATCH, SIDE = 384, 12, 6, 14, 518
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Names of older exports -> those of transformers 5, where this installation has them."""
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Initializers of the position table, class token and patches: constant folding took its name away."""


def backbone(path: Path) -> nn.Module:
    """The backbone as transformers builds it, with the file's weights. Raises ValueError where these are others."""
    from fxprune.process.libraries import survive_torchvision

    survive_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=PATCH, image_size=SIDE
    )
    model: nn.Module = Dinov2Model(config).eval()
    wanted = model.state_dict()
    found = {name: value for name, value in _weights(path, wanted).items() if name in wanted}
    lacking = set(wanted) - set(found) - {"embeddings.mask_token"}
    if lacking:
        raise ValueError(f"{path.name} does not hold {sorted(lacking)[:3]} of DINOv2 ViT-S/14")
    found["embeddings.mask_token"] = torch.zeros_like(wanted["embeddings.mask_token"])
    model.load_state_dict(found)
    return model


def _weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the model's parameters. A linear layer's matrix is the second input of a MatMul whose
    node is called as its module."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    found = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.input[1].startswith("onnx::"):
            found[".".join(node.name.strip("/").split("/")[:-1]) + ".weight"] = stored[node.input[1]].T.contiguous()
    found["backbone.embeddings.position_embeddings"] = torch.cat([stored[name] for name in POSITIONS], 1)
    named = {}
    for name, value in found.items():
        name = name.removeprefix("backbone.")
        for old, new in RENAMED.items():
            renamed = name.replace(old, new)
            name = renamed if renamed in wanted else name
        named[name] = value
    return named
