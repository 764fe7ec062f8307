"""How a model that is built by its name is built: ``img_size=384,in_chans=1,num_classes=0``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import LoadError

_PAIR = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*([^=,]+?)\s*")
_WORDS = {"true": True, "false": False, "none": None}
CURE = "write `--model-args img_size=384,in_chans=1,num_classes=0`"


def read_model_args(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Names and values; texts are read as whole numbers, numbers, ``224x160`` (a tuple), true, false, none, or words.

    >>> read_model_args("img_size=224x160, drop_rate=0.1, dynamic=true, act_layer=gelu")
    {'img_size': (224, 160), 'drop_rate': 0.1, 'dynamic': True, 'act_layer': 'gelu'}

    Raises LoadError for text of another form.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, Any] = {}
    for part in given.split(","):
        match = _PAIR.fullmatch(part)
        if match is None or match[1] in found:
            raise LoadError(
                "the model's arguments are not understood", where=f"--model-args {given}", why=f"'{part}'", cure=CURE
            )
        found[match[1]] = _value(match[2])
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
