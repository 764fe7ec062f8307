"""Lines in JSON: found for every key and element, however it is laid out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.ir.json_source import Path, Source, loads, positions

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def paths(value: Any, at: Path = ()) -> list[Path]:
    """Every key and element, in order, by walking the parsed value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, one in inside for p in [(*at, key), *paths(one, (*at, key))]]


@settings(deadline=None)
@given(VALUES, st.sampled_from([None, 0, 2]))
def test_every_key_and_element_is_found_where_it_stands(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    found = list(positions(text))
    assert [path for path, _ in found] == paths(value)
    for path, offset in found:
        if isinstance(path[-1], str):
            assert text[offset:].startswith(json.dumps(path[-1]))


def test_the_closest_thing_around_is_named_where_a_key_is_missing() -> None:
    source = Source("p.json", '{\n "a": {\n  "b": [1,\n   2]}\n}')
    assert source.at("a", "b", 1) == "p.json:4"
    assert source.at("a", "c") == "p.json:2"
    assert source.at("x") == "p.json"


def test_a_key_that_is_there_twice() -> None:
    text = '{"a": 1,\n"b": {"c": 1,\n"c": 2}}'
    assert loads(text) == ({"a": 1, "b": {"c": 2}}, True)
    assert Source("x", text).find_repeated(2) == (("b", "c"), 3)
    assert Source("x", text).find_repeated(1) is None
    assert loads('{"a": {"b": 1}, "c": {"b": 1}}')[1] is False


def test_depth_does_not_matter_here() -> None:
    assert sum(1 for _ in positions("[" * 5000 + "]" * 5000)) == 4999


@pytest.mark.parametrize("text", ["3", '"a"', "[]", "{}", " null "])
def test_values_without_members(text: str) -> None:
    assert list(positions(text)) == []
