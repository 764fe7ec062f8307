"""The part of JSON Schema that fxprune's own files need, and a check of plain data against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
KEYWORDS = (
    "$schema",
    "title",
    "description",
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "minimum",
    "const",
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
MOST = 5  # problems that are told


def problems(value: Any, schema: Schema, at: str = "report") -> list[str]:
    """What does not fit, with its place, the first five of it; [] where all does.

    >>> problems({"a": [1, "x"]}, {"type": "object", "properties": {"a": {"items": {"type": "integer"}}}})
    ['report.a[1] must be integer, not str']
    """
    found = []
    for problem in _problems(value, schema, at):
        found.append(problem)
        if len(found) == MOST:
            break
    return found


def _problems(value: Any, schema: Schema, at: str) -> Iterator[str]:
    allowed = schema.get("type")
    if allowed is not None:
        names = [allowed] if isinstance(allowed, str) else list(allowed)
        if not any(_is(value, name) for name in names):
            yield f"{at} must be {' or '.join(names)}, not {type(value).__name__}"
            return
    if "const" in schema and value != schema["const"]:
        yield f"{at} must be {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at} must be one of {', '.join(map(repr, schema['enum']))}"
    if "minimum" in schema and _is(value, "number") and not value >= schema["minimum"]:
        yield f"{at} must be at least {schema['minimum']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        more = schema.get("additionalProperties", True)
        for name, item in value.items():
            inner = known.get(name, more)
            if inner is False:
                yield f"{at}.{name} is not known"
            elif isinstance(inner, Mapping):
                yield from _problems(item, inner, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{at}[{i}]")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])
