"""One node at a time: its inputs as its translation reads them, its failure as an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import FxpruneError, LoadError, UnsupportedOp
from ..rehearsal import first_line
from .graph import Graph, Node
from .known import HOSTED, Known
from .table import TRANSLATIONS, NotTranslatedError, Op

_CUT = "end the model before it (onnx.utils.extract_model), or give the PyTorch model that was exported"


def check_translated(graph: Graph) -> None:
    """Raise UnsupportedOp for ops that have no translation, with the first node of each."""
    unknown: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op not in TRANSLATIONS:
            unknown.setdefault(node.op, node)
    if unknown:
        first, more = next(iter(unknown.values())), ", ".join(list(unknown)[1:])
        custom = "::" in first.op and not first.op.startswith("com.microsoft")
        raise UnsupportedOp(
            f"{first.op} has no translation from ONNX",
            where=f"{graph.path}: {first}",
            why=("it is an op of the file's own" if custom else f"it is none of {len(TRANSLATIONS)} that have one")
            + (f"; neither have {more}" if more else ""),
            cure=_CUT,
        )


def execute(op: Op, values: Sequence[Any], path: Path, tensor_of: Callable[[int], Tensor]) -> Any:
    """What a node gives for these values: tensors, or numbers that are known. ``tensor_of`` gives the input at a
    position as a tensor."""
    node, given = op.node, [v for v in values if v is not None]
    hosted = HOSTED.get(node.op)
    if hosted is not None and given and all(isinstance(v, Known) for v in given):
        found = compute(hosted, op, values, path)
        if found is not None:
            return found
    translation = TRANSLATIONS[node.op]
    args: list[Any] = []
    for i, value in enumerate(values):
        if value is None:
            args.append(None)
        elif i in translation.known:
            args.append(_numbers(op, i, value, path))
        elif translation.numbers and isinstance(value, Known) and value.values.size == 1 and _alone(value, values):
            args.append(value.numbers()[0])
        else:
            args.append(tensor_of(i))
    return compute(translation.run, op, args, path)


def compute(run: Callable[..., Any], op: Op, args: Sequence[Any], path: Path) -> Any:
    """What a translation makes of its arguments. Raises UnsupportedOp or LoadError that names the node."""
    try:
        return run(op, *args)
    except FxpruneError:
        raise
    except Exception as failure:
        raise _name_failure(op, failure, path) from failure


def _alone(value: Known, values: Sequence[Any]) -> bool:
    """Whether a number in place of the array changes no shape: another input is a tensor of as many dimensions."""
    return any(isinstance(v, Tensor) and v.dim() >= value.values.ndim for v in values)


def _numbers(op: Op, position: int, value: Any, path: Path) -> tuple[Any, ...]:
    if isinstance(value, Known):
        return value.numbers()
    raise UnsupportedOp(
        f"{op.node.op} asks for sizes that depend on values",
        where=f"{path}: {op.node}",
        why=f"its input '{op.node.inputs[position]}' is computed from the values of tensors, not from their sizes",
        cure=_CUT,
    )


def _name_failure(op: Op, failure: Exception, path: Path) -> FxpruneError:
    where = f"{path}: {op.node}"
    if isinstance(failure, NotTranslatedError):
        return UnsupportedOp(
            f"{op.node.op} is not translated as it stands here", where=where, why=str(failure), cure=_CUT
        )
    return LoadError(
        f"{op.node.op} does not compute",
        where=where,
        why=first_line(failure),
        cure="the file is damaged, or its inputs are others than it says: run it in onnxruntime",
    )
