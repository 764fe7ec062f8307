"""What ONNX Runtime runs: Gelu fused, sums in front of norms left alone, and the numbers as they were."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.ir.plan import CompressionPlan
from fxprune.process.silence import quiet


class PostNorm(nn.Module):
    """A feed-forward part as BERT has it: the norm reads the sum, and nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.down(functional.gelu(self.up(x))))
        return out


class Lookalikes(nn.Module):
    """Products and errors functions that are no Gelu."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.25 * (1 + torch.erf(x))) + x * (0.5 * (x + 1)) + (0.5 * (1 + torch.erf(x)))


def run(model: nn.Module, x: Tensor, folder: Path) -> tuple[Counter[str], Tensor]:
    """(ops of the file as ONNX Runtime optimises it, its output)."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    artifact = fxprune.apply(
        model.eval(), CompressionPlan(), x, target="onnx", out=folder / "out", on_event=lambda event: None
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    with quiet():
        session = onnxruntime.InferenceSession(
            str(artifact.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    (name,) = [i.name for i in session.get_inputs()]
    ops = Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)
    return ops, torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def test_gelus_are_fused_and_sums_before_norms_are_not(tmp_path: Path) -> None:
    model, x = nn.Sequential(PostNorm(), PostNorm()), torch.randn(2, 5, 16)
    ops, out = run(model, x, tmp_path)
    assert ops["BiasGelu"] == 2
    assert ops["Erf"] == 0
    assert ops["SkipLayerNormalization"] == 0
    assert (ops["Sum"], ops["LayerNormalization"]) == (2, 2)
    assert torch.allclose(out, model(x), atol=1e-5)


def test_rms_norms_are_fused(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16, eps=1e-5), nn.Linear(16, 16)), torch.randn(2, 5, 16)
    torch.nn.init.normal_(model[1].weight)  # type: ignore[arg-type]
    ops, out = run(model, x, tmp_path)
    assert ops["SimplifiedLayerNormalization"] == 1
    assert ops["Pow"] == ops["Reciprocal"] == 0
    assert torch.allclose(out, model(x), atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 1e-2), (torch.float64, 1e-12)])
def test_rms_norms_keep_their_precision(dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    """In half precision squares of 300 are infinite; in double eps is double's where none is said."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.RMSNorm(16)).to(dtype), 300 * torch.randn(2, 5, 16).to(dtype)
    _, out = run(model, x, tmp_path)
    assert torch.isfinite(out).all()
    assert torch.allclose(out.double(), model(x).double(), atol=most)


def test_what_only_looks_like_a_gelu_computes_what_it_did(tmp_path: Path) -> None:
    model, x = Lookalikes(), torch.randn(3, 16)
    ops, out = run(model, x, tmp_path)
    assert ops["Gelu"] == ops["BiasGelu"] == 0
    assert torch.allclose(out, model(x), atol=1e-6)
