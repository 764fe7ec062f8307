"""Plans: a file people read, diff and edit. Whatever is in it, the answer is a plan or a PlanError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.errors import FxpruneError, PlanError
from fxprune.ir.axis import Axis
from fxprune.ir.group import Kind, PruneGroup
from fxprune.ir.plan import MAX_BYTES, VERSION, Choice, CompressionPlan

PLAN = CompressionPlan(
    {"b:ffn": Choice("ffn", 8, (0, 3, 7)), "a:head": Choice("head", 4, (1,))}, {"criterion": "l2", "seed": 0}
)


def answer(text: str) -> CompressionPlan | PlanError:
    """What reading ``text`` gives; any other exception fails the test."""
    try:
        return CompressionPlan.from_json(text)
    except PlanError as error:
        return error


def entry(**changes: object) -> str:
    group = {"kind": "ffn", "size": 8, "keep": [0, 3]} | changes
    return json.dumps({"fxprune_plan": VERSION, "about": {}, "groups": {"a:ffn": group}})


@st.composite
def plans(draw: st.DrawFn) -> CompressionPlan:
    choices = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4)):
        size = draw(st.integers(1, 12))
        keep = draw(st.sets(st.integers(0, size - 1)))
        choices[name] = Choice(draw(st.sampled_from(["head", "ffn"])), size, tuple(sorted(keep)))
    return CompressionPlan(choices, draw(st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)))


@given(plans())
def test_json_round_trip(plan: CompressionPlan) -> None:
    assert CompressionPlan.from_json(plan.to_json()) == plan


def test_the_file_is_made_to_be_diffed() -> None:
    lines = PLAN.to_json().splitlines()
    assert lines[-4].strip() == '"a:head": {"kind": "head", "size": 4, "keep": [1]},'
    assert lines[-3].strip() == '"b:ffn": {"kind": "ffn", "size": 8, "keep": [0, 3, 7]}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1, 2]", "not a plan"),
        ("{}", "not a plan"),
        ('{"fxprune_plan": 99, "groups": {}}', "another version"),
        ('{"fxprune_plan": 1, "groups": []}', "malformed"),
        ('{"fxprune_plan": 1, "groups": {"a": 3}}', "kind, size and keep"),
        (entry(size=0), "positive integer"),
        (entry(size=True), "positive integer"),
        (entry(size=8.0), "positive integer"),
        (entry(kind=1), "must be a string"),
        (entry(keep="0 3"), "list of integers"),
        (entry(keep=[0, "3"]), "list of integers"),
        (entry(keep=[0, True]), "list of integers"),
        (entry(keep=[3, 0]), "sorted and unique"),
        (entry(keep=[3, 3]), "sorted and unique"),
        (entry(keep=[0, 8]), "out of range"),
        (entry(keep=[-1, 2]), "out of range"),
    ],
)
def test_malformed_plans_name_the_fault(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        CompressionPlan.from_json(text)


def test_the_place_is_named() -> None:
    with pytest.raises(PlanError, match=r"plan.json:3"):
        CompressionPlan.from_json('{\n"fxprune_plan": 1,\n"groups": {,}\n}', "plan.json")
    with pytest.raises(PlanError, match="group 'a:ffn'"):
        CompressionPlan.from_json(entry(keep=[3, 0]))


EDITED = """{
  "fxprune_plan": 1,
  "about": {},
  "groups": {
    "a:head": {"kind": "head", "size": 4, "keep": [1]},
    "b:ffn": {"kind": "ffn", "size": 8, "keep": [
      0,
      3,
      7
    ]}
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("      7\n", "      8\n", 9, "out of range"),
        ("      3,\n", "      0,\n", 8, "0 comes twice"),
        ("      0,\n", "      4,\n", 8, "3 comes too late"),
        ('"kind": "head"', '"kind": "haed"', 5, "did you mean 'head'"),
        ('"size": 4', '"size": 0', 5, "positive integer"),
        ('"size": 8', '"sise": 8', 6, "needs kind, size and keep"),
        ('"size": 8', '"size": 8, "keeps": []', 6, "did you mean 'keep'"),
        ('"b:ffn"', '"a:head"', 6, "'a:head' is there twice"),
        ('"kind": "head"', '"kind": "head", "kind": "ffn"', 5, "'kind' is there twice"),
        ('"about": {}', '"about": 3', 3, "'about' must be an object"),
        ('"fxprune_plan": 1', '"fxprune_plan": 2', 2, "another version"),
        ('"about": {},', '"tokens": {"reducer": 3, "removed": {}},', 3, "reducer must be a string"),
        ('"about": {},', '"blocks": {"w": {"pattern": "0x1", "shape": [1, 1], "keep": []}},', 3, "no tile"),
        ("      7\n", "      7,\n", 10, "not valid JSON"),
    ],
)
def test_a_mistake_of_an_edit_is_told_with_its_line(old: str, new: str, line: int, says: str, tmp_path: Path) -> None:
    assert EDITED.count(old) == 1
    (tmp_path / "plan.json").write_text(EDITED.replace(old, new))
    with pytest.raises(PlanError, match=says) as caught:
        CompressionPlan.read(tmp_path / "plan.json")
    assert f"plan.json:{line}" in caught.value.where


