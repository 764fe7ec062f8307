"""Ctrl-C during a compile, and the same command again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_models import TokenViT, scrambled
from torch import nn

from fxprune.artifact.artifact import Artifact
from fxprune.cli.entry import INTERRUPTED, OK, USER_ERROR, main
from fxprune.driver import decide
from fxprune.driver.token_scores import TokenScores
from fxprune.errors import FxpruneError
from fxprune.ir.token_flow import TokenSite
from fxprune.passes.analysis.importance.mask_gradients import TappedRun
from fxprune.passes.transform.reducers.reducer import Reducer
from fxprune.process import journal

KEPT = Path(".small.progress")
FISHER = ["model.pt2", "--data", "data.pt", "--flops", "0.6", "--importance", "fisher"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and four batches of data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "BYTES_PER_SECOND", float("inf"))  # these jobs take no time
    save_model(0)
    torch.save({"x": torch.randn(128, 6)}, "data.pt")
    return tmp_path


def save_model(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 6),), dynamic_shapes=batch), "model.pt2")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Make batch number ``n`` of a run meet Ctrl-C; returns the batches that ran since."""
    forward, ran, limit = TappedRun.forward, list[int](), [-1]

    def watched(self: TappedRun) -> list[Any]:
        if len(ran) == limit[0]:
            raise KeyboardInterrupt
        ran.append(len(ran))
        return forward(self)

    def arm(n: int) -> list[int]:
        ran.clear()
        limit[0] = n
        return ran

    monkeypatch.setattr(TappedRun, "forward", watched)
    return arm


def test_an_interrupted_compile_says_how_to_go_on_and_does(
    folder: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]]
) -> None:
    assert main(["compile", *FISHER, "--out", "whole", "-q"]) == OK
    Path("small").mkdir()
    stop_at(3)
    assert main(["compile", *FISHER, "--out", "small", "-q"]) == INTERRUPTED
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip() == (
        f"interrupted; finished scoring is kept in {KEPT.resolve()}, the same command goes on from there"
    )
    assert list(Path("small").iterdir()) == []

    ran = stop_at(-1)
    assert main(["compile", *FISHER, "--out", "small", "--json"]) == OK
    out, err = capsys.readouterr()
    assert len(ran) == 1
    assert "resumed: 3 of 4 jobs of fisher were found" in err
    assert json.loads(out)["artifact"] == "small"
    assert Path("small/plan.json").read_bytes() == Path("whole/plan.json").read_bytes()
    assert not KEPT.exists()


@pytest.mark.drawn(2)
@pytest.mark.parametrize("change", ["weights", "data", "seed", "criterion"])
def test_another_run_starts_anew(
    change: str, folder: Path, capsys: pytest.CaptureFixture[str], stop_at: Callable[[int], list[int]]
) -> None:
    stop_at(3)
    assert main(["compile", *FISHER, "--out", "small", "-q"]) == INTERRUPTED
    ran, more = stop_at(-1), list[str]()
    if change == "weights":
        save_model(1)
    if change == "data":
        torch.save({"x": torch.randn(128, 6) + 1}, "data.pt")
    if change == "seed":
        more = ["--seed", "1"]
    if change == "criterion":
        more = ["--importance", "taylor"]
    assert main(["compile", *FISHER, "--out", "small", *more]) == OK
    assert len(ran) == 4
    err = capsys.readouterr().err
    assert "discarded" in err
    assert "resumed" not in err
    assert not KEPT.exists()


def test_a_plan_is_resumed_too_and_a_late_error_keeps_what_took_long(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    stop_at: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_at(2)
    assert main(["plan", *FISHER, "--out", "p.json", "-q"]) == INTERRUPTED
    assert Path(".p.json.progress").is_dir()
    ran = stop_at(-1)
    assert main(["plan", *FISHER, "--out", "p.json", "-q"]) == OK
    assert len(ran) == 2
    assert not Path(".p.json.progress").exists()

    monkeypatch.setattr(journal, "WORTH_KEEPING", 0.0)
    save = Artifact.save
    monkeypatch.setattr("fxprune.artifact.artifact.Artifact.save", full_disk)
    assert main(["compile", *FISHER, "--out", "small", "-q"]) == USER_ERROR
    assert KEPT.is_dir()
    monkeypatch.setattr("fxprune.artifact.artifact.Artifact.save", save)
    assert main(["compile", *FISHER, "--out", "small"]) == OK
    assert "resumed: 4 of 4" in capsys.readouterr().err


def full_disk(*_: object, **__: object) -> None:
    raise FxpruneError("the result cannot be written", why="no space left")


def test_a_criterion_without_jobs_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(decide, "fingerprint", lambda *_: pytest.fail("nothing is long enough to be hashed"))
    assert main(["compile", "model.pt2", "--flops", "0.6", "--out", "small", "-q"]) == OK
    assert {p.name for p in folder.iterdir()} == {"model.pt2", "data.pt", "small"}


def test_scored_tokens_are_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "BYTES_PER_SECOND", float("inf"))
    images = torch.randn(16, 3, 32, 32)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(scrambled(TokenViT(depth=2)), (images[:2],), dynamic_shapes=batch), "vit.pt2")
    torch.save({"images": images}, "images.pt")
    wanted = [
        "plan",
        "vit.pt2",
        "--data",
        "images.pt",
        "--flops",
        "0.8",
        "--prune",
        "tokens",
        "--tokens",
        "tome{schedule=optin,guard=false}",
    ]
    loss, ran = TokenScores.loss, list[str]()

    def stopping(self: TokenScores, site: TokenSite, reducer: Reducer, r: int) -> tuple[float, float]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(site.name)
        return loss(self, site, reducer, r)

    monkeypatch.setattr(TokenScores, "loss", stopping)
    assert main([*wanted, "--out", "p.json", "-q"]) == INTERRUPTED
    ran[:] = [""] * 4
    assert main([*wanted, "--out", "p.json"]) == OK
    assert "resumed: 3 of 10 jobs of tokens.curves were found" in capsys.readouterr().err
    assert len(ran) == 4 + 7
    assert main([*wanted, "--out", "whole.json", "-q"]) == OK
    assert len(ran) == 4 + 7 + 10
    assert Path("p.json").read_bytes() == Path("whole.json").read_bytes()
