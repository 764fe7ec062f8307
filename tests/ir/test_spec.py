"""Options in text: read, typed, and refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from fxprune.errors import OptionError
from fxprune.ir.spec import build, parse
from fxprune.passes.analysis.score_groups import criterion


@dataclass(frozen=True)
class Sample:
    count: int = 1
    share: float | None = None
    name: str = "a"
    raw: bool = False
    data: object = field(default=None, repr=False)


def test_name_and_options_are_read() -> None:
    assert parse("l2", "x") == ("l2", {})
    assert parse("a{b-c=1, d=two }", "x") == ("a", {"b_c": "1", "d": "two"})


def test_values_get_the_type_of_their_field() -> None:
    made = build(Sample, {"count": "3", "share": "0.5", "name": "7", "raw": "yes"}, "sample", "here")
    assert made == Sample(3, 0.5, "7", True)
    assert build(Sample, {"share": "none"}, "sample", "here").share is None


@pytest.mark.parametrize("text", ["a{b=1", "a{b}", "a{b=1}c", "a{=1}", "a{b=1,b=2}"])
def test_text_that_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse(text, "--importance")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuont": "3"}, "did you mean 'count'"),
        ({"count": "3.5"}, "expected int"),
        ({"raw": "perhaps"}, "expected bool"),
        ({"data": "x"}, "no option 'data'"),
    ],
)
def test_wrong_options_name_what_was_expected(options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(Sample, options, "sample", "here")


def test_a_criterion_takes_options_in_text_and_says_them_again() -> None:
    assert str(criterion("fisher{probes=4}")) == "fisher{probes=4}"
    assert str(criterion("fisher{probes=2}")) == "fisher", "defaults are not said"
    with pytest.raises(OptionError, match="no option 'prob'"):
        criterion("fisher{prob=4}")
