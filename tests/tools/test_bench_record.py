"""Results of the benchmarks on disk: a record a line, read as they were written, and small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.families import FAMILIES

from bench.accuracy.run import summary
from bench.accuracy.targets import find_unmeasured
from bench.blocks.plot import BARS, SHOWN
from bench.record import read, text_of, write
from bench.tokens.tokens import check

RESULTS = sorted((Path(__file__).resolve().parents[2] / "tools" / "bench" / "results").glob("*.json"))
TABLES = [path for path in RESULTS if path.stem != "blocks_onnx"]  # that one is a table of `fxprune tune`
MOST = 1_000_000  # bytes, all of them together

texts = some.text(max_size=5)
leaves = some.none() | some.booleans() | some.integers(-(10**12), 10**12) | some.floats(0, 1e6) | texts
values = some.recursive(
    leaves, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(texts, inner, max_size=3), max_leaves=8
)
records = some.lists(some.dictionaries(texts, values, max_size=5), min_size=1, max_size=5)


def near(one: Any, two: Any) -> bool:
    """Equal but for digits of floats that a results file leaves out."""
    if isinstance(one, dict):
        return set(one) == set(two) and all(near(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return bool(one == pytest.approx(two, rel=1e-5)) if isinstance(one, float) else bool(one == two)


@given(measured=records, about=values)
def test_records_come_back(measured: list[Any], about: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "records.json"
    path.write_text(text_of({"measured": measured, "about": {"value": about}}), encoding="utf-8")
    back = read(path)
    assert near(back["about"], {"value": about})
    assert near(back["measured"], [{k: v for k, v in one.items() if v is not None} for one in measured])
    again = text_of(back)
    assert again == path.read_text(encoding="utf-8"), "what was read is written in the same words"


def test_a_record_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "some" / "results.json"
    measured = [{"row": "l2", "ratio": 0.1 + 0.2, "guard": {"copies": [1 / 3]}}, {"row": "obs", "error": "no\nway"}]
    write(path, "accuracy", measured=measured, tasks={"a": {"dense": 1}, "b": {"dense": 2}}, ratios=[0.3])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert '["l2",0.3,{"copies":[0.333333]}],' in lines
    assert '["obs",null,null,"no\\nway"]' in lines
    assert '"a":{"dense":1},' in lines
    assert json.loads("".join(lines))["script"] == "accuracy"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_results_are_as_they_are_written_today(path: Path) -> None:
    assert text_of(read(path)) == path.read_text(encoding="utf-8")


def test_results_hold_what_their_checks_ask_for() -> None:
    accuracy, tokens = (read(path) for path in TABLES if path.stem in ("accuracy", "tokens"))
    assert accuracy["summary"] == summary(accuracy["measured"])
    assert find_unmeasured(accuracy["summary"]) == []
    assert check(tokens["measured"])[1] == [], "no target of tools/bench/tokens.py is missed"


def test_results_hold_what_their_pictures_show() -> None:
    (blocks,) = (read(path) for path in TABLES if path.stem == "blocks")
    drawn = {(r["task"], r["tile"], r["ratio"], r["row"]) for r in blocks["measured"] if "kept" in r}
    assert drawn == {(task, *SHOWN, row) for task in blocks["tasks"] for row in BARS}
    assert set(blocks["masks"]) == set(blocks["tasks"])


def test_results_stay_small() -> None:
    assert len(RESULTS) > 9
    assert sum(path.stat().st_size for path in RESULTS) < MOST


def test_the_table_of_real_models_has_a_row_for_every_one_of_the_families() -> None:
    rows = read(next(path for path in RESULTS if path.stem == "zoo"))["rows"]
    assert sorted(row["model"] for row in rows) == sorted(name for one in FAMILIES.values() for name in one.real)
