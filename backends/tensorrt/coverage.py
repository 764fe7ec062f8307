"""Which nodes have no converter, by name, before anything is built; and the graph that the converters will see."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import LoweringError
from ...ir.program import Program
from ...ir.provenance import maker_of, source_line
from ...ir.rebuild import copy_graph, rebuild
from ...process.silence import quiet

MARK = "fxprune_node"


@dataclass(frozen=True)
class Unsupported:
    """A node without a converter.

    node, op   as torch-tensorrt sees them;  origin: the node of the program that it came from
    by, line   the pass that made that node ("" for what was captured), and the user's source line
    """

    node: str
    op: str
    origin: str
    by: str
    line: str

    def __str__(self) -> str:
        made = f", made by {self.by}" if self.by else ""
        return f"node {self.origin or self.node} ({self.op}){made}{f', from {self.line}' if self.line else ''}"


def lower_graph(program: Program, settings: Any) -> GraphModule:
    """The graph as torch-tensorrt's converters get it: its decompositions and its own passes, on one graph module.

    Nodes carry the name of the program's node they came from in ``meta["custom"]``, which decompositions keep.
    """
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    with quiet():
        exported = pre_export_lowering(_mark_nodes(program), settings)
        exported = exported.run_decompositions(get_decompositions(settings.enable_experimental_decompositions))
        module: GraphModule = post_lowering(exported.module(), settings)
    for node in module.graph.nodes:  # numbers and None that the model takes are constants of the graph by now
        if node.op == "placeholder" and not node.users and not isinstance(node.meta.get("val"), torch.Tensor):
            module.graph.erase_node(node)
    module.recompile()
    return module


def find_unsupported(program: Program, module: GraphModule, settings: Any) -> list[Unsupported]:
    """Nodes of ``module`` (made by :func:`lower_graph`) that no converter takes with these arguments and open sizes."""
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    sources = {n.name: n for n in program.graph.nodes}
    found = []
    for node in module.graph.nodes:
        with quiet():
            covered = node.op not in ("call_function", "call_method", "call_module") or node in DYNAMO_CONVERTERS
        if not covered and node.target is not operator.getitem:  # an output of a node that is named already
            found.append(_describe(node, sources))
    return found


def check_coverage(program: Program, module: GraphModule, settings: Any) -> None:
    """Raise LoweringError that names every node without a converter."""
    found = find_unsupported(program, module, settings)
    if found:
        raise not_covered(found)


def not_covered(found: Sequence[Unsupported]) -> LoweringError:
    """The error about these nodes."""
    more = f", and {len(found) - 5} more" if len(found) > 5 else ""
    return LoweringError(
        f"torch-tensorrt has no converter for {', '.join(dict.fromkeys(f.op for f in found))}",
        where="; ".join(map(str, found[:5])) + more,
        why="the whole graph must become one engine: nothing falls back to PyTorch unseen",
        cure="write that line with standard ops, register a converter with torch_tensorrt.dynamo.conversion."
        "dynamo_tensorrt_converter, or try `--target 'trt{via=onnx}'`",
    )


def _mark_nodes(program: Program) -> torch.export.ExportedProgram:
    module = copy_graph(program.exported)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: node.name}
    return rebuild(program.exported, module)


def _describe(node: Node, sources: dict[str, Node]) -> Unsupported:
    name = str((node.meta.get("custom") or {}).get(MARK) or "")
    if not name:  # made by torch-tensorrt's own passes: what it reads is the next best
        name = next(
            (str(n.meta["custom"][MARK]) for n in node.all_input_nodes if MARK in (n.meta.get("custom") or {})), ""
        )
    source = sources.get(name, node)
    op = str(node.target).removeprefix("torch.ops.")
    return Unsupported(node.name, op, name, maker_of(source), source_line(source.meta.get("stack_trace")))
