"""The shapes an engine is built for: least, best and largest of every open size, from what was captured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import OptionError
from ...ir.program import Program
from ...ir.signature import dim_names, sample_inputs, size_ranges

Range = tuple[int, int, int]  # least, best, largest
ROOM = 4  # largest over the example's where nothing else bounds it
LEAST_ROOM = 32


@dataclass(frozen=True)
class InputProfile:
    """One input of the engine: (least, best, largest) shapes; all three alike where nothing is open."""

    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def static(self) -> bool:
        return self.shapes[0] == self.shapes[2]


def read_ranges(text: str) -> dict[str, Range]:
    """``batch:1:8:64/sequence:1:128:512`` as a mapping. Raises OptionError.

    >>> read_ranges("batch:1:8:64")
    {'batch': (1, 8, 64)}
    """
    found: dict[str, Range] = {}
    for part in filter(None, text.split("/")):
        match = re.fullmatch(r"([A-Za-z_]\w*):(\d+):(\d+):(\d+)", part.strip())
        sizes = tuple(int(n) for n in match.groups()[1:]) if match else ()
        if match is None or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise OptionError(
                f"'{part}' is not a range of sizes",
                where=f"--target trt {{shapes={text}}}",
                cure="write least, best and largest, as shapes=batch:1:8:64/sequence:1:128:512",
            )
        found[match[1]] = (sizes[0], sizes[1], sizes[2])
    return found


def ranges(program: Program, wanted: Mapping[str, Range]) -> dict[str, Range]:
    """Word of every open size -> its range: what is ``wanted``, else what was captured around the example's size.

    Nothing bounds a batch from above: then it is four times the example's, at least 32. Raises OptionError for a word
    that the program does not know, or a range that it was not captured for.
    """
    words, found = dim_names(program), {}
    for symbol, (least, example, largest) in size_ranges(program).items():
        bounded = largest < 2**31
        top = largest if bounded and largest <= 4096 else min(largest, max(LEAST_ROOM, ROOM * example))
        word = words[symbol]
        found[word] = wanted.get(word, (least, min(max(example, least), top), top))
        if found[word][0] < least or found[word][2] > largest:
            raise OptionError(
                f"the program was not captured for {word} from {found[word][0]} to {found[word][2]}",
                where="--target trt {shapes=...}",
                why=f"it takes {least} to {largest if bounded else 'any size'}",
                cure="narrow the range, or capture it anew",
            )
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise OptionError(
            f"the program has no open size '{unknown[0]}'",
            where="--target trt {shapes=...}",
            cure=f"open are: {', '.join(found) or 'none'}",
        )
    return found


def profiles(program: Program, sizes: Mapping[str, Range]) -> list[InputProfile]:
    """Every tensor input with its shapes, in the order of the graph's inputs."""
    symbols = {symbol: sizes[word] for symbol, word in dim_names(program).items()}
    trials: list[Sequence[object]] = [sample_inputs(program, {s: r[i] for s, r in symbols.items()}) for i in range(3)]
    found = []
    for name, least, best, largest in zip(program.user_inputs, *trials, strict=True):
        if isinstance(least, Tensor) and isinstance(best, Tensor) and isinstance(largest, Tensor):
            found.append(InputProfile(name, least.dtype, (tuple(least.shape), tuple(best.shape), tuple(largest.shape))))
    return found
