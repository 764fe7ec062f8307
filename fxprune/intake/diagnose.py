"""Why ``torch.export`` refused a model, told as what, where, why, cure."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from ..errors import CaptureError
from .evaluation import run

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_IR = os.path.join(os.path.dirname(os.path.dirname(_HERE)), "ir") + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OP = re.compile(r"\b(?:torch\.ops\.)?((?:aten|torchvision|prims|higher_order)(?:::|\.)\w+(?:\.\w+)?)")


def first_line(error: BaseException) -> str:
    """The first sentence of a message that says something, at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    details = [line[2:] for line in lines if line.startswith("- ")]  # torch lists the sizes that clash
    telling = [line for line in details + lines if line and not line.endswith("!")]
    text = telling[0].split(". ")[0] if telling else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def why_capture_failed(
    error: BaseException, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> CaptureError | None:
    """The error for the user where constant sizes would not help either; else None."""
    missing = _missing_package(error)
    if missing:
        return CaptureError(
            f"the model needs the package '{missing}'",
            where=source_line(error) or name,
            why=first_line(error),
            cure=f"pip install {missing}",
        )
    try:
        run(model, args, kwargs)
    except Exception as broken:  # the model's own failure is what we want to tell
        why = f"{type(broken).__name__}: {first_line(broken)}" if str(broken).strip() else type(broken).__name__
        cure = "pass inputs of the shape and type the model takes (`--input`, or args and kwargs)"
        if "custom C++ ops" in str(broken):  # torchvision's words where its wheel was built for another torch
            cure = f"install the torchvision built for torch {torch.__version__}, or export without that op"
        return CaptureError(
            "the model fails on the example inputs", where=source_line(broken) or name, why=why, cure=cure
        )
    return None


def last_word(error: BaseException, name: str) -> CaptureError:
    """The error for the user when no choice of sizes could be exported."""
    where, why, text, op = source_line(error) or name, first_line(error), str(error), _op(error)
    what = f"torch.export failed at {op}" if op else "torch.export failed"
    cure = "export it yourself with torch.export.export and pass the ExportedProgram or its .pt2 file"
    if isinstance(error, DataDependentOutputException) or "data-dependent" in text:
        what = f"{op} depends on a tensor's values" if op else "the control flow depends on a tensor's values"
        cure = "compute without looking at values (torch.where, masks), or move that part out of the model"
    elif isinstance(error, DynamicOutputShapeException):
        what, cure = f"{op} has an output whose size depends on values", "use a mask of fixed size in its place"
    elif "assigned during export" in text:
        what = "the model changes its own attributes while it runs"
        cure = "register the tensor as a buffer, or stop assigning it in forward()"
    elif "not a known type" in text or "Unsupported output type" in text:
        what = "an output is neither a tensor nor a plain container"
        cure = "return tensors in tuples, lists, dicts or dataclasses"
    elif isinstance(error, NotImplementedError | UnsupportedOperatorException) and op:
        what, name = f"{op} cannot be traced: torch does not know the shape of its result", "::".join(op.split(".")[:2])
        cure = f"tell torch: @torch.library.register_fake('{name}')"
    elif ".numpy()" in text:
        what, cure = "the model leaves torch for numpy", "compute with torch ops in forward()"
    return CaptureError(what, where=where, why=f"{type(error).__name__}: {why}", cure=cure)


def source_line(error: BaseException) -> str:
    """The innermost line of the model's own code that led to ``error``: ``file:line in function  `code` ``."""
    frames = [f for e in _chain(error) for f in traceback.extract_tb(e.__traceback__)]
    own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE, "<")) and os.sep in f.filename]
    inside = [f for f in own if f.name != "<module>"] or own
    forward = [i for i, f in enumerate(inside) if f.name == "forward"]
    if not forward:  # the failure came after tracing: torch quotes the line in its message
        quoted = re.search(r"File \"?([^\"\n:,]+\.py)\"?(?:, line |:)(\d+),? in (\w+)", str(error))
        if quoted is None:
            return ""
        file, line, function = quoted.group(1), int(quoted.group(2)), quoted.group(3)
    else:
        frame = inside[-1]
        file, line, function = frame.filename, frame.lineno or 0, frame.name
    return _quote_source(file, line, function)


def line_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of the model's own code on a stack of calls, as :func:`source_line` tells it; empty if none.

    A model that is one of torch's own modules has its lines there.
    """
    begin = next((i for i, f in enumerate(stack) if f.filename.startswith(_TORCH + "export" + os.sep)), 0)
    inside = [f for f in stack[begin:] if os.sep in f.filename and not f.filename.startswith((_HERE, _IR, "<"))]
    own = [f for f in inside if not f.filename.startswith(_TORCH)]
    layers = [f for f in inside if f.filename.startswith(_TORCH + "nn" + os.sep + "modules") and f.name == "forward"]
    for frame in reversed(own or layers):
        return _quote_source(frame.filename, frame.lineno or 0, frame.name)
    return ""


def _quote_source(file: str, line: int, function: str) -> str:
    code = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}:{line} in {function}" + (f"  `{code}`" if code else "")


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and what caused it, outermost first."""
    result: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in result:
        result.append(current)
        current = current.__cause__ or current.__context__
    return result


def _missing_package(error: BaseException) -> str:
    for e in _chain(error):
        if isinstance(e, ModuleNotFoundError) and e.name:
            return e.name.split(".")[0]
        if isinstance(e, ImportError):
            named = re.search(r"requires the (\w+) library|pip install (\w+)", str(e))
            if named:
                return (named.group(1) or named.group(2)).lower()
    return ""


def _op(error: BaseException) -> str:
    for e in _chain(error):
        func = getattr(e, "func", None)
        if func is not None:
            return str(func)
        found = _OP.search(str(e))
        if found:
            return found.group(1).replace("::", ".")
    return ""
