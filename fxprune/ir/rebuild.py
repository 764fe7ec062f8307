"""Editing an exported program without touching the one at hand: copy the graph, edit, rebuild."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node

from .program import Program


def copy_graph(exported: ExportedProgram) -> GraphModule:
    """A graph module of its own, node for node and name for name; weights and constants are shared, never copied.

    Nested graphs (the bodies of wrapped regions) are copied too, so an edit inside one stays inside the copy.
    ``node.meta`` is a shallow copy: replace its values, do not change them in place.
    """
    return _copy_graph_module(exported.graph_module)


def rebuild(
    exported: ExportedProgram,
    graph_module: GraphModule,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    constants: Mapping[str, Any] | None = None,
    signature: ExportGraphSignature | None = None,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    calls: Sequence[ModuleCallEntry] | None = None,
) -> ExportedProgram:
    """A new program around an edited graph (made by :func:`copy_graph`); what is not given is taken from ``exported``.

    The signature follows the graph by itself: placeholders that were erased leave it, output nodes that were replaced
    are renamed in it. Parameters, buffers and constants that no placeholder stands for any more are dropped from the
    tensors, unless they are given explicitly. What the program demands of open sizes is what ``exported`` demands,
    whatever torch was asked since. Raises what ``ExportedProgram.validate`` raises when the edit was wrong.
    """
    graph_module.graph.lint()
    graph_module.recompile()
    old = exported.graph_signature if signature is None else signature
    signature = _follow_graph(old, graph_module.graph)
    gone = _targets(old) - _targets(signature)
    tensors = {k: v for k, v in exported.state_dict.items() if k not in gone} if state_dict is None else state_dict
    kept = {k: v for k, v in exported.constants.items() if k not in gone} if constants is None else constants
    inputs = exported.example_inputs if example_inputs is None else example_inputs
    made = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict=dict(tensors),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=[copy.copy(entry) for entry in (exported.module_call_graph if calls is None else calls)],
        example_inputs=inputs,
        constants=dict(kept),
        verifiers=exported.verifiers,
    )
    # torch takes them anew from symbols that other programs share, and forgets those that a file came with
    made._guards_code = list(exported._guards_code)
    return made


def relax_views(graph: Graph) -> bool:
    """``view`` becomes ``reshape``, which copies where it must; True when there was one.

    A captured ``view`` may be legal only because of the strides that one attention kernel gives its output: export
    drops the ``contiguous()`` before it when that kernel makes it a no-op. Another kernel gives other strides.
    Only for graphs without in-place writes: they could tell a copy from a view.
    """
    views = [n for n in graph.nodes if n.target is torch.ops.aten.view.default]
    for node in views:
        node.target = torch.ops.aten.reshape.default
    return bool(views)


def owning(program: Program, lender: Program) -> Program:
    """``program`` with copies of the tensors it shares with ``lender``, so that training one leaves the other alone."""
    lent = {t.data_ptr() for t in lender.tensors.values()}
    copies: dict[int, Tensor] = {}

    def own(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.data_ptr() not in lent:
            return tensor
        if id(tensor) not in copies:  # tied parameters stay tied
            fresh = tensor.detach().clone()
            parameter = isinstance(tensor, torch.nn.Parameter)
            copies[id(tensor)] = torch.nn.Parameter(fresh, tensor.requires_grad) if parameter else fresh
        return copies[id(tensor)]

    exported = program.exported
    state = {name: own(tensor) for name, tensor in exported.state_dict.items()}
    return program.but(exported=rebuild(exported, copy_graph(exported), state_dict=state))


def _copy_graph_module(module: GraphModule) -> GraphModule:
    graph, memo = Graph(tracer_cls=module.graph._tracer_cls), {}  # type: ignore[var-annotated]
    for node in module.graph.nodes:
        new = graph.node_copy(node, lambda n: memo[n])
        _keep_name(new, node.name)
        memo[node] = new
    result = GraphModule(module, graph, class_name=type(module).__name__)
    result.meta.update(module.meta)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(result, name, _copy_graph_module(child))
    return result


def _keep_name(node: Node, name: str) -> None:
    """Export may name a node like a Python builtin (an argument called ``input``); a copy would be renamed."""
    if node.name != name:
        node.graph._graph_namespace._used_names.add(name)
        node.name = name


def _targets(signature: ExportGraphSignature) -> set[str]:
    return {s.target for s in signature.input_specs if s.target is not None}


def _follow_graph(signature: ExportGraphSignature, graph: Graph) -> ExportGraphSignature:
    """The signature whose inputs are the placeholders of ``graph`` and whose outputs carry its output names."""
    specs = {_argument_name(s.arg): s for s in signature.input_specs}
    inputs = [specs[n.name] for n in graph.nodes if n.op == "placeholder"]
    outputs = []
    results = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    for spec, result in zip(signature.output_specs, results, strict=True):
        if isinstance(result, Node) and hasattr(spec.arg, "name") and spec.arg.name != result.name:
            spec = replace(spec, arg=replace(spec.arg, name=result.name))
        outputs.append(spec)
    return ExportGraphSignature(input_specs=inputs, output_specs=outputs)


def _argument_name(argument: Any) -> str:
    return str(argument.name)
