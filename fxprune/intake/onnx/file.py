"""An ONNX file, read and checked: what it holds, and that all of it can be translated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from ..rehearsal import first_line
from ..tensors import existing
from .graph import NEWEST, OLDEST, Graph, Input, Node, find_needed
from .refusals import CUTS, refuse
from .tensors import DAMAGED, dtype_of, read_tensor

_HOME = ("", "ai.onnx")
_NO_WORD = ("", "?", "-1", "None", "unk")  # exporters write these for any open size: no two are said to be equal
_LARGEST = 2**31 - 1  # bytes of a protobuf message


def read_graph(path: Path) -> Graph:
    """What the ONNX file ``path`` says. Data beside it are read from its folder alone; nothing is run.

    Raises LoadError for a file that is damaged or of an opset that is not known, and with the node, the op and the cure
    for what cannot be translated: control flow, quantised graphs, unknown ops.
    """
    model = _parse(existing(path))
    opset = _opset(model, path)
    model = _without_functions(model, path)
    graph = model.graph
    constants = {t.name: read_tensor(t, path, f"initialiser {t.name}") for t in graph.initializer}
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        cure = "store it dense: fill an array and write it as an ordinary initialiser"
        raise LoadError("an initialiser is sparse", where=f"{path}: {name}", why="only dense ones are read", cure=cure)
    trained = frozenset(constants)
    inputs = tuple(_input(value, path) for value in graph.input if value.name not in constants)
    nodes, alias = list[Node](), dict[str, str]()
    for number, proto in enumerate(graph.node):
        node = _node(proto, number, alias, path)
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node, path)
        elif node.op == "Identity" or (node.op == "Dropout" and not any(node.outputs[1:])):
            alias[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    outputs = tuple(o.name for o in graph.output)
    _check_order(inputs, constants, nodes, [alias.get(o, o) for o in outputs], path)
    return _translatable(Graph(path, opset, inputs, outputs, tuple(nodes), constants, trained), alias)


def _parse(path: Path) -> Any:
    try:
        import onnx
    except ImportError as failure:
        cure = "pip install onnx onnxruntime"
        raise LoadError("onnx cannot be imported", where=str(path), why=first_line(failure), cure=cure) from None
    if path.stat().st_size > _LARGEST:
        why = "a protobuf message ends at 2 GiB"
        raise LoadError("the file is too large for ONNX", where=str(path), why=why, cure="save with external data")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as failure:  # protobuf's own types, of two implementations
        raise LoadError("this is no ONNX file", where=str(path), why=first_line(failure), cure=DAMAGED) from None
    if not model.graph.node or not model.graph.output:
        why = f"it has {len(model.graph.node)} nodes and {len(model.graph.output)} outputs"
        raise LoadError("the ONNX file holds no graph", where=str(path), why=why, cure=DAMAGED)
    return model


def _opset(model: Any, path: Path) -> int:
    said = {o.domain: int(o.version) for o in model.opset_import}
    found = next((said[home] for home in _HOME if home in said), None)
    if found is None or not OLDEST <= found <= NEWEST:
        raise LoadError(
            "the file's opset is not known",
            where=str(path),
            why="it names none" if found is None else f"it is {found}; {OLDEST} to {NEWEST} are read",
            cure="onnx.version_converter.convert_version(onnx.load(path), 18) makes another of it, or export it again",
        )
    return found


def _without_functions(model: Any, path: Path) -> Any:
    """The model with its own functions written out where they are called."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as failure:
        why = first_line(failure)
        raise LoadError("the file's own functions cannot be written out", where=str(path), why=why) from None


def _input(value: Any, path: Path) -> Input:
    where = f"{path}: input {value.name}"
    if not value.type.HasField("tensor_type"):
        cure = "give a model that takes tensors"
        raise LoadError("an input is no tensor", where=where, why=f"{value.type}"[:80].strip(), cure=cure)
    held = value.type.tensor_type
    if not held.HasField("shape"):
        cure = "onnx.tools.update_model_dims.update_inputs_outputs_dims(...) states it"
        raise LoadError("an input has no shape", where=where, why="not even its rank is known", cure=cure)
    shape = [
        int(d.dim_value) if d.dim_value > 0 else d.dim_param if d.dim_param not in _NO_WORD else f"{value.name}_{i}"
        for i, d in enumerate(held.shape.dim)
    ]
    return Input(value.name, dtype_of(held.elem_type, where), tuple(shape))


