"""Sweeps: scored once, each point what compile makes, the smallest within the drop, taken up where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from support.reports import parsed, references, words
from torch import nn

import fxprune
from fxprune.artifact.artifact import Artifact, load
from fxprune.artifact.files import read_report
from fxprune.cli.entry import INTERRUPTED, OK, USER_ERROR, main
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import NothingToPrune, OptionError
from fxprune.ir.cost import Budget
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.importance.damage import divergence
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.passes.transform.slice_axes import SliceAxes
from fxprune.workflows import sweep as sweeping
from fxprune.workflows.points import Sweep
from fxprune.workflows.sensitivity import sensitivity
from fxprune.workflows.sweep import Judging, Timing, budgets

COMMAND = [
    "sweep",
    "model.pt2",
    "--data",
    "data.pt",
    "--samples",
    "160",
    "--importance",
    "fisher",
    "--recover",
    "ridge",
    "--align",
    "4",
]


def write_files() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    batch = ({0: torch.export.Dim("batch", min=1, max=512)},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 6),), dynamic_shapes=batch), "model.pt2")
    x = torch.randn(160, 6)
    with torch.no_grad():
        torch.save({"x": x, "labels": model(x).argmax(1)}, "data.pt")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, its data, and a sweep of it."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_files()
        runs = []
        run = ScoreGroups.run
        patch.setattr(ScoreGroups, "run", lambda self, program: runs.append(1) or run(self, program))
        assert (
            main(
                [
                    *COMMAND,
                    "--flops",
                    "0.9,0.6,0.3,0.001",
                    "--max-drop",
                    "0.05",
                    "--bisect",
                    "2",
                    "--seconds",
                    "0.02",
                    "--sensitivity",
                    "--out",
                    "sw",
                    "-q",
                ]
            )
            == OK
        )
        assert len(runs) == 1
    return folder


@pytest.fixture
def folder(swept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(swept)
    return swept


def told() -> dict[str, Any]:
    return json.loads(Path("sw/sweep.json").read_text())


def test_every_point_meets_its_budget_and_is_an_artefact(folder: Path) -> None:
    result = told()
    assert {0.9, 0.6, 0.3, 0.001} < {p["ratio"] for p in result["points"]}
    for point in result["points"]:
        if "infeasible" in point:
            assert point["ratio"] == 0.001
            assert "BudgetInfeasible" not in point["infeasible"]
            continue
        assert point["cost"]["flops"] <= point["ratio"] * result["dense"]["cost"]["flops"]
        report = json.loads(Path("sw", point["artifact"], "report.json").read_text())
        assert report["sweep"]["figures"] == point["figures"]
        assert report["parity"]["ok"]
        assert Path("sw", point["artifact"], "report.html").exists()


def test_judged_on_samples_that_nothing_saw(folder: Path) -> None:
    """The last quarter; accuracy is that of the artefact, counted by hand."""
    result, data = told(), torch.load("data.pt")
    assert result["judged"]["samples"] == 32  # one of five batches of 32: a batch is the smallest part
    x, y = data["x"][-32:], data["labels"][-32:]
    assert result["measure"] == "accuracy"
    assert result["dense"]["value"] == 1.0
    for point in result["points"]:
        if "drop" in point:
            with torch.no_grad():
                found = float((load(Path("sw", point["artifact"]))(x).argmax(1) == y).double().mean())
            assert point["figures"]["accuracy"] == pytest.approx(found)
            assert point["drop"] == pytest.approx(1.0 - found)


def test_a_point_is_what_compile_makes(folder: Path) -> None:
    data = torch.load("data.pt")
    batches = tuple(
        Batch((x,), {}, y) for x, y in zip(data["x"][:128].split(32), data["labels"][:128].split(32), strict=True)
    )
    made = fxprune.compile(
        "model.pt2",
        flops=0.6,
        data=Calibration(batches, "here"),
        importance="fisher",
        recover="ridge",
        align=4,
        on_event=lambda _: None,
    )
    point = json.loads(Path("sw/0.6/plan.json").read_text())["choices"]
    assert {g: tuple(c["keep"]) for g, c in point.items()} == {g: c.keep for g, c in made.plan.choices.items()}
    x = torch.randn(5, 6)
    torch.testing.assert_close(load("sw/0.6")(x), made.module(x), rtol=0, atol=0)


def test_the_smallest_within_the_drop_is_picked(folder: Path) -> None:
    result = told()
    good = [p for p in result["points"] if "drop" in p and p["drop"] <= 0.05]
    chosen = next(p for p in result["points"] if p.get("artifact") == result["chosen"])
    assert chosen["cost"]["flops"] == min(p["cost"]["flops"] for p in good)
    tried = {p["ratio"] for p in result["points"]} - {0.9, 0.6, 0.3, 0.001}
    assert tried  # bisection looked between
    assert min(tried) > 0.001
    assert len(tried) <= 2


def test_every_point_and_the_dense_model_replay(folder: Path, tmp_path: Path) -> None:
    """By the options of its report, and by its pipeline with the same data and the same share of it held back."""
    x, brief = torch.randn(5, 6), ["--seconds", "0", "-q"]
    common = ["--data", "data.pt", "--samples", "160", "--held-out", "0.25", *brief]
    for name, more in (("0.6", []), ("dense", ["--plan", "sw/dense/plan.json"])):
        report = read_report(Path("sw", name))
        assert (
            main(
                [
                    "compile",
                    "model.pt2",
                    "--pipeline",
                    report["pipeline"],
                    *more,
                    *common,
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == OK
        )
        again = read_report(tmp_path / name)
        assert again["pipeline"] == report["pipeline"]
        torch.testing.assert_close(load(tmp_path / name)(x), load(Path("sw", name))(x), rtol=0, atol=0)
    report, again = read_report(Path("sw/0.6")), read_report(tmp_path / "0.6")
    assert report["data"] == again["data"]
    assert (report["data"]["samples"], report["data"]["held_out"]) == (128, 0.25)
    assert report["agreement"] == again["agreement"]
    assert report["agreement"]["held_out"]
    assert main(["compile", "model.pt2", "--config", "sw/0.6", *brief, "--out", str(tmp_path / "o")]) == OK
    assert read_report(tmp_path / "o")["files"]["model.pt2"] == report["files"]["model.pt2"]


def test_rounds_are_of_every_ratio(folder: Path, tmp_path: Path) -> None:
    """The first round is scored once for all; a point is still what compile makes of the same options."""
    sweep = [*COMMAND, "--flops", "0.6,0.4", "--rounds", "2", "--seconds", "0", "--out", str(tmp_path / "sw"), "-q"]
    assert main(sweep) == OK
    report = read_report(tmp_path / "sw" / "0.4")
    assert report["pipeline"].count("score-groups") == 2
    again = ["compile", "model.pt2", "--config", str(tmp_path / "sw" / "0.4"), "--seconds", "0", "-q"]
    assert main([*again, "--out", str(tmp_path / "one")]) == OK
    assert read_report(tmp_path / "one")["pipeline"] == report["pipeline"]
    assert read_report(tmp_path / "one")["files"]["model.pt2"] == report["files"]["model.pt2"]


def test_nothing_is_held_back_where_there_is_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (
        (["--held-out", "1"], "lies between 0 and 1"),
        (["--held-out", "0.5"], "there is none"),
        (["--held-out", "0.5", "--data", "data.pt", "--samples", "1"], "1 samples in batches"),
    ):
        assert main(["compile", "model.pt2", "--flops", "0.5", *more, "--out", "x"]) == USER_ERROR
        assert said in capsys.readouterr().err
    assert not Path("x").exists()


def test_latency_is_of_all_points_and_dense(folder: Path) -> None:
    (row,) = told()["latency"]
    assert row["batch"] == 1
    for point in told()["points"]:
        if "artifact" in point:  # each knows how fast it is, from the same rounds
            (one,) = read_report(folder / "sw" / point["artifact"])["measured"]["rows"]
            time = row["timings"][point["artifact"]]
            assert (one["batch"], one["by"], one["ratio"]) == (1, "sweep", time["ratio"])
            assert one["compressed_ms"] == pytest.approx(time["median_ms"])
            Artifact.read(folder / "sw" / point["artifact"])
    assert set(row["timings"]) == {"dense", *(p["artifact"] for p in told()["points"] if "artifact" in p)}
    dense = json.loads(Path("sw/dense/report.json").read_text())
    assert dense["cost"]["ratio"] == {"flops": 1.0, "params": 1.0, "bytes": 1.0}
    x = torch.randn(3, 6)
    torch.testing.assert_close(load("sw/dense")(x), torch.export.load("model.pt2").module()(x))


def test_the_page_of_a_sweep(folder: Path) -> None:
    html = Path("sw/sweep.html").read_text()
    text = words(parsed(html))
    assert all(r.startswith(("data:", "#")) for r in references(html))
    for wanted in (
        "Chosen",
        "The front",
        "Sensitivity",
        "out of reach",
        "(chosen)",
        "accuracy against latency at batch 1",
        "nothing was decided or fitted",
    ):
        assert wanted in text
    result = told()
    assert f"{result['max_drop']:g}" in text
    nothing = {
        **result,
        "chosen": None,
        "latency": [],
        "sensitivity": None,
        "points": [p for p in result["points"] if "infeasible" in p],
    }
    from fxprune.report.sweep import render

    assert "keep the dense model" in words(parsed(render(nothing)))


def test_the_same_command_does_nothing_twice(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(swept, tmp_path / "copy"))  # what it tells of the sweep is written anew
    monkeypatch.setattr(Sweep, "_make_point", lambda *_: pytest.fail("made again"))
    files = {p: p.stat().st_mtime_ns for p in Path("sw").glob("0.*/model.pt2")}
    assert main([*COMMAND, "--flops", "0.9,0.6", "--seconds", "0", "--out", "sw", "--json"]) == OK
    out, err = capsys.readouterr()
    assert "flops=0.6 was finished before" in err
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert json.loads(out)["chosen"] is None


def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    made, budgets_made = Sweep._make_point, list[float]()

    def stopping(self: Sweep, place: Path, budget: Budget) -> dict[str, Any]:
        budgets_made.append(budget.amount)
        if len(budgets_made) == 2:
            raise KeyboardInterrupt
        return made(self, place, budget)

    monkeypatch.setattr(Sweep, "_make_point", stopping)
    command = [*COMMAND, "--flops", "0.9,0.5", "--seconds", "0", "--out", "sw", "-q"]
    assert main(command) == INTERRUPTED
    assert (tmp_path / "sw" / "0.9").is_dir()
    assert main(command) == OK
    assert budgets_made == [0.9, 0.5, 0.5]
    assert [p["ratio"] for p in told()["points"]] == [0.9, 0.5]
    assert not list(tmp_path.glob(".*progress"))
    assert {p.name for p in Path("sw").iterdir()} == {"0.9", "0.5", "sweep.json", "sweep.html"}
    # other data: nothing is taken up
    torch.save({k: v.flip(0) for k, v in torch.load("data.pt").items()}, "data.pt")
    assert main(command) == OK
    assert budgets_made[3:] == [0.9, 0.5]


def test_bad_requests(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for argv, said in (
        ([*COMMAND, "--flops", "0.5,0.9G", "--out", "x"], "a sweep takes ratios"),
        ([*COMMAND, "--out", "x"], "the ratios of exactly one budget"),
        ([*COMMAND, "--flops", "0.5", "--params", "0.5", "--out", "x"], "found 2 of"),
        ([*COMMAND, "--flops", "0.5", "--max-drop", "2", "--out", "x"], "a drop is a share"),
        ([*COMMAND, "--flops", "0.5", "--blocks", "32x32", "--out", "x"], "fxprune sweep takes no --blocks"),
        ([*COMMAND, "--latency", "0.5", "--out", "x"], "compile meets a budget of time"),
        ([*COMMAND, "--flops", "0.5", "--batches", "0", "--out", "x"], "not a list of batch sizes"),
        ([*COMMAND, "--flops", "0.5", "--held-out", "1", "--out", "x"], "held out"),
        ([*COMMAND, "--flops", "0.5", "--out", str(tmp_path)], "no sweep wrote it"),
        (["sweep", "model.pt2", "--flops", "0.5", "--out", "x"], "a sweep needs data"),
        (["sweep", "none.pt2", "--data", "data.pt", "--flops", "0.5", "--out", "x"], "none.pt2"),
    ):
        assert main(argv) == USER_ERROR, argv
        assert said in capsys.readouterr().err
    assert not Path("x").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_bisection_narrows_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    one = object.__new__(Sweep)
    one.points = [{"ratio": 0.9, "drop": 0.0}, {"ratio": 0.5, "drop": 0.2}, {"ratio": 0.2, "infeasible": "no"}]
    monkeypatch.setattr(
        Sweep,
        "try_",
        lambda self, budget: self.points.append({"ratio": budget.amount, "drop": max(0.0, 0.8 - budget.amount)}),
    )
    one.narrow("flops", 0.01, 3)
    assert [p["ratio"] for p in one.points[3:]] == [0.7, 0.8, 0.75]
    one.points = [{"ratio": 0.9, "drop": 0.5}]
    one.narrow("flops", 0.01, 2)  # between dense and the first
    assert [p["ratio"] for p in one.points[1:]] == [0.95, 0.925]
    one.points = [{"ratio": 0.4, "drop": 0.0}]
    one.narrow("flops", 0.01, 2)  # the smallest that was asked for is good: nothing to look for
    assert len(one.points) == 1


def test_budgets_of_a_sweep() -> None:
    assert [b.amount for b in budgets({"flops": "0.5,0.9, 0.75", "params": None})] == [0.9, 0.75, 0.5]
    assert budgets({"params": [0.5, 0.5]}) == [Budget("params", 0.5)]
    assert Timing().batches == (1,)
    assert Judging().max_drop is None


def test_without_labels_agreement_is_the_measure(folder: Path, tmp_path: Path) -> None:
    x = torch.load("data.pt")["x"]
    result = sweeping.sweep(
        "model.pt2",
        ratios=budgets({"flops": 0.5}),
        data=x,
        samples=160,
        importance="fisher",
        recover="none",
        out=tmp_path / "s",
        timing=Timing(seconds=0),
        on_event=lambda _: None,
    )
    assert result["measure"] == "top1"
    assert result["dense"]["value"] == 1.0
    (point,) = result["points"]
    with torch.no_grad():
        dense = torch.export.load("model.pt2").module()(x[-32:])
        small = load(tmp_path / "s" / "0.5")(x[-32:])
    assert point["figures"]["top1"] == float((dense.argmax(1) == small.argmax(1)).double().mean())


# ------------------------------------------------------------ sensitivity


@pytest.fixture(scope="module")
def scored(trained_weights: dict[str, torch.Tensor], digit_data: Any) -> tuple[Program, list[Batch]]:
    model = tiny_vit()
    model.load_state_dict(trained_weights)
    program = fxprune.inspect(model.eval(), torch.randn(2, 1, 8, 8), on_event=lambda _: None)
    return ScoreGroups(criterion="l2").run(program), [Batch((x,)) for x in digit_data.test_images[:24].split(16)]


def test_sensitivity_equals_a_real_cut(scored: tuple[Program, list[Batch]]) -> None:
    """Pain 20: to 1e-6 of what slicing does, for every group, exact ones (masked) and the residual width (sliced)."""
    program, batches = scored
    kinds = ["head", "ffn", "width"]
    found = sensitivity(program, batches, kinds, (0.75, 0.25))
    assert {g["kind"] for g in found["groups"]} == set(kinds)
    for group in found["groups"]:
        scores = program.need("scores")[group["group"]].values
        for level in group["levels"]:
            keep = tuple(sorted(torch.argsort(scores.double(), descending=True, stable=True)[: level["kept"]].tolist()))
            plan = CompressionPlan({group["group"]: Choice(group["kind"], group["size"], keep)})
            real = divergence(program, SliceAxes().run(program.but(plan=plan)), batches)
            assert level["damage"] == pytest.approx(real, rel=1e-6, abs=1e-6)
            assert level["damage"] > 0
            assert level["flops_saved"] > 0
    worst = {g["group"]: g["levels"][-1]["damage"] for g in found["groups"]}
    assert max(worst, key=lambda g: worst[g]) == "patch:width"  # what everything is coupled to is the least robust


def test_sensitivity_of_kinds_and_what_is_frozen(
    trained_weights: dict[str, torch.Tensor], scored: tuple[Program, list[Batch]]
) -> None:
    program, batches = scored
    frozen = program.but(
        groups=tuple(g.but(frozen="asked") if g.name == "blocks.0.mlp.0:ffn" else g for g in program.need("groups"))
    )
    found = sensitivity(frozen, batches, ["ffn"], (0.5,))
    assert [g["group"] for g in found["groups"]] == ["blocks.1.mlp.0:ffn"]
    assert [(f["group"], f["why"]) for f in found["frozen"]] == [("blocks.0.mlp.0:ffn", "asked")]
    (kind,) = found["kinds"]
    assert kind["levels"][0]["damage"] == pytest.approx(found["groups"][0]["levels"][0]["damage"], rel=1e-6, abs=1e-6)
    with pytest.raises(NothingToPrune):
        sensitivity(program, batches, ["channel"])
    with pytest.raises(OptionError):
        sensitivity(program, batches, ["ffn"], (1.0,))


def test_the_command_of_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", "model.pt2", "--data", "data.pt"]
    assert main([*command, "--importance", "l2", "--shares", "0.5", "--json"]) == OK
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [len(g["levels"]) for g in result["groups"]] == [1] * len(result["groups"])
    assert "nothing recovered" in err
    assert main([*command, "--shares", "half"]) == USER_ERROR
