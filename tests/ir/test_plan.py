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
from fxprune.ir.plan import MAX_BYTES, VERSION, Choice, CompressionPlan, TokenPlan

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
    return json.dumps({"fxprune_plan": VERSION, "about": {}, "choices": {"a:ffn": group}})


def first(text: str) -> str:
    """The text of format 2 as one of format 1, where it holds nothing but groups."""
    return text.replace('"fxprune_plan": 2', '"fxprune_plan": 1').replace('"choices"', '"groups"')


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
        ('{"fxprune_plan": true, "choices": {}}', "another version"),
        ('{"fxprune_plan": 2, "choices": []}', "malformed"),
        ('{"fxprune_plan": 2, "choices": {"a": 3}}', "kind, size and keep"),
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
    for version in (text, first(text)):
        with pytest.raises(PlanError, match=says.replace("choices", "groups") if version != text else says):
            CompressionPlan.from_json(version)


def test_the_place_is_named() -> None:
    with pytest.raises(PlanError, match=r"plan.json:3"):
        CompressionPlan.from_json('{\n"fxprune_plan": 1,\n"groups": {,}\n}', "plan.json")
    with pytest.raises(PlanError, match="group 'a:ffn'"):
        CompressionPlan.from_json(entry(keep=[3, 0]))


GROUPS = """{
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
        ('"size": 4', '"size": 0', 5, "positive integer"),
        ('"size": 8', '"sise": 8', 6, "needs kind, size and keep"),
        ('"size": 8', '"size": 8, "keeps": []', 6, "did you mean 'keep'"),
        ('"b:ffn"', '"a:head"', 6, "'a:head' is there twice"),
        ('"kind": "head"', '"kind": "head", "kind": "ffn"', 5, "'kind' is there twice"),
        ('"about": {}', '"about": 3', 3, "'about' must be an object"),
        ('"fxprune_plan": 1', '"fxprune_plan": 3', 2, "another version"),
        ("      7\n", "      7,\n", 10, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_mistake_of_an_edit_is_told_with_its_line(
    old: str, new: str, line: int, says: str, version: int, tmp_path: Path
) -> None:
    text = GROUPS if version == 1 else second(GROUPS)
    old = old if version == 1 else second(old)
    assert text.count(old) == 1
    (tmp_path / "plan.json").write_text(text.replace(old, new))
    with pytest.raises(PlanError, match=says) as caught:
        CompressionPlan.read(tmp_path / "plan.json")
    assert f"plan.json:{line}" in caught.value.where


def second(text: str) -> str:
    """The text of format 1 as one of format 2, where it holds nothing but groups."""
    return text.replace('"fxprune_plan": 1', '"fxprune_plan": 2').replace('"groups"', '"choices"')


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('"kind": "head"', '"kind": "haed"', 5, "did you mean 'head'"),
        ('"about": {},', '"tokens": {"reducer": 3, "removed": {}},', 3, "reducer must be a string"),
        ('"about": {},', '"blocks": {"w": {"pattern": "0x1", "shape": [1, 1], "keep": []}},', 3, "no tile"),
    ],
)
def test_a_mistake_in_the_first_format_is_told_with_its_line(old: str, new: str, line: int, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        CompressionPlan.from_json(GROUPS.replace(old, new), "plan.json")
    assert f"plan.json:{line}" in caught.value.where


MIXED = """{
  "fxprune_plan": 2,
  "choices": {
    "a:ffn": {"kind": "ffn", "size": 4, "keep": [1]},
    "b:branch": {"kind": "branch", "size": 1, "keep": []},
    "c.0:token": {"kind": "token", "reducer": "tome", "removed": 3},
    "c.1:token": {"kind": "token", "reducer": "tome", "removed": 2},
    "d.weight:block": {"kind": "block", "pattern": "2x2", "shape": [4, 4], "keep": [0, 3]}
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('"removed": 3', '"removed": -3', 6, "removed a count"),
        ('"removed": 3', '"removed": 3, "left": 1', 6, "'left'"),
        ('"removed": 3', '"remove": 3', 6, "need reducer and removed"),
        ('"tome", "removed": 2', '"prune", "removed": 2', 7, "'prune' here and 'tome' at c.0:token"),
        ('"removed": 2', '"removed": 2, "unmerge": true', 7, "unmerge is True here"),
        ('"pattern": "2x2"', '"pattern": "0x2"', 8, "no tile"),
        ("[0, 3]", "[0, 4]", 8, "out of range"),
        ('"c.1:token"', '"c.0:token"', 7, "'c.0:token' is there twice"),
    ],
)
def test_every_kind_of_choice_has_its_line(old: str, new: str, line: int, says: str) -> None:
    assert MIXED.count(old) == 1
    with pytest.raises(PlanError, match=says) as caught:
        CompressionPlan.from_json(MIXED.replace(old, new), "plan.json")
    assert f"plan.json:{line}" in caught.value.where


