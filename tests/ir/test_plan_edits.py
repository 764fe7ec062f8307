"""A plan edited by hand and applied: what the user meant, or an error at the line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.token_models import TokenViT, scrambled
from torch import nn

import fxprune
from fxprune import OptionError, PlanError


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    fxprune.plan(model, "2x6", flops=0.5, out="plan.json")
    return model


def edited(old: str, new: str) -> str:
    """The plan with a piece replaced, wherever on its line it is."""
    text = Path("plan.json").read_text()
    assert len(re.findall(old, text)) == 1
    Path("plan.json").write_text(re.sub(old, new, text))
    return "plan.json"


def line_of(word: str) -> int:
    return next(n for n, line in enumerate(Path("plan.json").read_text().splitlines(), 1) if word in line)


def test_an_edited_plan_is_what_comes_out(chain: nn.Module) -> None:
    plan = edited(r'"keep": \[.*?\]', '"keep": [1, 2, 5]')
    notes: list[str] = []
    made = fxprune.apply(chain, plan, "2x6", on_event=lambda e: notes.append(e.text) if e.kind == "note" else None)
    assert made.module.state_dict()["0.weight"].shape == (3, 6)
    torch.testing.assert_close(made.module.state_dict()["0.weight"], chain[0].weight[[1, 2, 5]])
    assert any("0:ffn (3 of 40)" in note and "multiples of 8" in note for note in notes)
    assert notes[-1] in made.report["notes"]


def test_multiples_are_insisted_on_when_asked(chain: nn.Module) -> None:
    plan = edited(r'"keep": \[.*?\]', '"keep": [1, 2, 5]')
    with pytest.raises(PlanError, match="not a multiple") as caught:
        fxprune.apply(chain, plan, "2x6", align=2)
    assert f"plan.json:{line_of('0:ffn')}" in caught.value.where
    assert "keep 2 or 4" in caught.value.cure
    with pytest.raises(OptionError, match="at least 1"):
        fxprune.apply(chain, plan, "2x6", align=0)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"0:ffn"', '"0:fnn"', "did you mean '0:ffn'"),
        ('"kind": "ffn"', '"kind": "head"', 'write "kind": "ffn"'),
        ('"size": 40', '"size": 48', "40 elements here and 48"),
        (r'"keep": \[.*?\]', '"keep": [1, 40]', "out of range"),
    ],
)
def test_what_cannot_be_is_an_error_at_its_line(chain: nn.Module, old: str, new: str, says: str) -> None:
    plan = edited(old, new)
    with pytest.raises(PlanError, match=says) as caught:
        fxprune.apply(chain, plan, "2x6")
    assert f"plan.json:{line_of(':f')}" in caught.value.where


def test_token_sites_have_lines_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = scrambled(TokenViT(depth=2)), torch.randn(2, 3, 32, 32)
    program = fxprune.plan(model, x, tokens="random:r=3", out="plan.json")
    site = next(iter(program.need("plan").tokens.removed))
    entry = f'"{site}": {{"kind": "token", "reducer": "random", "removed": '
    for old, new, says in ((f'"{site}"', '"nowhere"', "no attention"), (entry + "3", entry + "300", "at once")):
        Path("plan.json").write_text(program.need("plan").to_json())
        plan = edited(re.escape(old), new)
        with pytest.raises(PlanError, match=says) as caught:
            fxprune.apply(model, plan, x)
        assert f"plan.json:{line_of(new)}" in caught.value.where
