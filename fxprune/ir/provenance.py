"""Where a node of a graph comes from: the user's source line, and the pass that made it."""

from __future__ import annotations

import re
from pathlib import Path

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)')


def source_line(trace: str | None) -> str:
    """``model.py:12  `x = odd(x)` `` of the innermost frame of a stack trace, or nothing.

    >>> source_line('  File "/home/a/model.py", line 12, in forward\\n    x = odd(x)')
    'model.py:12  `x = odd(x)`'
    """
    frames = _FRAME.findall(trace or "")
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f"{Path(file).name}:{line}  `{code.strip()}`"


def maker_of(node: Node) -> str:
    """The slug of the pass that made the node; "" for what was captured."""
    return str(node.meta.get("fxprune_pass") or "")


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, at most 400 characters."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
