"""What ``--tokens`` may say, and what it may not."""

from __future__ import annotations

import pytest

from fxprune.errors import OptionError
from fxprune.request.tokens import TokenGoal, token_goal


def same(counts: object) -> list[int]:
    return list(counts)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("text", "sites", "removed"),
    [
        ("tome:r=13", 4, [13, 13, 13, 13]),
        ("ppt:r=50@1,3", 4, [0, 50, 0, 50]),
        ("tome:r=8,4@0,2", 4, [8, 0, 4, 0]),
        ("tome:r=8,4,2", 5, [8, 4, 2, 0, 0]),
        ("ppt{threshold=2}:r=3", 2, [3, 3]),
    ],
)
def test_explicit_counts(text: str, sites: int, removed: list[int]) -> None:
    wish = TokenGoal(text)
    assert wish.explicit
    assert not wish.needs_data
    assert wish.resolve_counts(same, sites) == removed


def test_options_go_to_whom_they_belong() -> None:
    assert TokenGoal("tome").deciding.guard
    assert not TokenGoal("tome{guard=no}").deciding.guard
    wish = TokenGoal("ppt{threshold=2,schedule=constant,share=0.5}")
    assert wish.reducer == "ppt{threshold=2}"
    assert str(wish.method) == "ppt{threshold=2.0}"
    assert (wish.deciding.schedule, wish.deciding.share) == ("constant", 0.5)
    assert not wish.explicit
    assert not wish.needs_data
    assert TokenGoal("tome").needs_data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tomme", "did you mean 'tome'"),
        ("tome:r=", "does not say how many"),
        ("tome:13", "does not say how many"),
        ("tome{schedule=constnt}", "did you mean 'constant'"),
        ("tome{share=2}", "between 0 and 1"),
        ("ppt:r=1,2,3@0,1", "3 counts at 2 places"),
        ("prune{score=classvalue}", "did you mean 'class-value'"),
        ("tome{sparkle=1}", "sparkle"),
        ("transform{temperature=0}", "must be positive"),
        ("zero-tprune{similar=3}", "similar is a share"),
        ("zero-tprune{lowest=1}", "between lowest and highest"),
        ("tome{improve=-1}", "improve is a count"),
    ],
)
def test_mistakes_are_told(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TokenGoal(text)


def test_places_that_are_not_there() -> None:
    with pytest.raises(OptionError, match="no such attention"):
        TokenGoal("tome:r=2@7").resolve_counts(same, 4)
    with pytest.raises(OptionError, match="more counts than attentions"):
        TokenGoal("tome:r=1,1,1").resolve_counts(same, 2)


def test_kinds_and_tokens_together() -> None:
    assert token_goal(None, ("head", "ffn"), False) is None
    assert token_goal("off", ("head",), False) is None
    one = token_goal(None, ("head", "token"), False)
    assert one is not None
    assert one.reducer == "tome"
    with pytest.raises(OptionError, match="cannot be pruned and left alone"):
        token_goal("off", ("token",), False)
    with pytest.raises(OptionError, match="nothing is merged"):
        token_goal(None, ("head",), True)
