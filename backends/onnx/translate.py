"""torch.onnx's exporter, asked in two steps: a failure of its optimiser costs the optimiser's savings, not the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from ...errors import LoweringError
from ...ir.program import Program
from ...ir.provenance import first_line, source_line
from ...process.silence import quiet
from .translations import translations


def translate(program: Program, opset: int) -> tuple[Any, tuple[str, ...]]:
    """The program as a ``torch.onnx.ONNXProgram``, and what the user must know of how it was made.

    Raises LoweringError with the node, the op and the line of the model that have no translation.
    """
    model = _export(program, opset)
    try:
        with quiet():
            model.optimize()
    except Exception as error:  # rewriting rules raise what they like, and leave the graph half rewritten
        note = (
            f"the exporter's optimiser failed{_at(error)}: {first_line(_innermost(error))}; the file is written without"
        )
        return _export(program, opset), (note,)
    return model, ()


def _export(program: Program, opset: int) -> Any:
    try:
        with quiet():
            return torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=False,
                custom_translation_table=translations(),
            )
    except Exception as error:  # the exporter wraps what its translations raise, several levels deep
        raise _lowering_error(program, error) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, the innermost last."""
    one: BaseException | None = error
    for _ in range(10):
        if one is None:
            return
        yield one
        one = one.__cause__ or one.__context__


def _innermost(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _at(error: BaseException) -> str:
    """ " at node NAME (OP)" of the node that was being rewritten; "" where no frame of the optimiser holds one."""
    import onnx_ir

    found = None
    for one in _chain(error):
        step: TracebackType | None = one.__traceback__
        while step is not None:
            node = step.tb_frame.f_locals.get("node")
            found = node if isinstance(node, onnx_ir.Node) else found
            step = step.tb_next
    return "" if found is None else f" at node {found.name} ({found.op_type})"


_GUILTY = re.compile(r"%(\w+) : \[num_users=\d+\] = call_function\[target=([\w.]+)\]")


def _lowering_error(program: Program, error: BaseException) -> LoweringError:
    """What the exporter said, as node, op and source line."""
    said = list(_chain(error))
    guilty = next((m for e in reversed(said) if (m := _GUILTY.search(str(e)))), None)
    reason = first_line(said[-1])
    if guilty is None:
        return LoweringError(
            "the graph cannot be translated to ONNX",
            where=program.name,
            why=reason,
            cure="`--target eager` works meanwhile",
        )
    name, op = guilty.groups()
    node = next((n for n in program.graph.nodes if n.name == name), None)
    trace = guilty.string[guilty.end() :] if node is None else node.meta.get("stack_trace") or ""
    return LoweringError(
        f"{op.removeprefix('torch.ops.')} has no translation to ONNX"
        if "No ONNX function" in reason
        else f"{op.removeprefix('torch.ops.')} cannot be translated to ONNX",
        where=f"node {name}" + (f", from {line}" if (line := source_line(trace)) else ""),
        why=reason,
        cure="write that line with standard ops, or use `--target eager`",
    )