def group(name: str, kind: Kind, size: int, **more: object) -> PruneGroup:
    return PruneGroup(name, kind, size, Axis(size), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        ({"b:ffn": None, "c:ffn": group("c:ffn", Kind.FFN, 8)}, 6, "did you mean 'c:ffn'"),
        ({"a:head": group("a:head", Kind.KV, 4)}, 5, 'write "kind": "kv"'),
        ({"b:ffn": group("b:ffn", Kind.FFN, 16)}, 6, "16 elements here and 8"),
        ({"b:ffn": group("b:ffn", Kind.FFN, 8, frozen="softmax over it")}, 6, "softmax over it"),
        ({"b:ffn": group("b:ffn", Kind.FFN, 8, granularity=4)}, 6, "keep 0 or 4"),
    ],
)
def test_what_does_not_fit_the_model_is_told_with_its_line(
    change: dict[str, PruneGroup | None], line: int, says: str
) -> None:
    fitting = {"a:head": group("a:head", Kind.HEAD, 4), "b:ffn": group("b:ffn", Kind.FFN, 8)}
    plan = CompressionPlan.from_json(EDITED, "plan.json")
    plan.check(fitting)
    with pytest.raises(PlanError, match=says) as caught:
        plan.check({name: g for name, g in {**fitting, **change}.items() if g is not None})
    assert f"plan.json:{line}: group " in caught.value.where


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_plan_or_a_plan_error(text: str) -> None:
    assert isinstance(answer(text), CompressionPlan | PlanError)


@given(st.data())
def test_a_damaged_plan_is_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    text = PLAN.to_json()
    position = data.draw(st.integers(0, len(text) - 1))
    damaged = data.draw(
        st.sampled_from(
            [text[:position], text[position:], text[:position] + data.draw(st.characters()) + text[position + 1 :]]
        )
    )
    assert isinstance(answer(damaged), CompressionPlan | PlanError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "size", "keep", "x"]), inner),
    max_leaves=8,
)


@given(json_values)
def test_any_json_in_the_groups_is_a_plan_or_a_plan_error(value: object) -> None:
    text = json.dumps({"fxprune_plan": VERSION, "about": {}, "groups": {"a": value}})
    assert isinstance(answer(text), CompressionPlan | PlanError)


def test_deep_nesting_is_refused_and_not_a_crash() -> None:
    with pytest.raises(PlanError):
        CompressionPlan.from_json("[" * 100_000)


def test_reading_what_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError, match="not a text file"):
        CompressionPlan.read(tmp_path / "binary.json")
    with pytest.raises(PlanError, match="cannot be read"):
        CompressionPlan.read(tmp_path / "absent.json")
    with pytest.raises(FxpruneError):
        CompressionPlan.read(tmp_path)
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(PlanError, match="too large"):
        CompressionPlan.read(tmp_path / "huge.json")


def test_an_empty_plan_says_so() -> None:
    assert CompressionPlan().empty
    assert CompressionPlan({"a": Choice("ffn", 2, (0, 1))}).empty
    assert not PLAN.empty
