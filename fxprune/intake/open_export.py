"""Exporting a module with as many open sizes as it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from ..errors import CaptureError
from ..ir.dataflow import op_name
from ..ir.program import Program
from ..ir.signature import find_stuck
from .closed_sizes import Closed, Heard, constant, find_closed_sizes, listening, openable
from .diagnose import first_line, last_word, source_line, why_capture_failed
from .tensors import shorten
from .untouched import untouched

READERS = frozenset({"cat", "scaled_dot_product_attention", "matmul", "bmm", "baddbmm"})
"""Ops that read what a model keeps of the past (keys and values), and no picture."""


@dataclass(frozen=True)
class Ask:
    """Which sizes one attempt leaves open.

    batches   how dimension 0 of each tensor is: on its own (Dim.AUTO), shared (Dim("batch")), or constant
    lengths   whether other dimensions of ids and masks are open;  features  those of floating inputs
    strict    read the code with dynamo, where ``len(x)`` keeps a batch open
    whole     ids of tensors of which every dimension is open
    shut      (id of a tensor, dimension) that is not, and why
    """

    batches: tuple[Any, ...]
    lengths: bool = True
    features: bool = True
    strict: bool = False
    whole: frozenset[int] = frozenset()
    shut: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def shapes(self, tensors: Sequence[Tensor]) -> ShapesCollection:
        asked = ShapesCollection()
        for tensor, batch in zip(tensors, self.batches, strict=True):
            if not tensor.dim():
                continue
            floats = tensor.is_floating_point() or tensor.is_complex()
            others = openable(tensor) if (self.features if floats else self.lengths) else ()
            if id(tensor) in self.whole:
                others = tuple(range(1, tensor.dim()))
            lengths = {i: Dim.AUTO for i in others if (id(tensor), i) not in self.shut}
            asked[tensor] = {0: batch, **lengths}
        return asked


@dataclass(frozen=True)
class Opened:
    """An exported module, how it was asked for, and the sizes that are constants in it all the same."""

    exported: ExportedProgram
    ask: Ask
    closed: tuple[Closed, ...]
    heard: tuple[Heard, ...]

    @property
    def batch_closed(self) -> bool:
        return any(c.is_batch for c in self.closed)

    @property
    def rank(self) -> tuple[bool, int]:
        """Less is better."""
        return self.batch_closed, len(self.closed)


def export_open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Opened:
    """Export with as many open sizes as the model allows, from the most general to all constant.

    Sizes are open each on its own (``Dim.AUTO``) at first; then inputs share one batch; then lengths are constant; then
    everything is. Where a size was lost because Python asked for it as a number, the code is read by dynamo. Where
    nothing can be exported, all of it once more with the model as its first call leaves it: what it makes there may be
    what tracing cannot follow. Raises CaptureError.
    """
    try:
        return _widest(model, args, kwargs, name)
    except _NoExport:
        pass
    with untouched(model, args, kwargs):
        model(*pytree.tree_map_only(Tensor, torch.clone, args), **pytree.tree_map_only(Tensor, torch.clone, kwargs))
        try:
            return _widest(model, args, kwargs, name)
        except _NoExport as error:
            raise last_word(error.first, name) from error.first


class _NoExport(Exception):
    """No choice of sizes could be exported; ``first`` is what torch said to the most general one."""

    def __init__(self, first: Exception) -> None:
        super().__init__(str(first))
        self.first = first


def _widest(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Opened:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    best: Opened | None = None
    failure: Exception | None = None
    asks = _asks(tensors)
    while asks:
        ask = asks.pop(0)
        try:
            opened = _attempt(model, args, kwargs, tensors, ask, "" if failure is None else _reason(failure))
        except CaptureError:  # no choice of sizes can mend it
            raise
        except Exception as error:  # torch raises anything here, and so does the model
            cause = why_capture_failed(error, model, args, kwargs, name) if failure is None else None
            if cause is not None:
                raise cause from error
            failure = failure or error
            continue
        labels = (
            _find_shared_batches(opened.exported, len(tensors)) if ask.batches.count(Dim.AUTO) == len(tensors) else None
        )
        if labels is not None:
            batches = tuple(Dim.AUTO if i is None else Dim(f"batch_{i}") for i in labels)
            asks.insert(0, replace(ask, batches=batches))
            continue
        best = opened if best is None or opened.rank < best.rank else best
        if not best.batch_closed or any(c.is_batch and c.counted for c in best.closed):
            break
    if best is None:
        raise _NoExport(failure or Exception("there are no sizes to choose"))
    return _refine(_read_by_dynamo(best, model, args, kwargs, tensors), model, args, kwargs, tensors)


def _asks(tensors: Sequence[Tensor]) -> list[Ask]:
    own, static = (Dim.AUTO,) * len(tensors), (Dim.STATIC,) * len(tensors)
    shared = (Dim("batch"),) * len(tensors)
    lengths = any(openable(t) and not t.is_floating_point() for t in tensors)
    features = any(openable(t) and t.is_floating_point() for t in tensors)
    asks = [Ask(own), Ask(own, features=False)] if features else [Ask(own)]
    asks += [Ask(shared, features=False)]
    if lengths:
        asks += [Ask(shared, lengths=False, features=False), Ask(own, lengths=False, features=False)]
    return [*asks, Ask(static, lengths=False, features=False)]


def _attempt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor], ask: Ask, why: str = ""
) -> Opened:
    """One export. ``why`` says of sizes that were not asked to be open why they were not."""
    before = {n for n, _ in model.named_parameters()}
    sizes = ask.shapes(tensors).dynamic_shapes(model, args, kwargs)
    with untouched(model, args, kwargs), listening() as heard:  # every attempt begins with the model as it was given
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=ask.strict)
        made = [n for n, _ in model.named_parameters() if n not in before]
    if made:
        raise CaptureError(
            "the model makes weights of its own when it first runs",
            where=shorten(made),
            why="a module that was never called has none there, and every copy of it would draw others",
            cure="call it once on an input before passing it",
        )
    for held, value in exported.constants.items():
        if not isinstance(value, Tensor):
            raise CaptureError(
                "the model computes with an object that is no tensor",
                where=held,
                why=f"it is a {type(value).__name__}, which no artefact can hold",
                cure="compute what it gives outside the model, and pass that as an input",
            )
    lengths = {(id(t), i): "" for t in tensors if id(t) in ask.whole for i in range(1, t.dim())} | dict(ask.shut)
    return Opened(exported, ask, find_closed_sizes(exported, heard, lengths, why), tuple(heard))


def _reason(error: Exception) -> str:
    return source_line(error) or first_line(error)


def _read_by_dynamo(
    opened: Opened, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> Opened:
    """``opened``, or what dynamo makes of the code where that keeps more open. Tried where a size was lost as a number,
    or the batch was."""
    if not (opened.batch_closed or any(c.counted for c in opened.closed)):
        return opened
    own = (Dim.AUTO,) * len(tensors)
    try:
        read = _attempt(model, args, kwargs, tensors, replace(opened.ask, batches=own, strict=True))
    except Exception:  # dynamo refuses much that plain tracing takes
        return opened
    if _find_shared_batches(read.exported, len(tensors)) is not None:
        return opened
    return read if read.rank < opened.rank else opened


def read_strictly(opened: Opened, model: nn.Module) -> Opened | None:
    """The same module read by dynamo, with what is open in ``opened``; None where it was that, or cannot be read so."""
    args, kwargs = opened.exported.example_inputs or ((), {})
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if opened.ask.strict:
        return None
    try:
        read = _attempt(model, args, kwargs, tensors, replace(opened.ask, strict=True))
    except Exception:  # dynamo refuses much that plain tracing takes
        return None
    return read if read.rank <= opened.rank else None


def _refine(
    opened: Opened, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> Opened:
    """The same with keys and values of the past open, and without sizes that look open and can have one value only."""
    past, shut = _past(opened.exported), _one_valued(opened)
    if Dim.STATIC in opened.ask.batches or not (past or shut):
        return opened
    ask = replace(opened.ask, whole=past, shut=shut)
    try:
        again = _attempt(model, args, kwargs, tensors, ask)
    except Exception:  # what was open may lean on what is shut now
        return opened
    return opened if again.batch_closed > opened.batch_closed else again


def _past(exported: ExportedProgram) -> frozenset[int]:
    """Ids of floating inputs of four dimensions or more that are read as keys and values are, and not as pictures."""
    found = set[int]()
    for node, tensor in _inputs(exported):
        readers = {op_name(user) for user in node.users} - {"sym_size"}
        if tensor.is_floating_point() and tensor.dim() > 3 and readers and readers <= READERS:
            found.add(id(tensor))
    return frozenset(found)


def _one_valued(opened: Opened) -> dict[tuple[int, int], str]:
    """(id of an input, dimension) -> the line of the model, where a size is open and only the example's is taken."""
    conditions = find_stuck(Program(opened.exported))
    found: dict[tuple[int, int], str] = {}
    for node, tensor in _inputs(opened.exported):
        for position, size in enumerate(node.meta["val"].shape):
            if position and str(size) in conditions:
                symbols = conditions[str(size)].free_symbols
                lines = [h.line for h in opened.heard if h.condition.free_symbols & symbols]
                found[id(tensor), position] = lines[-1] if lines else ""
    return found


