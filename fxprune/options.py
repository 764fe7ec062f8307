"""Options in text: ``trajectory{mode=exact,probes=32}``, as on the command line and in a pipeline's text."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from .errors import OptionError, nearest


def parse(text: str, where: str) -> tuple[str, dict[str, str]]:
    """``name{option=value,option=value}`` -> (name, options). Raises OptionError for anything else.

    >>> parse("fisher{probes=4}", "--importance")
    ('fisher', {'probes': '4'})
    """
    name, brace, rest = text.strip().partition("{")
    if not brace:
        return name, {}
    inside, closed, after = rest.rpartition("}")
    if not closed or after.strip():
        raise OptionError(f"'{text}' cannot be read", where=where, why="a brace is not closed at the end",
                          cure="write name{option=value,option=value}")
    options: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in inside.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key or not value:
            raise OptionError(f"'{part}' is not an option", where=where, cure="write option=value")
        if key.replace("-", "_") in options:
            raise OptionError(f"the option '{key}' is given twice", where=where)
        options[key.replace("-", "_")] = value
    return name.strip(), options


def build(cls: type[Any], options: Mapping[str, str], what: str, where: str) -> Any:
    """``cls(**options)`` of a dataclass whose fields are text, numbers or truth values.

    Raises OptionError naming the nearest option, or the type that was expected. Fields with ``repr=False`` (data,
    callbacks) are no options.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    known = {f.name: hints[f.name] for f in fields if f.init and f.repr}
    values = {}
    for name, text in options.items():
        if name not in known:
            raise OptionError(f"{what} has no option '{name}'", where=where,
                              cure=nearest(name, known) if known else "it has no options")
        values[name] = _value(text, known[name], f"{where} {{{name}={text}}}")
    return cls(**values)


def _value(text: str, kind: Any, where: str) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    words = {"true": True, "yes": True, "false": False, "no": False}
    for one in (bool, int, float, str):
        if one not in kinds:
            continue
        if one is bool:
            if text.lower() in words:
                return words[text.lower()]
            continue
        try:
            return one(text)
        except ValueError:
            continue
    expected = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not type(None))
    raise OptionError(f"'{text}' is not of the right type", where=where, why=f"expected {expected}")
