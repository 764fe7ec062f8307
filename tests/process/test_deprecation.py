"""What is going to go: it works, says what to use instead, and cannot stay beyond its time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxprune import OptionError
from fxprune.process.deprecation import DEPRECATED, Deprecation, FxpruneDeprecation, deprecated, number, renamed


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = list(DEPRECATED)
    yield
    DEPRECATED[:] = before


def test_a_deprecated_function_works_and_says_what_to_use() -> None:
    @deprecated(since="0.2", removed="0.4", instead="new()")
    def old(x: int, y: int = 1) -> int:
        """Adds."""
        return x + y

    told = r"old\(\) is deprecated since 0.2 and goes in 0.4: use new\(\)"
    with pytest.warns(FxpruneDeprecation, match=told) as seen:
        assert old(1, y=2) == 3
    assert seen[0].filename == __file__, "the warning points at the caller"
    assert (old.__name__, old.__doc__) == ("old", "Adds.")
    assert DEPRECATED[-1].what == "old()"


def test_an_old_keyword_is_the_new_one() -> None:
    @renamed(since="0.2", removed="0.3", ratio="flops")
    def compress(flops: float | None = None, seed: int = 0) -> tuple[float | None, int]:
        return flops, seed

    with pytest.warns(FxpruneDeprecation, match=r"compress\(ratio=\.\.\) .* use flops=\.\."):
        assert compress(ratio=0.5, seed=2) == (0.5, 2)  # type: ignore[call-arg]
    assert compress(flops=0.5) == (0.5, 0), "no warning: those are errors in tests"
    with pytest.raises(OptionError, match="the same option"):
        compress(ratio=0.5, flops=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        compress(ration=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("version", "over"), [("0.3.9", False), ("0.4.0rc1", True), ("0.4", True), ("0.10", True), ("1.0", True)]
)
def test_time_is_over_with_the_release_that_was_announced(version: str, over: bool) -> None:
    assert Deprecation("x", "0.2", "0.4", "y").over(version) is over


def test_nothing_goes_without_a_minor_release_of_notice() -> None:
    with pytest.raises(ValueError, match="at least one minor release"):
        Deprecation("x", "0.2.0", "0.2.1", "y")
    assert number("1.2.dev0") == (1, 2)
