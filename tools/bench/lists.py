"""Comma-separated options of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the ``known`` names, or none of them for an empty text."""

    def parse(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"there is no '{name}'; there are {', '.join(known)}")
        return found

    return parse


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """An argparse type: numbers of a kind.

    >>> numbers(float)("0.5,1")
    [0.5, 1.0]
    """
    return lambda text: [kind(part) for part in text.split(",") if part]
