"""Engines for GPUs that are not here, built by TensorRT for RTX in a process of its own.

``python engines.py OUT [CASE ...]``

torch-tensorrt imports only where it finds a GPU. What it asks of one while it builds is answered here; nothing is run.
``OUT/engines.json`` holds, per case, what the report says or the error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from support import zoo
from support.token_models import TokenViT, analysed, planned, scrambled
from torch import Tensor, nn

torch.set_num_threads(1)


def pretend() -> None:
    """Import torch_tensorrt without a GPU: a capability to plan for, and its Python runtime alone."""
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *_, **__: (8, 9)
    cuda.current_device = lambda: 0
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})  # type: ignore[misc]
    real, path = os.path.isfile, os.path
    path.isfile = lambda p: "/torch_tensorrt/lib/" not in str(p) and real(p)  # type: ignore[assignment]
    try:
        import torch_tensorrt  # noqa: F401
    finally:
        path.isfile = real


@torch.library.custom_op("fxprune_engines::oddly", mutates_args=())
def oddly(x: Tensor) -> Tensor:
    return x.sin()


@oddly.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Odd(nn.Module):
    """A layer that no converter knows behind one that all do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxprune_engines.oddly(self.linear(x)) + 1  # the guilty line


def compiled(name: str, target: str, out: Path, **options: Any) -> dict[str, Any]:
    import fxprune

    model, args, kwargs = zoo.build(name, 0)
    return dict(
        fxprune.compile(
            model, kwargs or args, target=target, importance="l2", align=1, out=out, on_event=lambda _: None, **options
        ).report
    )


def vit_with_tokens(target: str, out: Path) -> dict[str, Any]:
    import fxprune

    return dict(
        fxprune.compile(
            scrambled(TokenViT(depth=2)),
            torch.randn(2, 3, 32, 32),
            flops=0.6,
            importance="l2",
            align=1,
            tokens="tome{schedule=constant,share=0.5}",
            target=target,
            out=out,
            on_event=lambda _: None,
        ).report
    )


def lowered(program: Any, target: str, out: Path) -> dict[str, Any]:
    from fxprune import registry
    from fxprune.target.backend import lower_and_verify

    out.mkdir()
    made, parity = lower_and_verify(registry.target(target), program, out)
    return {"parity": parity.to_dict(), "lowering": dict(made.about)}


def odd(target: str, out: Path) -> dict[str, Any]:
    from fxprune.intake.capture import capture

    return lowered(capture(Odd().eval(), (torch.randn(2, 8),)), target, out)


def tokens_not_spelt_out(target: str, out: Path) -> dict[str, Any]:
    from fxprune.ir.pipeline import Pipeline
    from fxprune.passes.transform.merge_tokens import MergeTokens

    dense = planned(analysed(scrambled(TokenViT(depth=2))), "tome", [3, 2])
    merged = Pipeline((MergeTokens(),), start=("axes", "groups", "tokens", "plan")).run(dense)
    return lowered(merged, target, out)


def swin_stage(out: Path) -> dict[str, Any]:
    """One stage of two blocks, so that windows shift once."""
    zoo.MODELS["swin-stage"] = zoo._timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=24, depths=(2,), num_heads=(3,)
    )
    return compiled("swin-stage", "trt{capability=8.0+8.6+8.9,dtype=fp16}", out, flops=0.7)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "vit-heads-ffn-tokens": lambda out: vit_with_tokens("trt{capability=8.6,dtype=fp16}", out),
    "bert": lambda out: compiled("bert", "trt{capability=8.9}", out, flops=0.6),
    "resnet": lambda out: compiled("resnet18", "trt{capability=8.0,dtype=bf16}", out, flops=0.6),
    "swin": swin_stage,
    "odd": lambda out: odd("trt{capability=8.9}", out),
    "tokens-not-spelt-out": lambda out: tokens_not_spelt_out("trt{capability=8.9}", out),
}


def main(out: Path, *names: str) -> None:
    """The named cases, or every one, one after the other."""
    from fxprune.errors import FxpruneError

    pretend()
    found: dict[str, Any] = {}
    for name in names or CASES:
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            found[name] = {"report": CASES[name](out / name), "files": sorted(p.name for p in (out / name).iterdir())}
        except FxpruneError as error:
            found[name] = {
                "error": type(error).__name__,
                "what": error.what,
                "where": error.where,
                "why": error.why,
                "cure": error.cure,
            }
        found[name]["seconds"] = time.perf_counter() - started
    (out / "engines.json").write_text(json.dumps(found, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()), *sys.argv[2:])
