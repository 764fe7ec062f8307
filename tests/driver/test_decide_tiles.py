"""``blocks=`` and ``sparse=``: from the request to the artefact, its plan, its report, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.errors import OptionError, PlanError
from fxprune.ir.linear_layers import live_tiles
from fxprune.ir.sparsity import is_two_of_four
from fxprune.request.invocation import Invocation
from fxprune.target.block_table import Timing, make_table

SHAPE = (torch.randn(2, 1, 8, 8),)


@pytest.fixture
def batches(digit_data: Digits) -> list[Tensor]:
    return list(digit_data.train_images[:192].split(32))


def compiled(model: DigitsViT, data: Any = None, **options: Any) -> fxprune.Artifact:
    return fxprune.compile(model, SHAPE, data=data, **options)


def accuracy(artifact: fxprune.Artifact, data: Digits) -> float:
    with torch.no_grad():
        return float((artifact.module.eval()(data.test_images).argmax(1) == data.test_labels).float().mean())


def outputs(artifact: fxprune.Artifact) -> Tensor:
    with torch.no_grad():
        found: Tensor = artifact.module.eval()(torch.linspace(-1, 1, 192).view(3, 1, 8, 8))
    return found


def test_tiles_meet_the_budget_and_the_report_tells_effective_from_executed(
    trained: DigitsViT, digit_data: Digits, batches: list[Tensor], tmp_path: Path
) -> None:
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    artifact = compiled(trained, batches, blocks="8x8", flops=0.5, out=tmp_path / "small")
    told = artifact.report["sparsity"]
    assert told["pattern"] == "8x8"
    assert told["criterion"] == "lsp"
    assert told["allocation"] == "kkt"
    assert told["flops"]["effective"] <= 0.5 * told["flops"]["dense"] < told["flops"]["executed"]
    assert told["flops"]["executed"] == artifact.report["cost"]["compressed"]["flops"] == told["flops"]["dense"]
    assert told["power"]["measured"] is False
    assert told["recovery"]["asked"] == "auto"
    assert artifact.plan.elements == {}
    for name, one in artifact.plan.blocks.items():
        assert torch.equal(
            live_tiles(artifact.program.tensors[name], one.tile) & one.kept,
            live_tiles(artifact.program.tensors[name], one.tile),
        )
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items()), "the caller's weights stay"
    written = json.loads((tmp_path / "small" / "report.json").read_text())
    assert written["sparsity"] == json.loads(json.dumps(told))
    assert accuracy(artifact, digit_data) > 0.75
    assert fxprune.load(tmp_path / "small")(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_the_same_cut_on_another_checkpoint_and_plan_then_apply(trained: DigitsViT, tmp_path: Path) -> None:
    direct = compiled(trained, blocks="16x16", flops=0.6)
    assert direct.report["sparsity"]["criterion"] == "magnitude"
    planned = fxprune.plan(trained, SHAPE, blocks="16x16", flops=0.6, out=tmp_path / "plan.json")
    assert planned.need("plan").blocks == direct.plan.blocks
    applied = fxprune.apply(trained, tmp_path / "plan.json", SHAPE)
    assert torch.equal(outputs(applied), outputs(direct))
    assert applied.report["sparsity"]["flops"] == direct.report["sparsity"]["flops"]
    torch.manual_seed(7)
    other = DigitsViT(dim=32, depth=2, heads=4, hidden=96).eval()
    again = fxprune.apply(other, tmp_path / "plan.json", SHAPE)
    assert again.plan.blocks == direct.plan.blocks
    for name, one in again.plan.blocks.items():
        assert torch.equal(live_tiles(again.program.tensors[name], one.tile), one.kept)


def test_slicing_comes_first_and_tiles_are_of_what_is_left(
    trained: DigitsViT, batches: list[Tensor], tmp_path: Path
) -> None:
    artifact = compiled(
        trained, batches, blocks="8x8{slice=0.75}", flops=0.5, recover="none", importance="lsp{probes=1}"
    )
    assert artifact.plan.elements
    told, cost = artifact.report["sparsity"], artifact.report["cost"]
    assert cost["compressed"]["flops"] <= 0.75 * cost["dense"]["flops"]
    assert 0.48 * cost["dense"]["flops"] <= told["flops"]["effective"] <= 0.5 * cost["dense"]["flops"], (
        "the budget is that of both, against the dense model"
    )
    assert told["flops"]["dense"] == cost["dense"]["flops"]
    for name, one in artifact.plan.blocks.items():
        assert one.shape == tuple(artifact.program.tensors[name].shape)
    assert any(one.shape != tuple(trained.state_dict()[n].shape) for n, one in artifact.plan.blocks.items())
    applied = fxprune.apply(trained, fxprune.CompressionPlan.from_json(artifact.plan.to_json()), SHAPE)
    assert torch.equal(outputs(applied), outputs(artifact))


def test_data_say_how_much_slicing_takes_before_tiles(trained: DigitsViT, batches: list[Tensor]) -> None:
    """One budget for both: what was chosen is stated, so that the pipeline needs no trial to give it again."""
    options: dict[str, Any] = {"align": 8, "recover": "none", "importance": "fisher"}
    made = compiled(trained, batches[:4], blocks="8x8{slice=auto}", flops=0.5, **options)
    (note,) = [n for n in made.report["notes"] if "before tiles are chosen" in n]
    left = float(note.split()[2])
    assert 0.5 <= left <= 1
    assert [part.split(": ")[0] for part in note.split("leaves: ")[1].split(", ")][::4] == ["1", "0.5"]
    stated = re.search(r"search-plan\{budget=flops=([\d.]+)", made.report["pipeline"])
    assert stated is not None
    assert float(stated[1]) == pytest.approx(left, rel=0.01)
    told = made.report["sparsity"]["flops"]
    assert told["effective"] <= 0.5 * told["dense"]
    again = compiled(trained, batches[:4], pipeline=made.report["pipeline"])
    assert torch.equal(outputs(again), outputs(made))


def test_tiles_beside_other_kinds_share_by_the_data_where_there_are_any(batches: list[Tensor]) -> None:
    def tiles(**given: Any) -> str:
        request = Invocation.of("compile", {"model": "m", "prune": "heads,ffn,blocks", "flops": 0.25, **given}).request
        assert request.tiles is not None
        return request.tiles.text

    assert tiles() == "32x32{slice=0.5}"
    assert tiles(data=batches) == "32x32{slice=auto}"
    with pytest.raises(OptionError, match="found with data"):
        tiles(prune="heads,ffn", blocks="16x16{slice=auto}")


def test_two_of_four_with_its_order_of_neurons(trained: DigitsViT, batches: list[Tensor]) -> None:
    plain, ordered = (compiled(trained, sparse=f"2:4{{permute={p}}}", target="eager") for p in ("false", "true"))
    assert any(one.order for one in ordered.plan.blocks.values())
    assert not any(one.order for one in plain.plan.blocks.values())
    for artifact in (plain, ordered):
        assert artifact.report["sparsity"]["pattern"] == "2:4"
        for name in artifact.plan.blocks:
            assert is_two_of_four(artifact.program.tensors[name])

    def left(artifact: fxprune.Artifact) -> float:
        return sum(float(artifact.program.tensors[n].detach().abs().sum()) for n in artifact.plan.blocks)

    assert left(ordered) > left(plain)
    applied = fxprune.apply(trained, fxprune.CompressionPlan.from_json(ordered.plan.to_json()), SHAPE)
    assert torch.equal(outputs(applied), outputs(ordered))
    fitted = compiled(trained, batches, sparse="2:4", flops=0.8, recover="obs")
    assert fitted.report["sparsity"]["criterion"] == "obert"
    assert fitted.report["sparsity"]["recovery"]["method"] == "obs"
    assert fitted.plan.elements, "slicing has a budget of its own beside 2:4"


def test_a_plan_that_orders_what_is_not_there_is_refused(trained: DigitsViT) -> None:
    plan = compiled(trained, sparse="2:4").plan
    raw = json.loads(plan.to_json())
    one = next(v for v in raw["choices"].values() if "order" in v)
    other = raw["choices"]["blocks.0.attn.qkv.weight:block"]
    other["order"] = list(range(other["shape"][1]))
    with pytest.raises(PlanError, match="reads no neurons"):
        fxprune.apply(trained, fxprune.CompressionPlan.from_json(json.dumps(raw)), SHAPE)
    one["order"] = one["order"][:-1]
    with pytest.raises(PlanError, match="order of the inputs"):
        fxprune.CompressionPlan.from_json(json.dumps(raw))


def test_targets_say_what_they_made_of_the_zeros(
    trained: DigitsViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = {}
    for target in ("eager", "onnx", "triton"):
        artifact = compiled(trained, blocks="16x16", flops=0.5, target=target, out=tmp_path / target)
        said[target] = next(n for n in artifact.report["notes"] if n.startswith("kept dense"))
        assert (
            artifact.report["sparsity"]["gate"]["macs"]["executed"]
            == artifact.report["sparsity"]["gate"]["macs"]["dense"]
        )
    assert "multiplies dense weights" in said["eager"]
    assert "no table was measured for onnxruntime on" in said["onnx"]
    assert "no table was measured for" in said["triton"]
    assert {p.name for p in (tmp_path / "triton").iterdir()} == {
        "model.triton.pt2",
        "model.pt2",
        "plan.json",
        "report.html",
        "report.json",
    }
    shapes = {tuple(t.shape) for n, t in trained.state_dict().items() if t.dim() == 2}
    rows = [Timing(n, k, "16x16", "float32", 34, 1.0, 3.0, 1.0, "rows=64,warps=4,stages=8") for n, k in shapes]
    make_table("NVIDIA X", "kernel", rows).write(tmp_path / "x.json")
    quick = compiled(
        trained, blocks=f"16x16{{table={tmp_path / 'x.json'}}}", flops=0.5, target="triton", out=tmp_path / "quick"
    )
    flops = quick.report["sparsity"]["flops"]
    assert flops["effective"] <= flops["executed"] < flops["dense"]
    assert any("block-sparse: 3.00x at M=34 (table of NVIDIA X" in n for n in quick.report["notes"])
    again = fxprune.Artifact.read(tmp_path / "quick")
    again.save(tmp_path / "again")
    told = [[n for n in a.report["notes"] if n.startswith(("kept dense", "block-sparse"))] for a in (quick, again)]
    assert told[0] == told[1]  # the table is an option of the target, which the report remembers; and nothing twice
    assert again.report["sparsity"]["flops"] == flops


def test_what_does_not_go_together_is_refused_before_the_work_begins(trained: DigitsViT) -> None:
    for options, message in (
        ({"blocks": "8x8"}, "a budget of FLOPs"),
        ({"blocks": "8x8", "params": 0.5}, "a budget of FLOPs"),
        ({"blocks": "2:4", "flops": 0.5}, 'write sparse="2:4"'),
        ({"sparse": "8x8"}, 'write sparse="2:4"'),
        ({"blocks": "8x8", "sparse": "2:4", "flops": 0.5}, "do not go together"),
        ({"blocks": "8x8{alocation=lsp}", "flops": 0.5}, "no option 'alocation'"),
        ({"blocks": "8x8{allocation=best}", "flops": 0.5}, "unknown allocation"),
        ({"blocks": "8x8{slice=2}", "flops": 0.5}, "a share of the FLOPs"),
        ({"sparse": "2:4{slice=0.5}"}, "slicing's budget"),
        ({"blocks": "8x8", "flops": 0.5, "recover": "ridge"}, "recovery needs data"),
        ({"blocks": "8x8{table=nowhere.json}", "flops": 0.5, "target": "eager"}, "no option 'table'"),
        ({"flops": 0.5, "importance": "lsp", "data": [torch.randn(4, 1, 8, 8)]}, 'blocks="32x32"'),
    ):
        with pytest.raises(OptionError, match=message):
            compiled(trained, **options)


def test_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: DigitsViT,
    capsys: pytest.CaptureFixture[str],
    batches: list[Tensor],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(trained, "model.pt")
    torch.save({"x": torch.cat(batches)}, "data.pt")
    loading = ["model.pt", "--input", "2x1x8x8", "--trust-pickle"]
    code = main(
        [
            "compile",
            *loading,
            "--blocks",
            "16x16{allocation=lsp}",
            "--flops",
            "0.6",
            "--importance",
            "lsp",
            "--data",
            "data.pt",
            "--target",
            "onnx",
            "--out",
            "small",
        ]
    )
    _, err = capsys.readouterr()
    assert code == OK, err
    assert "zeros     16x16 in" in err
    assert "GMACs are effective (0." in err
    assert "are executed (1.000)" in err
    assert "kept dense: no table was measured" in err
    assert json.loads(Path("small/report.json").read_text())["sparsity"]["allocation"] == "lsp"
    assert main(["plan", *loading, "--blocks", "16x16", "--flops", "0.6", "--out", "p.json"]) == OK
    assert "16x16 in" in capsys.readouterr().err
    assert main(["apply", *loading, "--plan", "p.json", "--out", "again", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["report"]["sparsity"]["pattern"] == "16x16"
    assert main(["compile", *loading, "--blocks", "x", "--flops", "0.6"]) == USER_ERROR
    assert "write outputs x inputs" in capsys.readouterr().err


def test_tune_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 4
    assert "there is no CUDA device" in capsys.readouterr().err
    code = main(
        [
            "tune",
            "--target",
            "onnx",
            "--shapes",
            "32x32",
            "--rows",
            "8",
            "--blocks",
            "16x16",
            "--density",
            "0.5",
            "--out",
            str(tmp_path / "t.json"),
            "--json",
        ]
    )
    out, err = capsys.readouterr()
    assert code == OK, err
    assert json.loads(out)["cases"] == 1
    assert "faster than dense in" in err
    assert main(["tune", "--rows", "many"]) == USER_ERROR
    assert "no list of numbers" in capsys.readouterr().err


def test_blocks_among_the_kinds_share_the_budget_with_slicing(trained: DigitsViT) -> None:
    made = fxprune.compile(trained, SHAPE, prune="heads,ffn,blocks", flops=0.5)
    flops = made.report["sparsity"]["flops"]
    assert made.report["sparsity"]["pattern"] == "32x32"
    assert flops["effective"] <= 0.5 * flops["dense"] < flops["executed"] <= 0.71 * flops["dense"]
    alone = fxprune.compile(trained, SHAPE, prune="blocks", flops=0.7)
    assert not alone.plan.elements
    assert alone.report["sparsity"]["flops"]["effective"] <= 0.7 * flops["dense"]
    with pytest.raises(fxprune.OptionError, match="how much slicing takes"):
        fxprune.compile(trained, SHAPE, prune="heads,blocks", flops="200k")
