"""Options in text: ``trajectory{mode=exact,probes=32}``, as on the command line and in a pipeline's text."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError, nearest
from .cost import Budget

_PAIRS = {"{": "}", "[": "]"}


def split(text: str, separator: str = ",") -> list[str]:
    """The parts of ``text`` between separators that no brace or bracket encloses, stripped; empty ones are left out.

    Raises ValueError where braces or brackets do not pair up.

    >>> split("a,b{c=1,d=[2 3]},e")
    ['a', 'b{c=1,d=[2 3]}', 'e']
    """
    parts, open_ones, start = [], list[str](), 0
    for at, letter in enumerate(text):
        if letter in _PAIRS:
            open_ones.append(_PAIRS[letter])
        elif letter in _PAIRS.values():
            if not open_ones or open_ones.pop() != letter:
                raise ValueError(f"'{letter}' closes nothing")
        elif letter == separator and not open_ones:
            parts.append(text[start:at])
            start = at + 1
    if open_ones:
        raise ValueError(f"'{open_ones[-1]}' is missing")
    return [p for p in (part.strip() for part in [*parts, text[start:]]) if p]


def parse(text: str, where: str) -> tuple[str, dict[str, str]]:
    """``name{option=value,option=value}`` -> (name, options); values may hold braces and brackets of their own.

    Raises OptionError for anything else.

    >>> parse("fisher{probes=4}", "--importance")
    ('fisher', {'probes': '4'})
    """
    name, brace, rest = text.strip().partition("{")
    if not brace:
        return name, {}
    inside, closed, after = rest.rpartition("}")
    try:
        parts = split(inside)
    except ValueError as error:
        raise OptionError(
            f"'{text}' cannot be read", where=where, why=str(error), cure="write name{option=value,option=value}"
        ) from None
    if not closed or after.strip():
        raise OptionError(
            f"'{text}' cannot be read",
            where=where,
            why="a brace is not closed at the end",
            cure="write name{option=value,option=value}",
        )
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key or not value:
            raise OptionError(f"'{part}' is not an option", where=where, cure="write option=value")
        if key.replace("-", "_") in options:
            raise OptionError(f"the option '{key}' is given twice", where=where)
        options[key.replace("-", "_")] = value
    return name.strip(), options


def build(cls: type[Any], options: Mapping[str, str], what: str, where: str, **given: Any) -> Any:
    """``cls(**options, **given)`` of a dataclass whose fields are text, numbers, truth values, budgets or lists.

    Raises OptionError naming the nearest option, the type that was expected, or what is missing. Fields with
    ``repr=False`` (data, callbacks) are no options: they come as ``given``.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    known = {f.name: hints[f.name] for f in fields if f.init and f.repr}
    values = {}
    for name, text in options.items():
        if name not in known:
            raise OptionError(
                f"{what} has no option '{name}'",
                where=where,
                cure=nearest(name, known) if known else "it has no options",
            )
        values[name] = _value(text, known[name], f"{where} {{{name}={text}}}")
    for f in fields:
        needed = f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in values and f.name not in given:
            raise OptionError(f"{what} needs the option '{f.name}'", where=where)
    return cls(**values, **given)


def _value(text: str, kind: Any, where: str) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    if any(typing.get_origin(k) is tuple for k in kinds):
        if not (text.startswith("[") and text.endswith("]")):
            raise OptionError(f"'{text}' is not a list", where=where, cure="write [one two]")
        parts = split(text[1:-1], " ")
        if any(typing.get_args(k)[:1] == (int,) for k in kinds):
            if not all(part.isascii() and part.removeprefix("-").isdigit() for part in parts):
                raise OptionError(f"'{text}' is not a list of whole numbers", where=where, cure="write [8 6]")
            return tuple(map(int, parts))
        return tuple(parts)
    if Budget in kinds:
        metric, equals, amount = text.partition("=")
        if not equals:
            raise OptionError(f"'{text}' is not a budget", where=where, cure="write budget=flops=0.5")
        if metric == "latency":
            return Budget.of_latency(amount.removesuffix("ms"), ms=amount.endswith("ms"))
        return Budget.parse(metric, amount)
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
