"""Where something stands in a JSON file: lines for the errors of files that people edit by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]

Path = tuple[str | int, ...]
_BLANK = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r"[^\s,\]}]+")


def positions(text: str) -> Iterator[tuple[Path, int]]:
    """(path, offset) of every member's key and every element of valid JSON, in the order of the text.

    Nothing is recursive, so that nesting does not matter. A key that is there twice comes twice.

    >>> list(positions('{"a": [1, {"b": 2}]}'))
    [(('a',), 1), (('a', 0), 7), (('a', 1), 10), (('a', 1, 'b'), 11)]
    """
    path: list[str | int] = []
    opened: list[str] = []  # of every container around: its bracket
    at, value = _skip(text, 0), True  # value: one begins here
    while at < len(text):
        letter = text[at]
        if value and letter in "{[":
            opened.append(letter)
            path.append(-1 if letter == "[" else "")
            at, value = _skip(text, at + 1), False
            if text[at] in "}]":
                continue
            at, value = yield from _member(text, at, path)
        elif value:
            at = scanstring(text, at + 1)[1] if letter == '"' else _end_of_scalar(text, at)
            at, value = _skip(text, at), False
        elif letter == ",":
            at, value = yield from _member(text, _skip(text, at + 1), path)
        else:  # a container ends
            opened.pop()
            path.pop()
            at = _skip(text, at + 1)


def _member(text: str, at: int, path: list[str | int]) -> Generator[tuple[Path, int], None, tuple[int, bool]]:
    """Step to the next key or element; returns (where its value begins, True)."""
    last = path[-1]
    if isinstance(last, int):
        path[-1] = last + 1
        yield tuple(path), at
        return at, True
    path[-1], end = scanstring(text, at + 1)
    yield tuple(path), at
    return _skip(text, _skip(text, end) + 1), True


def _skip(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    return found.end() if found else at


def _end_of_scalar(text: str, at: int) -> int:
    found = _SCALAR.match(text, at)
    return found.end() if found else at + 1


@dataclass(frozen=True)
class Source:
    """The text that something was read from, and what to call it."""

    name: str
    text: str

    def at(self, *path: str | int) -> str:
        """``plan.json:12``: the line of a key or element, or of the closest thing around it that is there."""
        best, line = 0, 0
        for found, offset in positions(self.text):
            shared = len(found) if found == path[: len(found)] else 0
            if shared > best:
                best, line = shared, self.text.count("\n", 0, offset) + 1
        return f"{self.name}:{line}" if line else self.name

    def holds(self, key: str) -> bool:
        """Whether the outermost object has ``key``."""
        return any(found == (key,) for found, _ in positions(self.text))

    def find_repeated(self, depth: int) -> tuple[Path, int] | None:
        """(path, line) of the first key at ``depth`` keys or fewer that its object has already, None without one.

        Readers of JSON keep the last of two and say nothing.
        """
        seen: set[Path] = set()
        for path, offset in positions(self.text):
            if isinstance(path[-1], str) and len(path) <= depth:
                if path in seen:
                    return path, self.text.count("\n", 0, offset) + 1
                seen.add(path)
        return None


def loads(text: str) -> tuple[object, bool]:
    """(the value, whether an object has a key twice). Raises what ``json.loads`` raises."""
    twice = False

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal twice
        made = dict(items)
        twice |= len(made) != len(items)
        return made

    return json.loads(text, object_pairs_hook=pairs), twice
