"""Everything that may be asked for, by the names of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def by_option(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a call asked for, by the names of the command line: the report's ``options``.

    >>> by_option("compile", {"example_inputs": "1x3", "allow_empty": True, "on_event": print})
    {'command': 'compile', 'input': '1x3', 'allow-empty': True}
    """
    names = {"example_inputs": "input"}
    return {"command": command} | {names.get(k, k).replace("_", "-"): v for k, v in given.items() if k != "on_event"}


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as plain data for a report: what JSON has no form for is named by its type, as ``<DataLoader>``.

    >>> plain({"flops": 0.5, "freeze": ("a", "b"), "data": object()})
    {'flops': 0.5, 'freeze': ['a', 'b'], 'data': '<object>'}
    """

    def one(value: Any) -> Any:
        if isinstance(value, str):
            return str(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, list | tuple) and all(v is None or isinstance(v, str | int | float) for v in value):
            return [one(v) for v in value]
        return f"<{type(value).__name__}>"

    return {name: one(value) for name, value in options.items()}
