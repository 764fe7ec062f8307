"""Tokens through the whole tool: budgets, explicit counts, plans, targets, recovery, reports, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_models import TokenViT, scrambled

import fxprune
from fxprune import BudgetInfeasible, CompressionPlan, NothingToPrune, OptionError, PlanError
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.cli.entry import main
from fxprune.report.entries import token_sites

pytestmark = pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")


def calibration(data: Digits, batches: int = 3) -> list[torch.Tensor]:
    return [data.train_images[i * 32 : (i + 1) * 32] for i in range(batches)]


def accuracy(model: Any, data: Digits) -> float:
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "text", ["tome:r=3", "ppt:r=4@0,1", "transform:r=3", "prune:r=2", "zero-tprune:r=2", "random:r=1"]
)
def test_explicit_counts_need_no_budget(text: str, trained: DigitsViT, digit_data: Digits) -> None:
    found = fxprune.compile(trained, digit_data.test_images[:2], tokens=text)
    assert found.report["budget"] is None
    assert found.report["pruned"] == []
    assert found.report["cost"]["ratio"]["params"] == 1.0
    assert not any("fxprune" in str(n.target) for n in found.program.graph.nodes)
    assert accuracy(found.module, digit_data) > 0.5
    assert found.module(digit_data.test_images[:7]).shape == (7, 10)
    sites = token_sites(found.report)["sites"]
    assert [s["left"] for s in sites] == {
        "tome:r=3": [14, 11],
        "ppt:r=4@0,1": [13, 9],
        "transform:r=3": [14, 11],
        "prune:r=2": [15, 13],
        "zero-tprune:r=2": [15, 13],
        "random:r=1": [16, 15],
    }[text]


def test_explicit_counts_alone_meet_the_budget_that_is_given_with_them(trained: DigitsViT, digit_data: Digits) -> None:
    x = digit_data.test_images[:2]
    with pytest.raises(BudgetInfeasible, match="the token counts do not meet the budget"):
        fxprune.compile(trained, x, tokens="tome:r=1", prune="tokens", flops=0.5)
    found = fxprune.compile(trained, x, tokens="tome:r=3", prune="tokens", flops=0.9)
    assert found.report["cost"]["ratio"]["flops"] <= 0.9


@pytest.mark.drawn(2)
@pytest.mark.parametrize("schedule", ["constant", "decreasing", "optin", "removal", "auto"])
def test_token_budgets_are_met(schedule: str, trained: DigitsViT, digit_data: Digits) -> None:
    found = fxprune.compile(
        trained,
        digit_data.test_images[:2],
        flops=0.8,
        prune="tokens",
        recover="none",
        tokens=f"tome{{schedule={schedule},improve=2}}",
        data=calibration(digit_data, 1),
    )
    assert 0.6 < found.report["cost"]["ratio"]["flops"] <= 0.8
    assert accuracy(found.module, digit_data) > 0.8


def test_one_ledger_for_heads_neurons_and_tokens(trained: DigitsViT, digit_data: Digits) -> None:
    options: dict[str, Any] = {"flops": 0.6, "data": calibration(digit_data), "prune": "heads,ffn,tokens"}
    found = fxprune.compile(trained, digit_data.test_images[:2], **options)
    assert 0.55 < found.report["cost"]["ratio"]["flops"] <= 0.6
    assert accuracy(found.module, digit_data) > 0.85
    assert any("of what the budget takes away" in n for n in found.report["notes"])
    half = fxprune.compile(trained, digit_data.test_images[:2], tokens="tome{share=0.5,schedule=constant}", **options)
    assert half.plan.tokens is not None
    assert not half.plan.tokens.empty
    assert half.plan.elements
    assert half.report["cost"]["ratio"]["flops"] <= 0.6
    again = fxprune.compile(trained, digit_data.test_images[:2], tokens="tome{share=0.5,schedule=constant}", **options)
    assert again.plan.to_json() == half.plan.to_json()


def test_recovery_makes_up_for_merged_tokens(trained: DigitsViT, digit_data: Digits) -> None:
    """Refit to the dense stream with the same tokens merged brings the outputs closer to the dense ones."""
    from fxprune.passes.analysis.importance.distance import output_change
    from fxprune.passes.analysis.importance.objective import Target

    with torch.no_grad():
        want = trained(digit_data.test_images)

    def kl(recover: str) -> float:
        found = fxprune.compile(
            trained,
            digit_data.test_images[:2],
            tokens="tome:r=6",
            recover=recover,
            data=calibration(digit_data, 8),
            samples=256,
        )
        assert found.report.get("recovery", {"method": "none"})["method"] == recover
        with torch.no_grad():
            got = found.module(digit_data.test_images)
        return float(output_change([Target(got, True, None)], [Target(want, True, None)], 1.0).mean())

    assert kl("refit") < 0.9 * kl("none")


def test_plans_go_round(tmp_path: Path, trained: DigitsViT, digit_data: Digits) -> None:
    program = fxprune.plan(
        trained,
        digit_data.test_images[:2],
        flops=0.6,
        prune="heads,ffn,tokens",
        tokens="tome{share=0.5,schedule=constant}",
        data=calibration(digit_data, 1),
        out=tmp_path / "plan.json",
    )
    plan = CompressionPlan.read(tmp_path / "plan.json")
    assert plan.tokens == program.need("plan").tokens
    assert plan.to_json() == program.need("plan").to_json()
    found = fxprune.apply(
        trained, tmp_path / "plan.json", digit_data.test_images[:2], target="onnx", out=tmp_path / "x"
    )
    assert found.report["cost"]["compressed"] == plan.about["predicted"]
    assert found.report["parity"]["ok"]
    back = fxprune.load(tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(back(digit_data.test_images[:5]), found.module(digit_data.test_images[:5]))
    assert (tmp_path / "x" / "tokens.png").read_bytes().startswith(b"\x89PNG")
    assert found.report["tokens"]["picture"] == "tokens.png"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"tokens": {"reducer": "tome"}}, "tokens need reducer and removed"),
        ({"tokens": {"reducer": "tome", "removed": {"blocks.0.attn.proj:token": -1}}}, "site names and counts"),
        ({"tokens": {"reducer": "tome", "removed": {"blocks.9.attn.proj:token": 1}}}, "no attention"),
        (
            {"tokens": {"reducer": "tome", "removed": {"blocks.0.attn.proj:token": 12}}},
            "more tokens than can go at once",
        ),
        ({"tokens": {"reducer": "tone", "removed": {"blocks.0.attn.proj:token": 1}}}, "did you mean 'tome'"),
    ],
)
def test_edited_plans_are_checked(
    edit: dict[str, Any], message: str, tmp_path: Path, trained: DigitsViT, digit_data: Digits
) -> None:
    text = json.dumps({"fxprune_plan": 1, "about": {}, "groups": {}, **edit})
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises((PlanError, OptionError), match=message):
        fxprune.apply(trained, tmp_path / "plan.json", digit_data.test_images[:2])


def test_dense_outputs_with_unmerge() -> None:
    model, x = scrambled(TokenViT(read="grid")), torch.randn(2, 3, 32, 32)
    with pytest.raises(NothingToPrune, match="part of the tokens"):
        fxprune.compile(model, x, tokens="tome:r=3")
    found = fxprune.compile(model, x, tokens="tome:r=3", unmerge=True)
    assert found.module(x).shape == model(x).shape
    assert found.report["tokens"]["unmerge"]


def test_mistakes_are_told(trained: DigitsViT, digit_data: Digits) -> None:
    x = digit_data.test_images[:2]
    with pytest.raises(OptionError, match="save multiply-accumulates and time, and nothing else"):
        fxprune.compile(trained, x, params=0.8, prune="tokens")
    with pytest.raises(BudgetInfeasible, match="tokens alone do not meet the budget"):
        fxprune.compile(trained, x, flops=0.05, prune="tokens")
    with pytest.raises(OptionError, match="rounds and tokens"):
        fxprune.compile(trained, x, flops=0.5, prune="heads,tokens", rounds=2, data=[x])
    with pytest.raises(NothingToPrune, match="cannot be reduced"):
        fxprune.compile(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), torch.randn(2, 8), tokens="tome:r=1"
        )
    with pytest.raises(OptionError, match="give exactly one budget"):
        fxprune.compile(trained, x, tokens="tome")


def test_the_command_line(
    tmp_path: Path, trained: DigitsViT, digit_data: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.export.save(
        torch.export.export(
            trained, (digit_data.test_images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
        ),
        tmp_path / "vit.pt2",
    )
    assert (
        main(
            [
                "compile",
                str(tmp_path / "vit.pt2"),
                "--tokens",
                "tome:r=2",
                "--out",
                str(tmp_path / "a"),
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)["report"]
    assert [s["left"] for s in token_sites(report)["sites"]] == [15, 13]
    assert main(["inspect", str(tmp_path / "vit.pt2"), "--json", "--quiet"]) == 0
    sites = json.loads(capsys.readouterr().out)["tokens"]["sites"]
    assert [(s["tokens"], s["protected"], s["frozen"]) for s in sites] == [(17, 1, "")] * 2
    assert main(["inspect", str(tmp_path / "vit.pt2")]) == 0
    assert "17 (1 protected) may be reduced behind 2 attentions" in capsys.readouterr().err
    assert main(["compile", str(tmp_path / "vit.pt2"), "--tokens", "tome:r=2", "--out", str(tmp_path / "a")]) == 0
    assert "17 in front, then 15 13" in capsys.readouterr().err
    assert main(["compile", str(tmp_path / "vit.pt2"), "--tokens", "tomme:r=2", "--out", str(tmp_path / "b")]) == 2
    assert "did you mean 'tome'" in capsys.readouterr().err