def test_sections_of_the_first_format_mean_nothing_in_the_second() -> None:
    for text in ('{"fxprune_plan": 2,\n"groups": {}}', '{"fxprune_plan": 2, "choices": {},\n"tokens": {}}'):
        with pytest.raises(PlanError, match="means nothing") as caught:
            CompressionPlan.from_json(text, "plan.json")
        assert "plan.json:2" in caught.value.where


def test_one_section_holds_every_kind_of_choice() -> None:
    plan = CompressionPlan.from_json(MIXED, "plan.json")
    assert plan.kinds == ("ffn", "branch", "token", "block")
    assert plan.elements == {"a:ffn": Choice("ffn", 4, (1,)), "b:branch": Choice("branch", 1, ())}
    assert plan.tokens == TokenPlan("tome", {"c.0:token": 3, "c.1:token": 2})
    assert list(plan.blocks) == ["d.weight"]
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert CompressionPlan(plan.elements).with_tokens(plan.tokens).with_blocks(plan.blocks) == plan
    assert plan.with_tokens(None).with_blocks({}).with_elements({}) == CompressionPlan()
    with pytest.raises(PlanError, match="unknown kind of group 'branch'") as caught:
        plan.check_kinds(["ffn", "token", "block"])
    assert "plan.json:5" in caught.value.where


OLD = """{"fxprune_plan": 1, "about": {"seed": 0}, "groups": {"a:ffn": {"kind": "ffn", "size": 4, "keep": [1]}},
"tokens": {"reducer": "tome", "unmerge": false, "removed": {"c.10:token": 2, "c.9:token": 3}},
"blocks": {"d.weight": {"pattern": "2x2", "shape": [4, 4], "keep": [0, 3]}}}"""


def test_plans_of_the_first_format_keep_their_meaning_and_their_digest() -> None:
    """Pipelines in reports of 0.1.0 name plans by the digest that it gave them."""
    plan = CompressionPlan.from_json(OLD, "plan.json")
    assert plan.elements == {"a:ffn": Choice("ffn", 4, (1,))}
    assert plan.tokens == TokenPlan("tome", {"c.9:token": 3, "c.10:token": 2})
    assert plan.blocks["d.weight"].kept.tolist() == [[True, False], [False, True]]
    assert plan.digest == "ae8416d96bb5e301" == CompressionPlan.from_json(plan.to_json()).digest
    none = CompressionPlan.from_json(OLD.replace('"c.10:token": 2, "c.9:token": 3', ""))
    assert none.tokens is None
    assert none.aliases == ("cff11ac05e3a0bd5",)
    assert [plan.place(name) for name in plan.choices] == [
        "plan.json:1: group 'a:ffn'",
        "plan.json:2: site 'c.10:token'",
        "plan.json:2: site 'c.9:token'",
        "plan.json:3: blocks of 'd.weight:block'",
    ]


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
    plan = CompressionPlan.from_json(GROUPS, "plan.json")
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


KEYS = ["kind", "size", "keep", "reducer", "removed", "pattern", "shape", "x"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["token", "block", "2x2", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


@given(json_values)
def test_any_json_in_the_groups_is_a_plan_or_a_plan_error(value: object) -> None:
    for version, section in ((1, "groups"), (2, "choices")):
        text = json.dumps({"fxprune_plan": version, "about": {}, section: {"a": value}})
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
