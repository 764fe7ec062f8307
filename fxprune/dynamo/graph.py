"""A graph of dynamo's as a module with the real names of its tensors, and that module as a :class:`Program`.

Dynamo hands its backend a graph of torch calls in which every parameter and buffer is an input. Which tensor of the
model that is follows from the tensor itself (where the model is known), else from dynamo's own note of its source:
``L['self']._modules['blocks']._modules['0']._parameters['weight']``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node

from ..data.batch import Batch
from ..errors import CaptureError, NothingToPrune
from ..intake.containers import plain_signature
from ..intake.diagnose import last_word, why_capture_failed
from ..intake.evaluation import evaluation_form
from ..ir.dataflow import arguments_by_name
from ..ir.program import Program
from ..ir.rebuild import copy_graph, rebuild
from ..ir.writes import find_written_inputs
from ..process.silence import quiet

_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|\[['\"]?([^'\"\]]+)['\"]?\]")
_OWNED = re.compile(r"\._(?:modules|parameters|buffers)\[")
_MODES = ("training", "train")


@dataclass(frozen=True)
class Slot:
    """One input of dynamo's graph.

    kind    ``bound``: a tensor of the model · ``user``: a tensor of the call · ``size``: a size of one of these, as an
            integer · ``number``: any other integer
    source  dynamo's own name for it
    dims    of a tensor: which dimensions dynamo left open
    origin  of a size: the placeholder and the dimension it is the size of
    """

    name: str
    kind: str
    source: str
    dims: tuple[int, ...] = ()
    origin: tuple[str, int] = ("", 0)


def slots_of(gm: GraphModule, inputs: Sequence[Any]) -> tuple[Slot, ...]:
    """What the inputs of the graph are, in order. Only while dynamo's notes are there: in the backend itself."""
    found: list[Slot] = []
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    shapes = {n.name: _shape(n) for n in nodes}
    for node, value in zip(nodes, inputs, strict=True):
        source = _source(node)
        if isinstance(value, Tensor):
            owned = isinstance(value, nn.Parameter) or bool(_OWNED.search(source))
            open_dims = tuple(i for i, size in enumerate(shapes[node.name]) if isinstance(size, torch.SymInt))
            found.append(Slot(node.name, "bound" if owned else "user", source, open_dims))
            continue
        symbol = str(node.meta.get("example_value"))
        origin = next(
            ((name, i) for name, shape in shapes.items() for i, size in enumerate(shape) if str(size) == symbol), None
        )
        found.append(
            Slot(node.name, "number", source) if origin is None else Slot(node.name, "size", source, origin=origin)
        )
    return tuple(found)


