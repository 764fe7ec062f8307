"""tools/bench/accuracy.py on a tiny model: what it writes, that it resumes, its targets, its picture, its peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from bench.accuracy import accuracy, rows
from bench.accuracy.models import Images, Recipe, train_cached
from bench.accuracy.plot import plot
from bench.accuracy.rows import Row, criterion_of, missing
from bench.accuracy.targets import DROPS, check
from bench.accuracy.tasks import Pictures
from bench.record import read
from fxprune.data import Batch

RATIO, NAME = 0.6, "vit-digits"


class Classifier(nn.Module):
    """images [batch, 1, 4, 4] -> logits [batch, 3]"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(images.flatten(1))))))


def tiny_task() -> Any:
    """A random classifier whose own answers are the labels, so that the dense model is right by construction."""
    generator = torch.Generator().manual_seed(0)
    model, images = Classifier().eval(), torch.randn(160, 1, 4, 4, generator=generator)
    with torch.no_grad():
        labels = model(images).argmax(1)
    split = Images(images[:96], labels[:96], images[96:], labels[96:])
    return Pictures(NAME, model, split, {"weights": "random"}, align=1)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The command line finds the tiny task under the name of a real one; what it opened."""
    tasks: list[Any] = []

    def open_tiny(*_: Any) -> Any:
        torch.manual_seed(0)  # same weights every time
        tasks.append(tiny_task())
        return tasks[-1]

    monkeypatch.setattr(accuracy, "open_task", open_tiny)
    monkeypatch.setattr(accuracy, "plot", lambda *_: [])  # tested below
    return tasks


def arguments(out: Path, *more: str) -> list[str]:
    return ["--out", str(out), "--tasks", NAME, "--ratios", str(RATIO), "--samples", "64", *more]


def test_it_writes_what_it_measured_and_measures_nothing_twice(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "accuracy.json"
    assert accuracy.main(arguments(out, "--rows", "l2,ptf", "--seeds", "0,1")) == 0
    written = read(out)
    assert written["tasks"][NAME]["dense"] == 100
    assert written["tasks"][NAME]["dense_macs"] == 16 * 64 + 64 * 32 + 96
    found = {(r["row"], r["seed"]): r for r in written["measured"]}
    assert set(found) == {("l2", 0), ("ptf", 0), ("ptf", 1)}, "l2 depends on no seed"
    for record in found.values():
        assert 0 <= record["accuracy"] <= 100
        assert record["macs"] <= RATIO * written["tasks"][NAME]["dense_macs"]
    assert found["ptf", 0]["labels"]
    assert not found["l2", 0]["labels"]
    cell = written["summary"][NAME]["ptf"][f"{RATIO:g}"]
    figures = [found["ptf", seed]["accuracy"] for seed in (0, 1)]
    assert cell["seeds"] == [0, 1]
    assert (cell["min"], cell["max"]) == (min(figures), max(figures))
    assert cell["mean"] == pytest.approx(sum(figures) / 2, abs=1e-3)

    monkeypatch.setattr(type(opened[0]), "accuracy", lambda *_: pytest.fail("measured again"))
    assert accuracy.main(arguments(out, "--rows", "l2,ptf", "--seeds", "0,1")) == 0
    assert read(out)["measured"] == written["measured"]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        accuracy.main(arguments(out, "--rows", "l2,ptf", "--again", "l2", "--seeds", "0"))


def test_the_default_row_is_the_product_as_it_is_used(opened: Any, tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    assert accuracy.main(arguments(out, "--rows", "default", "--seeds", "0")) == 0
    (record,) = read(out)["measured"]
    small = fxprune.compile(
        opened[0].eager(),
        opened[0].example().pick(torch.tensor([0, 0])).args,
        flops=RATIO,
        data=opened[0].calibration(64, 0),
        align=8,
        held_out=0,
        on_event=lambda _: None,
    )
    assert record["macs"] == small.report["cost"]["compressed"]["flops"]
    assert record["method"] == small.report["recovery"]["method"]
    assert record["cut"] == {"ffn": 2}


def test_rows_without_their_parts_are_named(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(rows.ROWS, "l2", rows.Row("l2", "no-such-criterion", "nothing"))
    out = tmp_path / "accuracy.json"
    assert accuracy.main(arguments(out, "--rows", "l2", "--seeds", "0")) == 0
    assert "no-such-criterion" in read(out)["missing"]["l2"]
    assert "missing: l2" in capsys.readouterr().out


def test_a_row_says_which_part_is_not_there() -> None:
    assert not missing(Row("x", "fisher", "x"))
    assert "magic" in missing(Row("x", "fisher", "x", recover="magic"))
    assert "colour" in missing(Row("x", "fisher{colour=3}", "x"))
    assert criterion_of("fisher{probes=7}").probes == 7  # type: ignore[attr-defined]


def cells(best: float, other: float) -> dict[str, Any]:
    ratios = [f"{ratio:g}" for ratio in DROPS["minilm-stsb"]]
    return {"minilm-stsb": {"default": {r: {"mean": best} for r in ratios}, "l2": {r: {"mean": other} for r in ratios}}}


@pytest.mark.parametrize(
    ("best", "other", "met", "missed"),
    [(86.70, 80.0, 14, 0), (86.50, 80.0, 10, 4), (86.70, 86.70, 7, 7), (86.70, 86.71, 7, 7)],
)
def test_targets(best: float, other: float, met: int, missed: int) -> None:
    found = check(cells(best, other), {"minilm-stsb": 86.72})
    assert tuple(map(len, found)) == (met, missed), found


def test_optimiser_steps_after_recovery_count_as_ours() -> None:
    summary = cells(86.0, 80.0)
    summary["minilm-stsb"]["optin-tune"] = {"0.3": {"mean": 86.3}}
    met, _ = check(summary, {"minilm-stsb": 86.72})
    assert any(text.startswith("minilm-stsb at 0.3: optin-tune 86.30 is 0.42 below dense") for text in met)


def test_what_was_not_measured_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--out", str(tmp_path / "nothing.json"), "--check"]) == 1
    said = capsys.readouterr().out
    assert "was not measured" in said
    assert "not measured: minilm-stsb: l2" in said


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cell = {"mean": 90.0, "min": 89.0, "max": 91.0}
    results = {
        "tasks": {"a": {"metric": "accuracy", "dense": 95.0}, "b": {"metric": "Spearman", "dense": 80.0}},
        "rows": [{"name": "l2", "title": "L2"}],
        "summary": {"a": {"l2": {"0.5": cell, "0.75": cell}}},
    }
    paths = plot(results, tmp_path / "picture")
    assert [p.suffix for p in paths] == [".png", ".svg"]
    assert all(p.stat().st_size > 1000 for p in paths)
    assert "L2" in paths[1].read_text() or "<path" in paths[1].read_text()


def test_an_edited_recipe_is_another_checkpoint(tmp_path: Path) -> None:
    from dataclasses import replace

    images = Images(
        torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,)), torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    )
    recipe = Recipe(
        "tiny", "digits", "resnet", {"channels": 1, "widths": [4, 8], "blocks": 1}, epochs=1, batch=16, bf16=False
    )
    first, about = train_cached(recipe, images, tmp_path, say=lambda _: None)
    again, _ = train_cached(recipe, images, tmp_path, say=lambda _: pytest.fail("trained again"))
    assert about["hash"] == recipe.hash
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert replace(recipe, lr=0.2).path(tmp_path) != recipe.path(tmp_path)


def test_the_peer_meets_the_budget() -> None:
    pytest.importorskip("torch_pruning")
    from peers.torch_pruning import TorchPruning, macs

    model, example = Classifier().eval(), Batch((torch.randn(1, 1, 4, 4),))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fresh() -> nn.Module:
        made = Classifier().eval()
        made.load_state_dict(state)
        return made

    dense = macs(fresh(), example)
    peer = TorchPruning(fresh, example, lambda m: [m(torch.randn(8, 1, 4, 4)).square().mean()])
    for importance in ("l2", "taylor"):
        for variant in ("uniform", "uniform global"):
            pruned = peer.prune(importance, variant, RATIO)
            assert 0.9 * RATIO * dense <= pruned.macs <= RATIO * dense
            assert pruned.model(torch.randn(5, 1, 4, 4)).shape == (5, 3)
