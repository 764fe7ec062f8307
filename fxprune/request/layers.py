"""``--layers``: how many layers go, or which."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..errors import OptionError
from ..ir.group import LAYERS, Kind

_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class LayerGoal:
    """Layers that are to go.

    text    ``-4``: so many, chosen by score; ``0-3,5``: these, numbered from 0 in the order of the graph
    kinds   of what is counted: whole layers, or attentions and feed-forwards
    drop    how many, 0 where they are named;  at: those that are named

    Raises OptionError for text that is neither.
    """

    text: str
    kinds: tuple[Kind, ...] = (Kind.LAYER,)
    drop: int = field(default=0, init=False)
    at: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        text = self.text.replace(" ", "")
        if re.fullmatch(r"-[1-9]\d*", text):
            object.__setattr__(self, "drop", int(text[1:]))
        elif _RANGES.fullmatch(text):
            object.__setattr__(self, "at", tuple(sorted(set(_read_ranges(text)))))
        else:
            raise OptionError(
                f"'{self.text}' does not say which layers go",
                where=f"--layers {self.text}",
                cure="write -4 (so many, chosen by score), or 0-3,5 (these, numbered from 0)",
            )


def layer_goal(asked: int | str | Sequence[int] | None, kinds: Collection[Kind | str]) -> LayerGoal | None:
    """What ``--layers`` says, of the layers among the ``kinds`` that may be cut, or of whole ones.

    >>> layer_goal("0-3,5", ("head", "ffn")).at, layer_goal(-2, ("attention",)).kinds
    ((0, 1, 2, 3, 5), (<Kind.ATTENTION: 'attention'>,))
    """
    if asked is None:
        return None
    text = ",".join(map(str, asked)) if isinstance(asked, list | tuple) else str(asked)
    named = tuple(kind for kind in LAYERS if str(kind) in map(str, kinds))
    return LayerGoal(text, named or (Kind.LAYER,))


def _read_ranges(text: str) -> list[int]:
    found = list[int]()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if high and int(high) < int(low):
            raise OptionError(f"'{part}' names no layer", where=f"--layers {text}", cure=f"write {high}-{low}")
        found += range(int(low), int(high or low) + 1)
    return found