def _source(node: Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    name: Any = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method before torch 2.13


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def qualify_name(source: str) -> str:
    """The name of a tensor within its model, from dynamo's note of where it came from.

    >>> qualify_name("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    'blocks.0.weight'
    >>> qualify_name("G['model'].scale")
    'scale'
    """
    steps = ["".join(step) for step in _STEP.findall(source[source.find("]") + 1 :])]
    return ".".join(steps) or re.sub(r"\W+", "_", source).strip("_")


def names_of(slots: Sequence[Slot], inputs: Sequence[Any], root: nn.Module | None) -> dict[str, str]:
    """Placeholder -> qualified name of the tensor it stands for, as ``root.named_parameters()`` would say it."""
    known: dict[int, str] = {}
    if root is not None:
        plain = (
            (f"{path}.{name}".lstrip("."), value)
            for path, module in root.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        )
        for name, tensor in [*root.named_parameters(), *root.named_buffers(), *plain]:
            known.setdefault(id(tensor), name)
    result = {}
    for slot, value in zip(slots, inputs, strict=True):
        if slot.kind == "bound" or id(value) in known:
            result[slot.name] = known.get(id(value)) or qualify_name(slot.source)
    return result


def user_slots(slots: Sequence[Slot], names: Mapping[str, str]) -> list[Slot]:
    """The inputs that are tensors of the call."""
    return [s for s in slots if s.kind == "user" and s.name not in names]


def bind_module(gm: GraphModule, slots: Sequence[Slot], names: Mapping[str, str], inputs: Sequence[Any]) -> nn.Module:
    """The graph as a module that owns the model's tensors under their names and takes the call's tensors alone.

    A size becomes the size of its tensor, so that the graph follows its inputs again.
    """
    holder = nn.Module()
    for slot, value in zip(slots, inputs, strict=True):
        if slot.name in names:
            _place(holder, names[slot.name], value)
    graph, made = Graph(), dict[Node, Node]()
    by_name = {s.name: s for s in slots}
    user = {s.name for s in user_slots(slots, names)}
    nodes = list(gm.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    for node in placeholders:
        if node.name in user:
            made[node] = graph.placeholder(node.name)
    named = {n.name: n for n in placeholders}
    for node in placeholders:
        if node.name in names:
            made[node] = graph.get_attr(names[node.name])
    for node in placeholders:
        if by_name[node.name].kind == "size":
            tensor, dim = by_name[node.name].origin
            made[node] = graph.call_method("size", (made[named[tensor]], dim))
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op in ("get_attr", "call_module"):
            _place(holder, str(node.target), _find_tensor(gm, str(node.target)))
        new = graph.node_copy(node, lambda n: made[n])
        new.meta = {k: v for k, v in node.meta.items() if k == "stack_trace"}
        made[node] = new
    return GraphModule(holder, graph, class_name="Part").eval()


def _find_tensor(gm: GraphModule, path: str) -> Any:
    value: Any = gm
    for word in path.split("."):
        value = getattr(value, word)
    return value


def _place(holder: nn.Module, path: str, value: Any) -> None:
    *folders, last = path.split(".")
    for word in folders:
        if not isinstance(getattr(holder, word, None), nn.Module):
            holder.add_module(word, nn.Module())
        holder = getattr(holder, word)
    if isinstance(value, nn.Parameter):
        holder.register_parameter(last, value)
    elif isinstance(value, Tensor):
        holder.register_buffer(last, value)
    else:
        setattr(holder, last, value)


def trains(gm: GraphModule) -> str:
    """The node that runs in training form (dropout that draws, batch norm by batch statistics), or ""."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        given = arguments_by_name(node)
        modes = [given[word] for word in _MODES if word in given]
        if "use_input_stats" in given:  # of an instance norm: without running statistics it uses no others
            modes.append(given["use_input_stats"] and given.get("running_mean") is not None)
        if not modes and "dropout_p" in given:  # an attention that is told nothing else
            modes.append(bool(given["dropout_p"]))
        if any(mode is True for mode in modes):
            return str(node.name)
    return ""


def numbers_in(gm: GraphModule) -> str:
    """What the graph returns that is no tensor, or ""."""
    (returned,) = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args
    for value in returned if isinstance(returned, tuple | list) else (returned,):
        kind = value.meta.get("example_value") if isinstance(value, Node) else value
        if not isinstance(kind, Tensor):
            return str(value)
    return ""


def program_of(module: nn.Module, user: Sequence[Slot], inputs: Sequence[Tensor], name: str) -> Program:
    """The module as a Program at the inputs' sizes; what dynamo left open stays open, and nothing else.

    A graph that dynamo made for one batch size holds it as a constant, so another size must not be tried on it.
    Raises CaptureError where torch.export cannot follow, or closes a size that dynamo left open.
    """
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
    shapes = {n: {d: Dim.AUTO for d in s.dims} for n, s in zip(names, user, strict=True)}
    notes: list[str] = []
    try:
        with evaluation_form(module), quiet():
            exported = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises anything here
        cause = why_capture_failed(error, module, tuple(inputs), {}, name)
        raise (cause or last_word(error, name)) from error
    placed = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    order = exported.graph_signature.user_inputs
    for slot, node in zip(user, order, strict=True):
        closed = [d for d in slot.dims if isinstance(placed[str(node)].shape[d], int)]
        if closed:
            raise CaptureError(
                "torch.export closes a size that dynamo left open",
                where=f"{slot.source}, dimension {closed[0]}",
                why=f"it became {placed[str(node)].shape[closed[0]]}",
                cure="torch.compile(..., dynamic=False)",
            )
    return Program(plain_signature(exported, notes), name=name, notes=tuple(notes))


def fit_sizes(
    batches: Sequence[Batch], inputs: Sequence[Tensor], open_dims: Sequence[tuple[int, ...]]
) -> tuple[Batch, ...]:
    """The batches whose sizes the graph takes, cut again to its own batch size where that is fixed.

    batches    positional inputs alone
    inputs     what the graph was made for;  open_dims: which of their dimensions may vary
    """

    def fits(value: Any, like: Tensor, dims: tuple[int, ...]) -> bool:
        return (
            isinstance(value, Tensor)
            and value.dim() == like.dim()
            and value.dtype == like.dtype
            and all(a == b for i, (a, b) in enumerate(zip(value.shape, like.shape, strict=True)) if i and i not in dims)
        )

    fitting = [b for b in batches if all(map(fits, b.args, inputs, open_dims))]
    if not fitting or any(0 in dims for dims in open_dims):
        return tuple(fitting)
    size = inputs[0].shape[0]
    shared = [i for i, t in enumerate(inputs) if t.dim() and t.shape[0] == size]
    values = [
        torch.cat([b.args[i] for b in fitting]) if i in shared else fitting[0].args[i] for i in range(len(inputs))
    ]
    labels = torch.cat([b.labels for b in fitting]) if all(b.labels is not None for b in fitting) else None  # type: ignore[misc]
    rows = range(0, len(values[0]) - size + 1, size)
    return tuple(
        Batch(
            tuple(v[r : r + size] if i in shared else v for i, v in enumerate(values)),
            labels=None if labels is None else labels[r : r + size],
        )
        for r in rows
    )


def refuse_writes(program: Program) -> None:
    """Raise NothingToPrune for a graph that writes to the model's tensors or to its inputs: only the copies that
    the pruned graph holds would change, and not the caller's."""
    for name, node in find_written_inputs(program.graph).items():
        raise NothingToPrune(
            "the graph writes to a tensor that is not its own",
            where=f"node {node.name}",
            why=f"{name} is changed in place",
            cure="compute a new tensor in its place",
        )


def with_tensors(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """The program with other values in the parameters, buffers and constants that ``tensors`` names; facts stay."""
    exported = program.exported
    if not tensors:
        return program
    state = {n: tensors.get(n, t) for n, t in exported.state_dict.items()}
    constants = {n: tensors.get(n, t) for n, t in exported.constants.items()}
    return program.but(exported=rebuild(exported, copy_graph(exported), state_dict=state, constants=constants))
