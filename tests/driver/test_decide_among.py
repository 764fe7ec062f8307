"""With data nobody has to choose kinds or a criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks import ResidualConvolutions
from support.digits import tiny_vit
from torch import Tensor, nn

import fxprune
from fxprune.artifact.files import read_report
from fxprune.driver import decide_among, finish
from fxprune.driver.members import Compared
from fxprune.errors import BudgetInfeasible, FxpruneError, InternalError
from fxprune.ir.cost import Budget
from fxprune.request.options import Judging, Timing
from fxprune.workflows.sweep import sweep

WIDER = ("rotate-width", "align-heads")


def images(count: int = 96) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def narrow_vit(rank: int = 6) -> nn.Module:
    """A ViT whose residual stream never leaves a space of ``rank`` of its 32 directions: a basis shows that, single
    channels do not."""
    torch.manual_seed(0)
    model = tiny_vit().eval()
    basis = torch.linalg.qr(torch.randn(32, rank))[0]
    onto = basis @ basis.T
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in ("cls_token", "pos_embed"):
                tensor.copy_(tensor @ onto)
            elif name.startswith("patch.") or ".proj." in name or ".mlp.2." in name:
                tensor.copy_(torch.tensordot(onto, tensor, 1))
    return model


def compiled(model: nn.Module, **more: Any) -> Any:
    options = {"flops": 0.5, "data": images(), "held_out": 0, "seconds": 0, "on_event": lambda _: None, **more}
    return fxprune.compile(model, images(2), **options)


def test_a_stream_of_few_directions_is_found_and_cut_without_being_asked() -> None:
    small = compiled(narrow_vit(), flops=0.3)
    assert any("width may go as well" in note for note in small.report["notes"])
    assert all(name in small.report["pipeline"] for name in WIDER)
    (width,) = [g for g in small.report["groups"] if g["kind"] == "width"]
    assert width["kept"] < width["size"]
    again = compiled(narrow_vit(), flops=None, pipeline=small.report["pipeline"])
    assert again.plan.digest == small.plan.digest


@pytest.mark.parametrize("nearer", [True, False])
def test_the_plan_that_is_nearer_once_repaired_is_taken(nearer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Compared(2.0, 1.0, -1.0, 0.5) if nearer else Compared(2.0, 1.9, -0.1, 0.5)
    monkeypatch.setattr(decide_among, "compare_repaired", lambda *_: judged)
    small = compiled(narrow_vit())
    (note,) = [n for n in small.report["notes"] if n.startswith("qk, v, width")]
    assert ("may go as well" in note) == nearer
    assert all((name in small.report["pipeline"]) == nearer for name in WIDER)


@pytest.mark.parametrize("nearer", [True, False])
def test_where_channels_go_another_criterion_is_tried(nearer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Compared(2.0, 1.0, -1.0, 0.5) if nearer else Compared(2.0, 1.9, -0.1, 0.5)
    monkeypatch.setattr(decide_among, "compare_repaired", lambda *_: judged)
    torch.manual_seed(1)
    x = torch.randn(96, 3, 12, 12)
    small = fxprune.compile(
        ResidualConvolutions().eval(), x[:2], flops=0.5, data=x, held_out=0, seconds=0, on_event=lambda _: None
    )
    used = decide_among.RIVAL if nearer else "trajectory"
    assert small.report["importance"] == used.partition("{")[0]
    assert f"score-groups{{criterion={used}}}" in small.report["pipeline"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FxpruneError("no", why="so"), "no (so)"),
        (InternalError("odd"), "fxprune's own"),
        (ValueError("x"), "ValueError"),
    ],
)
def test_an_alternative_that_fails_leaves_the_plain_plan(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(decide_among, "compare_repaired", fail)
    small, plain = compiled(narrow_vit()), compiled(narrow_vit(), prune="heads,ffn")
    (note,) = [n for n in small.report["notes"] if n.startswith("qk, v, width stay whole")]
    assert said in note
    assert small.plan.elements == plain.plan.elements


def test_what_cannot_be_delivered_gives_way_to_the_plain_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decide_among, "compare_repaired", lambda *_: Compared(2.0, 1.0, -1.0, 0.5))
    compare = finish.compare_with_masking

    def fails_where_turned(run: Any, dense: Any) -> Any:
        if WIDER[0] in run.pipeline:
            raise InternalError("sliced is not masked")
        return compare(run, dense)

    monkeypatch.setattr(finish, "compare_with_masking", fails_where_turned)
    small = compiled(narrow_vit(), out=tmp_path / "small")
    (note,) = [n for n in small.report["notes"] if "another is taken" in n]
    assert "sliced is not masked" in note
    assert not any(name in small.report["pipeline"] for name in WIDER)
    with pytest.raises(InternalError):  # who asked for it is told
        compiled(narrow_vit(), prune="heads,ffn,qk,v,width")


@pytest.mark.parametrize("more", [{"prune": "heads,ffn"}, {"data": images(decide_among.ENOUGH - 1)}, {"data": None}])
def test_nothing_else_is_tried_where_kinds_are_named_or_nothing_can_judge(more: dict[str, Any]) -> None:
    small = compiled(narrow_vit(), **more)
    assert not any(name in small.report["pipeline"] for name in WIDER)


def test_a_budget_that_heads_and_neurons_cannot_reach_is_reached() -> None:
    with pytest.raises(BudgetInfeasible):
        compiled(narrow_vit(), flops=0.08, prune="heads,ffn")
    small = compiled(narrow_vit(), flops=0.08)
    assert small.report["cost"]["ratio"]["flops"] <= 0.08
    assert any("without that the budget is out of reach" in note for note in small.report["notes"])


def test_a_point_of_a_sweep_is_what_compile_makes(tmp_path: Path) -> None:
    points = sweep(
        narrow_vit(),
        images(2),
        ratios=[Budget("flops", 0.6), Budget("flops", 0.3)],
        data=images(),
        judging=Judging(data=images(40), samples=40),
        timing=Timing(seconds=0),
        out=tmp_path / "points",
        on_event=lambda _: None,
    )["points"]
    for point in points:
        alone = compiled(narrow_vit(), flops=point["ratio"])
        report = read_report(tmp_path / "points" / point["artifact"])
        kept = [[(g["group"], g["kept"]) for g in one["groups"]] for one in (report, alone.report)]
        assert kept[0] == kept[1]


def test_attention_without_values_takes_its_queries_with_it() -> None:
    small = compiled(narrow_vit(), flops=0.35, prune="v,ffn", allow_empty=True)
    assert any(g["kind"] == "v" and g["kept"] == 0 for g in small.report["groups"])
    assert small.report["cost"]["ratio"]["flops"] <= 0.35
    assert not any("attn.qkv" in name for name in small.program.exported.state_dict)
