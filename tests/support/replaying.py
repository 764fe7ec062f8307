"""Small models whose runs are given back as text, and what a run and its replay have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxprune import Artifact, CompressionPlan
from fxprune.cli.demo import DigitsViT
from support.blocks import GroupedQueries, WrittenAttention

QUIET: dict[str, Any] = {"on_event": lambda event: None}


def batches(shape: tuple[int, ...], count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, *shape, generator=generator) for _ in range(count)]


def feet() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16)).eval()


def vit() -> nn.Module:
    torch.manual_seed(1)
    return DigitsViT(dim=16, depth=2, heads=2, hidden=32).eval()


def queries() -> nn.Module:
    torch.manual_seed(1)
    return GroupedQueries("repeat").eval()


def written() -> nn.Module:
    torch.manual_seed(1)
    return WrittenAttention("transpose").eval()


MODELS = {"feet": (feet, (16,)), "vit": (vit, (1, 8, 8))}
EVERY = {**MODELS, "queries": (queries, (8, 24)), "written": (written, (8, 24))}


def blocks_of(plan: CompressionPlan) -> dict[str, Any]:
    return {name: one.to_dict() for name, one in plan.blocks.items()}


def assert_same(one: CompressionPlan, two: CompressionPlan) -> None:
    assert one.choices == two.choices
    assert one.tokens == two.tokens
    assert blocks_of(one) == blocks_of(two)


def assert_same_weights(one: Artifact, two: Artifact) -> None:
    a, b = one.module.state_dict(), two.module.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


# measured, or of one run: everything else in a report is the same in a run and its replay
OF_ONE_RUN = {"options", "passes", "measured", "files", "versions"}


def assert_same_report(one: Artifact, two: Artifact) -> None:
    a, b = ({k: v for k, v in r.report.items() if k not in OF_ONE_RUN} for r in (one, two))
    for report in (a, b):
        if report.get("recovery"):
            report["recovery"] = {**report["recovery"], "seconds": 0}
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key], key
    assert [(p["text"], p["added"], p["removed"], p["edited"], p["resized"]) for p in one.report["passes"]] == [
        (p["text"], p["added"], p["removed"], p["edited"], p["resized"]) for p in two.report["passes"]
    ]