def _inputs(exported: ExportedProgram) -> list[tuple[Node, Tensor]]:
    """The placeholders of the user's tensors, each with its example."""
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    pairs = zip(exported.graph_signature.user_inputs, pytree.tree_leaves(exported.example_inputs), strict=True)
    return [(nodes[name], value) for name, value in pairs if isinstance(value, Tensor) and name in nodes]


def _find_shared_batches(exported: ExportedProgram, count: int) -> list[int | None] | None:
    """Which of the ``count`` input tensors must have the same batch although the graph does not know it.

    One label per tensor, the same for tensors that share; None for a tensor whose batch is constant. None in all when
    nothing has to be shared. The signs: a size such as ``(16*s98)//s67`` of two batches, or an op on two tensors that
    lead with them (``scaled_dot_product_attention`` with a mask checks nothing while it is traced). Texts and images of
    a CLIP may differ: they meet in neither way.
    """
    names = set(exported.graph_signature.user_inputs)
    inputs = [n.meta.get("val") for n in exported.graph.nodes if n.name in names]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    batches = [str(t.shape[0]) if t.dim() and constant(t.shape[0]) is None else None for t in tensors]
    label = {batch: i for i, batch in enumerate(batches) if batch is not None}
    before = len(set(label.values()))
    for node in exported.graph.nodes:
        if node.op == "output":
            continue
        meeting = [{str(t.shape[0]) for t in _tensors(node.all_input_nodes) if t.dim()}]
        for size in pytree.tree_leaves([list(t.shape) for t in _tensors([node])]):
            if isinstance(size, torch.SymInt):
                divisions = size.node.expr.atoms(FloorDiv, Mod, PythonMod)
                meeting += [{str(symbol) for symbol in division.free_symbols} for division in divisions]
        for group in meeting:
            together = {label[b] for b in group if b in label}
            if len(together) > 1:
                label = {b: min(together) if i in together else i for b, i in label.items()}
    if len(set(label.values())) == before or len(tensors) != count:
        return None
    return [None if batch is None else label[batch] for batch in batches]


def _tensors(nodes: Sequence[Node]) -> list[Tensor]:
    values = pytree.tree_leaves([node.meta.get("val") for node in nodes])
    return [value for value in values if isinstance(value, Tensor)]
