"""``Clean``: remove what only training, checking or bookkeeping needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ...errors import CaptureError
from ...ir.dataflow import Family, bind, family, family_of, is_mutable, op_name
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild, relax_views
from .inplace import make_functional
from .straighten import straighten

aten = torch.ops.aten


@dataclass(frozen=True)
class Clean(Transform):
    """Evaluation form: no dropout, no assertions, no in-place writes, no copies and casts that change nothing, no dead
    nodes, no constant indices where a slice says the same, no tensors that nothing reads.

    The outputs stay the same bit for bit, and so does the call signature. What had to stay is told in
    ``program.notes``. Raises CaptureError when a batch norm runs in training form.
    """

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        signature = program.exported.graph_signature
        changed, notes = _clean(module, set(program.tensor_of_placeholder), set(signature.inputs_to_parameters))
        if not _writes(module):
            bound = {n: t for n, t in program.tensor_of_placeholder.items() if t in program.exported.constants}
            changed |= straighten(module.graph, {n: program.exported.constants[t] for n, t in bound.items()})
        changed |= _drop_unread(module.graph, program, notes)
        told = tuple(dict.fromkeys([*program.notes, *notes]))
        if not changed:
            return program if told == program.notes else program.but(notes=told)
        return program.without_facts(exported=rebuild(program.exported, module), notes=told)


def _clean(module: GraphModule, lasting: Collection[str], trained: Collection[str]) -> tuple[bool, list[str]]:
    """Clean a graph and the bodies of its wrapped regions in place. Returns whether it changed, and notes."""
    graph, notes, changed = module.graph, [], False
    for child in module.children():
        if isinstance(child, GraphModule):
            inputs = {n.name for n in child.graph.nodes if n.op == "placeholder"}
            inner, told = _clean(child, inputs, inputs)
            changed |= inner
            notes += told
    for node in list(graph.nodes):
        does = family_of(op_name(node).removesuffix("_"))
        if does is Family.CHECK and not node.users:
            graph.erase_node(node)
            changed = True
        elif does is Family.DROPOUT:
            changed |= _drop_dropout(node, notes)
        elif does is Family.BATCH_NORM:
            _check_batch_norm(node)
    done, told = make_functional(graph, lasting)
    notes += told
    pure = not _writes(module)
    changed |= bool(done) | _drop_identities(graph, trained, pure=pure)
    changed |= pure and relax_views(graph)
    changed |= _drop_dead(graph)
    if changed:
        graph.lint()
        module.recompile()
    return changed, notes


def _drop_dropout(node: Node, notes: list[str]) -> bool:
    given = bind(node)
    if given.get("train", True) and given["p"] > 0:
        notes.append(f"{node.name} drops values in evaluation too (training=True in the code of the model)")
        return False
    if op_name(node) == "native_dropout":
        kept = [user for user in node.users if user.args[1] == 0]
        if len(kept) < len(node.users):  # somebody reads the mask
            return False
        for user in kept:
            _replace(user, node.args[0])
    _replace(node, node.args[0])
    return True


def _check_batch_norm(node: Node) -> None:
    given = bind(node)
    if given.get("training", given.get("train")) and given.get("running_mean") is not None:
        raise CaptureError(
            f"{node.name} runs in training form",
            where=_line(node),
            why="it normalises with the statistics of the batch and changes the running ones",
            cure="call model.eval() before torch.export.export",
        )


def _drop_identities(graph: Graph, trained: Collection[str], *, pure: bool) -> bool:
    """Remove what returns its input as it is. ``pure``: nothing writes in place any more, so copies are not needed."""
    changed = False
    learns: set[Node] = set()  # what a gradient reaches: a detach there is meant
    for node in list(graph.nodes):
        name, source = op_name(node), node.args[0] if node.args else None
        if node.name in trained or any(n in learns for n in node.all_input_nodes):
            learns.add(node)
        if name == "cat":
            source = _only_part(node)
        if not isinstance(source, Node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        same = name == "cat" or (family(node) is Family.SAME and (name != "detach" or source not in learns))
        same |= name == "lift_fresh_copy" and pure and not any(user.op == "output" for user in node.users)
        same |= name in ("to", "type_as") and _casts_nothing(node, source)
        if same:
            _replace(node, source)
            changed = True
    return changed


def _only_part(node: Node) -> Node | None:
    """The one tensor a concatenation consists of, when all others are the empty one-dimensional tensor."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple):
        return None
    full = [p for p in parts if isinstance(p, Node) and tuple(p.meta["val"].shape) != (0,)]
    alone = len(full) == 1 and full[0].meta["val"].dtype == node.meta["val"].dtype
    return full[0] if alone else None


def _casts_nothing(node: Node, source: Node) -> bool:
    before, after, given = source.meta["val"], node.meta["val"], bind(node)
    if given.get("copy") or given.get("memory_format") is not None:
        return False
    return bool(before.dtype == after.dtype and before.device == after.device and before.layout == after.layout)


def _drop_dead(graph: Graph) -> bool:
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not _acts(node):
            graph.erase_node(node)
            changed = True
    return changed


def _acts(node: Node) -> bool:
    """Whether running the node does anything but give its value: writes in place, here or in its body."""
    owner = node.graph.owning_module
    bodies = (getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr")
    return is_mutable(node) or any(_writes(body) for body in bodies)


def _writes(module: Any) -> bool:
    return isinstance(module, GraphModule) and any(_acts(n) for n in module.graph.nodes)


def _drop_unread(graph: Graph, program: Program, notes: list[str]) -> bool:
    """Remove weights, buffers and constants that nothing reads; unread inputs stay in the signature.

    A tied weight is read under one of its names; the other names go without a note.
    """
    bound, tensors = program.tensor_of_placeholder, program.tensors
    weights = [n for n in graph.nodes if n.op == "placeholder" and n.name in bound]
    gone = [n for n in weights if not n.users]
    read = {tensors[bound[n.name]].data_ptr() for n in weights if n.users and bound[n.name] in tensors}
    trained = set(program.exported.graph_signature.inputs_to_parameters)
    lost = sorted(bound[n.name] for n in gone if n.name in trained and tensors[bound[n.name]].data_ptr() not in read)
    for node in gone:
        graph.erase_node(node)
    if lost:
        notes.append("removed, nothing reads them: " + ", ".join(lost[:8]) + (", ..." if len(lost) > 8 else ""))
    return bool(gone)


def _replace(node: Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _line(node: Node) -> str:
    """The innermost line of the user's code that made the node."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return f"{node.name}  {' '.join(lines[-2:])}" if lines else node.name
