"""Tables of latencies: classes of groups, what is kept where, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.laws import analysed
from support.timing import made_up

from fxprune.driver.measure_latency import counts_of, measure_table, probes_of
from fxprune.errors import LoadError
from fxprune.ir.program import Program
from fxprune.target.latency_table import LatencyTable, Point, Setting, classes, find_table_path, fingerprint, setting_of


def even(_kind: str, count: int, size: int) -> float:
    return 0.6 + 0.4 * count / size


@pytest.fixture(scope="module")
def vit() -> Program:
    return analysed("vit")


@pytest.fixture(scope="module")
def table(vit: Program) -> LatencyTable:
    return made_up(vit, even)


def test_blocks_that_are_alike_are_one_class(vit: Program) -> None:
    found = classes(vit, ("head", "ffn"))
    blocks = sum(g.prunable and str(g.kind) == "head" for g in vit.need("groups"))
    assert blocks == 2
    assert [(name.split("[")[0], len(groups)) for name, groups in found.items()] == [("head", blocks), ("ffn", blocks)]
    assert {str(g.kind) for groups in classes(vit).values() for g in groups} > {"head", "ffn"}


def test_stages_of_other_sizes_are_classes_of_their_own() -> None:
    resnet = analysed("resnet18")
    for name, groups in classes(resnet).items():
        assert len({(g.kind, g.size) for g in groups}) == 1, name
    assert len(classes(resnet)) > 3


def test_checkpoints_share_a_fingerprint_and_shapes_do_not(vit: Program) -> None:
    assert fingerprint(vit) == fingerprint(analysed("vit", seed=1))
    assert fingerprint(vit) != fingerprint(analysed("resnet18"))


def test_a_table_is_the_same_text_and_comes_back(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    table.write(path)
    assert LatencyTable.read(path) == table
    assert LatencyTable.read(path).hash == table.hash
    assert table.correct(1.5).correction == 1.5
    assert table.correct(1.5).hash != table.hash
    assert list(path.parent.iterdir()) == [path]


def test_every_circumstance_has_its_own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = setting_of("onnx", "Some CPU @ 3.0", 8, 2)
    assert set(one.versions) <= {"torch", "onnxruntime"}
    others = [
        replace(one, target="eager"),
        replace(one, device="other"),
        replace(one, batch=1),
        replace(one, threads=1),
        replace(one, versions={"torch": "0"}),
    ]
    places = {find_table_path(s, "abc") for s in (one, *others)} | {find_table_path(one, "abd")}
    assert len(places) == 7
    assert all(p.is_relative_to(tmp_path / "fxprune" / "latency") for p in places)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fxprune_latency": 9}, "version 9"),
        ({"dense_ms": -1}, "dense_ms"),
        ({"dense_ms": "fast"}, "dense_ms"),
        ({"dense_ms": 0}, "positive"),
        ({"correction": float("nan")}, "correction"),
        ({"curves": []}, ""),
        ({"setting": {"machine": 1}}, "machine"),
    ],
)
def test_files_that_are_no_table(table: LatencyTable, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    raw = {**json.loads(table.to_json()), **change}
    (tmp_path / "t.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(LoadError, match="no table of latencies") as error:
        LatencyTable.read(tmp_path / "t.json")
    assert says in error.value.why


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([{"count": 3, "ratio": -0.5}], "ratio"),
        ([{"count": 10**6, "ratio": 0.5}], "below its size"),
        ([{"count": 2, "ratio": 0.5}, {"count": 1, "ratio": 0.4}], "ascending"),
        ([{"ratio": 1}], "count"),
    ],
)
def test_points_that_make_no_sense(table: LatencyTable, tmp_path: Path, points: list[Any], says: str) -> None:
    raw = json.loads(table.to_json())
    next(iter(raw["curves"].values()))["points"] = points
    (tmp_path / "t.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(LoadError) as error:
        LatencyTable.read(tmp_path / "t.json")
    assert says in error.value.why


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        LatencyTable.read(tmp_path / "absent.json")
    (tmp_path / "t.json").write_bytes(b"\x80")
    with pytest.raises(LoadError, match="no table of latencies"):
        LatencyTable.read(tmp_path / "t.json")


def test_counts_are_few_aligned_and_below_the_size(vit: Program) -> None:
    group = next(g for g in vit.need("groups") if str(g.kind) == "ffn")
    wide = group.but(size=1536, floor=154)
    assert counts_of(wide) == [160, 384, 768, 1152]
    assert counts_of(wide.but(floor=0)) == [0, 160, 384, 768, 1152]
    assert counts_of(wide.but(size=3)) == [1, 2]
    assert probes_of(wide) == [712, 720, 736, 768]
    assert probes_of(wide.but(size=128)) == [8, 16, 32, 64]


def test_only_what_is_asked_for_and_not_yet_known_is_measured(vit: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.timing import FakeClock

    monkeypatch.setattr(FakeClock, "read_so_far", 0)
    from fxprune.driver.measure_latency import lowerable
    from fxprune.registry import backend

    setting, kept = Setting("eager", "d"), []
    with FakeClock(backend("eager"), lowerable(vit)) as clock:
        heads = measure_table(vit, clock, setting, ["head"], on_curve=kept.append)
        first = FakeClock.read_so_far
        both = measure_table(vit, clock, setting, ["head", "ffn"], heads)
        again = measure_table(vit, clock, setting, ["head", "ffn"], both)
    assert {c.kind for c in heads.curves.values() if c.points} == {"head"}
    assert {c.skipped for c in heads.curves.values() if c.kind == "ffn"} == {"kind"}
    assert first == 2  # one and two of three heads
    assert kept[-1] == heads
    assert {c.kind for c in both.curves.values() if c.points} == {"head", "ffn"}
    assert [c for c in both.curves.values() if c.kind == "head"] == [
        c for c in heads.curves.values() if c.kind == "head"
    ]
    assert again == replace(both, date=again.date)
    total = sum(len(c.points) for c in both.curves.values())
    assert FakeClock.read_so_far == total


def test_the_table_of_another_model_is_refused(vit: Program, table: LatencyTable) -> None:
    table.check(vit)
    with pytest.raises(LoadError, match="of another program"):
        table.check(analysed("resnet18"))


def test_points_are_plain() -> None:
    assert Point(3, 0.5) == Point(count=3, ratio=0.5, error=0.0, probe=False)
    assert torch.get_num_threads() >= 1
