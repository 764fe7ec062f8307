"""Plain containers for what goes in and out of a graph, so that a saved program loads with torch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind
from torch.utils import _pytree as pytree

from ..ir.rebuild import copy_graph, rebuild

LEAVES = (
    Tensor,
    int,
    float,
    bool,
    str,
    complex,
    type(None),
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    torch.dtype,
    torch.device,
)


def plain(value: Any, notes: list[str], where: str = "output") -> Any:
    """``value`` with every mapping and dataclass as a dict, every other sequence as a tuple or list.

    Empty (None) fields of a dataclass are left out. An object that is no container, such as a KV cache, is left out
    of a mapping and becomes None in a sequence; ``notes`` tells. Leaves are passed through.
    """
    if isinstance(value, Mapping):
        return _fields(value, notes, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _fields({k: v for k, v in fields.items() if v is not None}, notes, where)
    if isinstance(value, tuple | list):
        items = [plain(item, notes, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else tuple(items)
    if not isinstance(value, LEAVES):
        notes.append(f"{where} left out: a {type(value).__name__} is neither a tensor nor a plain container")
        return None
    return value


def _fields(items: Mapping[Any, Any], notes: list[str], where: str) -> dict[Any, Any]:
    result = {}
    for key, item in items.items():
        converted = plain(item, notes, f"{where}.{key}")
        if converted is not None or item is None:
            result[key] = converted
    return result


def plain_signature(exported: ExportedProgram, notes: list[str]) -> ExportedProgram:
    """``exported`` with plain containers in its call signature; itself when it has no others.

    The graph computes the same tensors. Only outputs that sit in an object that is no container are cut off.
    """
    root = exported.module_call_graph[0]
    call = root.signature
    if call is None:
        return exported
    in_spec, _ = _plain_spec(call.in_spec, [])
    out_spec, kept = _plain_spec(call.out_spec, notes)
    if in_spec == call.in_spec and out_spec == call.out_spec:
        return exported
    root = replace(
        root,
        signature=replace(
            call, in_spec=in_spec, out_spec=out_spec, outputs=[o for i, o in enumerate(call.outputs) if i in kept]
        ),
    )
    module, old = copy_graph(exported), exported.graph_signature
    specs = old.output_specs
    first = sum(s.kind is not OutputKind.USER_OUTPUT for s in specs)  # mutations come before what the user sees
    order = [*range(first), *(first + i for i in kept)]
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    output.args = (tuple(output.args[0][i] for i in order),)
    signature = ExportGraphSignature(input_specs=list(old.input_specs), output_specs=[specs[i] for i in order])
    inputs = exported.example_inputs
    if inputs is not None:
        leaves = pytree.tree_leaves(inputs)
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        inputs = (args, kwargs)
    return rebuild(
        exported, module, signature=signature, example_inputs=inputs, calls=[root, *exported.module_call_graph[1:]]
    )


def _plain_spec(spec: pytree.TreeSpec, notes: list[str]) -> tuple[pytree.TreeSpec, list[int]]:
    """The plain form of a tree, and which of its leaves are still there."""
    numbers = list(range(spec.num_leaves))
    try:
        value = plain(pytree.tree_unflatten(numbers, spec), notes)
    except Exception:  # a class that cannot be made from anything but its own kind of leaves
        notes.append(f"outputs are a flat tuple: {spec.type} cannot be taken apart")
        value = tuple(numbers)
    kept, result = pytree.tree_flatten(value)
    return result, kept