def _node(proto: Any, number: int, alias: Mapping[str, str], path: Path) -> Node:
    op = proto.op_type if proto.domain in _HOME else f"{proto.domain}::{proto.op_type}"
    name = proto.name or f"{proto.op_type}_{number}"
    outputs = list(proto.output)
    while outputs and not outputs[-1]:
        outputs.pop()
    inputs = tuple(alias.get(i, i) for i in proto.input)
    found = Node(op, name, inputs, tuple(outputs))
    refuse(found, path)
    attributes = {a.name: _attribute(a, found, path) for a in proto.attribute}
    return Node(op, name, inputs, tuple(outputs), attributes, _scope(proto))


def _scope(proto: Any) -> str:
    """The module's path that PyTorch's exporter notes with a node: the last but one of its nested names."""
    said = next((p.value for p in proto.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    names = re.findall(r"'([^']*)'", said)
    return names[-2] if len(names) > 1 else ""


def _attribute(proto: Any, node: Node, path: Path) -> Any:
    import onnx

    kind = onnx.AttributeProto
    if proto.type == kind.TENSOR:
        return read_tensor(proto.t, path, f"{node}, {proto.name}")
    if proto.type in (kind.FLOAT, kind.INT, kind.FLOATS, kind.INTS):
        value = onnx.helper.get_attribute_value(proto)
        return tuple(value) if proto.type in (kind.FLOATS, kind.INTS) else value
    if proto.type in (kind.STRING, kind.STRINGS):
        texts = [t.decode(errors="replace") for t in ([proto.s] if proto.type == kind.STRING else proto.strings)]
        return texts[0] if proto.type == kind.STRING else tuple(texts)
    known = {v: k for k, v in kind.AttributeType.items()}
    why = f"its attribute {proto.name} is a {known.get(proto.type, proto.type)}"
    raise LoadError(f"{node.op} cannot be translated", where=f"{path}: {node}", why=why, cure=DAMAGED)


def _constant(node: Node, path: Path) -> Tensor:
    for name, value in node.attributes.items():
        if isinstance(value, Tensor):
            return value
        if name.startswith(("value_float", "value_int")):
            return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)
    why = f"it has {', '.join(node.attributes) or 'no value'}"
    raise LoadError("a constant is no tensor", where=f"{path}: {node}", why=why, cure=DAMAGED)


def _check_order(
    inputs: Sequence[Input], constants: Mapping[str, Tensor], nodes: Sequence[Node], outputs: Sequence[str], path: Path
) -> None:
    have = {"", *constants, *(i.name for i in inputs)}
    for node in nodes:
        missing = next((name for name in node.inputs if name not in have), None)
        if missing is not None:
            why = f"it reads '{missing}', which nothing before it gives"
            raise LoadError("the graph is not whole", where=f"{path}: {node}", why=why, cure=DAMAGED)
        have.update(node.outputs)
    missing = next((name for name in outputs if name not in have), None)
    if missing is not None:
        why = f"nothing gives the output '{missing}'"
        raise LoadError("the graph is not whole", where=str(path), why=why, cure=DAMAGED)


def _translatable(graph: Graph, alias: Mapping[str, str]) -> Graph:
    """The graph without what no output reads, ended before boxes are thinned out."""
    outputs = {o: alias.get(o, o) for o in graph.outputs}
    notes: list[str] = []
    for node in graph.nodes:
        if node.op in CUTS:
            outputs, said = _end_before(graph, node, outputs)
            notes.append(said)
    nodes = find_needed(graph.nodes, list(outputs.values()))
    # an output that is another value under its own name comes from a node that moves nothing
    named = tuple(Node("Identity", name, (value,), (name,)) for name, value in outputs.items() if name != value)
    return Graph(
        graph.path, graph.opset, graph.inputs, tuple(outputs), (*nodes, *named), graph.constants, graph.trained,
        tuple(notes),
    )  # fmt: skip


def _end_before(graph: Graph, node: Node, outputs: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(the outputs with what ``node`` reads in place of those that depend on it, what to tell)."""
    behind = set(node.outputs)
    for other in graph.nodes:
        if behind & set(other.inputs):
            behind.update(other.outputs)
    lost = [name for name, value in outputs.items() if value in behind]
    kept = {name: value for name, value in outputs.items() if name not in lost}
    read = [name for name in node.inputs[: CUTS[node.op]] if name not in graph.constants]
    said = (
        f"{node.name} ({node.op}) and what stands behind it are left out: how many boxes stay depends on their values. "
        f"The result returns what it reads ({', '.join(read)}) in place of {', '.join(lost)}: put it behind again"
    )
    return {**kept, **{name: name for name in read if name not in kept}}, said
