"""Token-reduced models build TensorRT engines from their ONNX files. Built, not run: that needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_models import TokenViT, analysed, planned, scrambled

import fxprune
from fxprune.backends.onnx.backend import OnnxBackend
from fxprune.ir.pipeline import Pipeline
from fxprune.passes.transform.merge_tokens import MergeTokens
from fxprune.passes.transform.spell_out_tokens import SpellOutTokens
from fxprune.target.backend import lower_and_verify

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is part of the test extra on Linux with x86-64")


def engine(payload: Path) -> Any:
    """A serialised engine for SM 8.9 with batch 1 to 8, built as ``trtexec`` would. Fails with the parser's words."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(payload.read_bytes())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    images = network.get_input(0)
    profile.set_shape(images.name, *((n, *tuple(images.shape)[1:]) for n in (1, 2, 8)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return builder.build_serialized_network(network, config)


@pytest.mark.drawn(1)
@pytest.mark.parametrize("reducer", ["tome", "prune{score=entropy-value}", "ppt", "zero-tprune", "transform", "random"])
def test_every_reducer_builds(reducer: str, tmp_path: Path) -> None:
    dense = planned(analysed(scrambled(TokenViT(depth=2))), reducer, [3, 2])
    plain = Pipeline((MergeTokens(), SpellOutTokens()), start=("axes", "groups", "tokens", "plan")).run(dense)
    lowered, parity = lower_and_verify(OnnxBackend(opset=20), plain, tmp_path)
    assert parity.ok
    built = engine(lowered.payload)
    assert built is not None
    assert len(bytes(built)) > 10_000


def test_heads_neurons_and_tokens_together_build(tmp_path: Path) -> None:
    model, images = scrambled(TokenViT(depth=2)), torch.randn(2, 3, 32, 32)
    fxprune.compile(
        model,
        images,
        flops=0.6,
        importance="l2",
        tokens="tome{schedule=constant,share=0.5}",
        align=1,
        target="onnx",
        out=tmp_path / "x",
    )
    assert engine(tmp_path / "x" / "model.onnx") is not None
