"""One section for everything that could be chosen, and reports of 0.1.0, which had one for each."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from support.reports import parsed, read, words

import fxprune
from fxprune.artifact.compare import again, compare, read_valid
from fxprune.artifact.explain import explain
from fxprune.cli.entry import OK, main
from fxprune.report.entries import VERSION, entries_of, token_sites, upgraded
from fxprune.report.json_schema import problems
from fxprune.report.schema import REPORT

QUIET: dict[str, Any] = {"on_event": lambda _: None}


@pytest.fixture(scope="module")
def tiled(trained_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with neurons and tiles gone, chosen by magnitude."""
    model = tiny_vit()
    model.load_state_dict(trained_weights)
    out = tmp_path_factory.mktemp("tiled") / "small"
    fxprune.compile(model.eval(), "2x1x8x8", blocks="16x16{slice=0.8}", flops=0.5, out=out, **QUIET)
    return out


def as_of_0_1_0(report: dict[str, Any]) -> dict[str, Any]:
    """The report as 0.1.0 wrote it: token sites and sparse weights in sections of their own."""
    old = copy.deepcopy(report)
    old["fxprune_report"] = 1
    old["groups"] = [g for g in old["groups"] if g["kind"] not in ("token", "block")]
    if report.get("tokens"):
        known = token_sites(report)
        assert known is not None
        old["tokens"]["sites"] = known["sites"]
        old["frozen"] = [f for f in old["frozen"] if f["kind"] != "token"]
    if report.get("sparsity"):
        old["sparsity"]["weights"] = [
            {
                "parameter": e["parameters"][0],
                "shape": e["shape"],
                "tiles": e["size"],
                "kept": e["kept"],
                "density": e["density"],
            }
            for e in entries_of(report, "block")
        ]
    return old


def written(source: Path, folder: Path, report: dict[str, Any]) -> Path:
    """A copy of an artefact with this report."""
    shutil.copytree(source, folder)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_every_kind_is_in_one_section(reported: Path, tiled: Path) -> None:
    report, plan = read(reported)
    assert report["fxprune_report"] == VERSION
    assert {"head", "ffn", "token"} <= {g["kind"] for g in report["groups"]}
    sites = entries_of(report, "token")
    assert [e["group"] for e in sites] == [s["site"] for s in token_sites(report)["sites"] if not s["frozen"]]  # type: ignore[index]
    assert {e["group"]: e["removed"] for e in sites if e["removed"]} == dict(plan.tokens.removed)  # type: ignore[union-attr]
    left = [e["kept"] for e in sites]
    assert left[-1] == sites[0]["size"] - sum(e["removed"] for e in sites)
    assert all(e["macs"] > 0 and e["protected"] == 1 for e in sites)
    report, plan = read(tiled)
    tiles = {e["group"]: e for e in entries_of(report, "block")}
    assert tiles.keys() == {n for n, c in plan.choices.items() if c.kind == "block"}
    for name, sparsity in plan.blocks.items():
        entry = tiles[f"{name}:block"]
        assert (entry["size"], entry["kept"]) == (sparsity.tiles, int(sparsity.kept.sum()))
        assert (entry["criterion"], entry["parameters"]) == ("magnitude", [name])
        assert entry["density"] == pytest.approx(sparsity.density, abs=1e-4)
    assert problems(report, REPORT) == []


def test_reports_of_0_1_0_are_read_as_todays(reported: Path, tiled: Path, tmp_path: Path) -> None:
    for source in (reported, tiled):
        report = read(source)[0]
        old = as_of_0_1_0(report)
        assert problems(old, REPORT), "today's schema is another one"
        now = upgraded(old)
        assert now["fxprune_report"] == VERSION
        assert problems(now, REPORT) == []
        assert upgraded(report) == report
        for key in ("size", "kept"):
            assert {g["group"]: g[key] for g in now["groups"]} == {g["group"]: g[key] for g in report["groups"]}
        assert sorted(f["group"] for f in now["frozen"]) == sorted(f["group"] for f in report["frozen"])
        folder = written(source, tmp_path / f"{source.parent.name}-old", old)
        assert read_valid(folder)["groups"] == now["groups"]
        assert compare([folder])["artifacts"][0]["kept"] == compare([source])["artifacts"][0]["kept"]
        assert words(parsed(again(folder)))[:400] == words(parsed(again(source)))[:400]
        assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "-q"]) == OK
        for kind in ("token", "block"):
            for entry in entries_of(now, kind)[:1]:
                told = explain(folder, entry["group"])
                assert (told["kept"], told["size"]) == (entry["kept"], entry["size"])


@pytest.mark.parametrize(
    ("path", "value"),
    [(("tokens", "sites"), [3]), (("frozen",), 3), (("groups",), None), (("tokens",), 5), (("tokens", "sites"), [{}])],
)
def test_a_damaged_report_of_0_1_0_is_told_and_not_a_crash(
    reported: Path, tmp_path: Path, path: tuple[str, ...], value: Any
) -> None:
    old = as_of_0_1_0(read(reported)[0])
    at = old
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    folder = written(reported, tmp_path / "old", old)
    if value == [3]:
        assert entries_of(read_valid(folder), "token") == []
        return
    with pytest.raises(fxprune.LoadError, match="does not fit its schema"):
        read_valid(folder)


def test_tokens_and_tiles_are_explained(reported: Path, tiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = next(e for e in entries_of(read(reported)[0], "token") if e["removed"])
    told = explain(reported, site["group"])
    assert told["elements"] == []
    assert f"{site['removed']} of them here, by tome" in told["because"][0]
    assert any("kMACs from here to the next attention" in line for line in told["because"])
    assert any("for every image anew" in line for line in told["because"])
    assert main(["explain", str(reported), site["group"]]) == OK
    assert f"{site['kept']} of {site['size']} stay" in capsys.readouterr().err
    entry = entries_of(read(tiled)[0], "block")[0]
    told = explain(tiled, entry["group"])
    assert told["because"][0].startswith(f"{entry['size'] - entry['kept']} of {entry['size']} tiles of 16x16 are zero")
    assert len(told["removed"]) == entry["size"] - entry["kept"]
    stay = [e["score"] for e in told["elements"] if e["kept"]]
    assert min(stay) >= max(e["score"] for e in told["elements"] if not e["kept"])


def test_attentions_that_were_frozen_keep_their_reason(reported: Path, tmp_path: Path) -> None:
    old = as_of_0_1_0(read(reported)[0])
    why = "a mask is added at add_3"
    old["tokens"]["sites"].append({"site": "x:token", "tokens": 17, "removed": 0, "left": 17, "frozen": why})
    folder = written(reported, tmp_path / "old", old)
    assert explain(folder, "x:token")["because"] == [f"nothing went: the group is frozen ({why})"]
    assert "a mask is added" in words(parsed(again(folder)))
