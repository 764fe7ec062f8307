"""The GitHub Actions workflow of the README: its commands run, and a model that got worse stops the release."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.cli.entry import main

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / "tests" / "golden" / "release.yml").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    lines = re.findall(r"^ *- run: (fxprune .*)$", WORKFLOW, flags=re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model.pt2, a plan that cuts its idle half, and labelled test data, as a user's repository holds them."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, 32:] = 0
    x = torch.randn(120, 8)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    keep = fxprune.Choice("ffn", 64, tuple(range(32)))
    (tmp_path / "plan.json").write_text(fxprune.CompressionPlan({"0:ffn": keep}).to_json())
    with torch.no_grad():
        np.savez(tmp_path / "test.npz", x=x.numpy(), labels=model(x).argmax(-1).numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_workflow_run(repository: Path) -> None:
    export, verify = commands()
    assert (export[0], verify[0]) == ("export", "verify")
    assert main([*export, "-q"]) == 0
    assert main([*verify, "-q"]) == 0
    assert {p.name for p in repository.iterdir()} == {"model.pt2", "plan.json", "test.npz", "release", "gates.xml"}
    worse = fxprune.CompressionPlan({"0:ffn": fxprune.Choice("ffn", 64, tuple(range(30, 62)))})
    Path("plan.json").write_text(worse.to_json())
    assert main([*export, "-q"]) == 3
    assert main([*verify, "-q"]) == 3


def test_the_readme_shows_this_workflow_where_it_shows_one() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [b for b in re.findall(r"^```yaml\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL) if "fxprune" in b]
    assert shown in ([], [WORKFLOW])
