"""The one generic slicing routine: index every tensor by its axes' kept elements, recompute every literal."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ...errors import InternalError
from ...ir.axes import Axes, Literal
from ...ir.axis import Axis, Dim, Keep, kept_index, kept_total, real_size, total
from ...ir.dataflow import Family, bind, family
from ...ir.fake_run import fake_mode_of, infer
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from .drop_branches import drop_branches
from .keep_divisor import keep_divisor


def resize(program: Program, keep: Keep, made_by: str = "slice-axes") -> ExportedProgram:
    """``program`` with each leaf axis in ``keep`` shrunk to the given elements; everything else as it was.

    keep     axis -> sorted int64 indices; none at all drops the branch and leaves its bias
    Raises   InternalError when a propagated shape differs from the one the axes predict: the rules are then wrong.
    Law      running the result equals running the dense graph with the other elements masked where they are contracted
    """
    axes: Axes = program.need("axes")
    counts = {axis: len(index) for axis, index in keep.items()}
    graph_module = copy_graph(program.exported)
    empty = {axis for axis, count in counts.items() if count == 0}
    drop_branches(graph_module, axes, empty, program.tensor_of_placeholder, made_by)
    nodes = {n.name: n for n in graph_module.graph.nodes}
    state, constants, resized = _slice_tensors(program, axes, keep, counts)
    literals = [lit for lit in axes.literals if lit.node in nodes]
    edited = {lit.node for lit in literals if edit_literal(graph_module, nodes[lit.node], lit, counts, made_by)}
    propagate(graph_module, axes, counts, resized, edited)
    gone = {name for placeholder, name in program.tensor_of_placeholder.items() if placeholder not in nodes}
    state, constants = ({k: v for k, v in home.items() if k not in gone} for home in (state, constants))
    return rebuild(program.exported, graph_module, state_dict=state, constants=constants)


def changes(dim: Dim, counts: Mapping[Axis, int]) -> bool:
    """Whether ``dim`` gets smaller when its axes keep ``counts``."""
    return kept_total(dim, counts) != total(dim)


# ---------------------------------------------------------------- tensors


def _slice_tensors(
    program: Program, axes: Axes, keep: Keep, counts: Mapping[Axis, int]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """New state dict and constants, and the resized tensors by placeholder name. Tied tensors stay tied."""
    exported = program.exported
    state, constants = dict(exported.state_dict), dict(exported.constants)
    resized: dict[str, Tensor] = {}
    done: dict[tuple[Any, ...], Tensor] = {}
    for placeholder, name in program.tensor_of_placeholder.items():
        dims = axes.dims[placeholder]
        if dims is None or not any(changes(d, counts) for d in dims):
            continue
        home: dict[str, Any] = state if name in state else constants
        dense: Tensor = home[name]
        key = (dense.data_ptr(), tuple(dense.shape), dense.stride())
        if key not in done:
            small = dense.detach()
            for position, dim in enumerate(dims):
                if changes(dim, counts):
                    small = small.index_select(position, kept_index(dim, keep).to(small.device))
            if isinstance(dense, torch.nn.Parameter):
                small = torch.nn.Parameter(small, requires_grad=dense.requires_grad)
            done[key] = small
        home[name] = resized[placeholder] = done[key]
    return state, constants, resized


# ---------------------------------------------------------------- literals


def edit_literal(module: GraphModule, node: Node, literal: Literal, counts: Mapping[Axis, int], made_by: str) -> bool:
    """Recompute one literal; True when the node changed."""
    if not any(changes(d, counts) for d in literal.dims):
        return False
    if literal.form == "split":
        arguments = bind(node)
        node.target = torch.ops.aten.split_with_sizes.default
        node.args = (node.args[0], [kept_total(d, counts) for d in literal.dims], arguments.get("dim", 0))
        node.kwargs = {}
    elif literal.form == "scale":
        _set(node, literal.argument, float(total(literal.dims[0])) ** -0.5)
    elif literal.form == "sum":
        _set(node, literal.argument, sum(kept_total(d, counts) for d in literal.dims))
    elif literal.form == "last":
        _set(node, literal.argument, sum(kept_total(d, counts) for d in literal.dims) - 1)
    elif literal.form == "shape":
        old = list(bind(node)[literal.argument])
        _set(node, literal.argument, _shape(module, node, old, literal.dims, counts, made_by))
    elif literal.form in ("mean", "norm"):
        keep_divisor(module.graph, node, literal, counts, made_by)
    else:
        raise InternalError(f"unknown literal form {literal.form}")
    return True


def _shape(
    module: GraphModule, node: Node, old: list[Any], dims: tuple[Dim, ...], counts: Mapping[Axis, int], made_by: str
) -> list[Any]:
    """Static sizes recomputed, -1 kept, symbolic sizes that hold a cut axis scaled by the share that stays."""
    new: list[Any] = []
    for size, dim in zip(old, dims, strict=True):
        if size == -1 or not changes(dim, counts):
            new.append(size)
        elif isinstance(size, int):
            new.append(kept_total(dim, counts))
        elif family(node) is Family.RESHAPE and -1 not in old and -1 not in new:
            new.append(-1)
        else:
            share = Fraction(kept_total(dim, counts), total(dim))
            with module.graph.inserting_before(node):
                size = module.graph.call_function(operator.mul, (size, share.numerator))
                if share.denominator != 1:
                    size = module.graph.call_function(operator.floordiv, (size, share.denominator))
            for made in (size, size.args[0]):
                if isinstance(made, Node) and "val" not in made.meta:
                    made.meta.update(stack_trace=node.meta.get("stack_trace"), fxprune_pass=made_by)
            new.append(size)
    return new


def _set(node: Node, name: str, value: Any) -> None:
    """Write an argument by schema name, in the place where it already stands."""
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
    if name in names and names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


# ---------------------------------------------------------------- shapes


def propagate(
    module: GraphModule, axes: Axes, counts: Mapping[Axis, int], resized: Mapping[str, Tensor], edited: set[str]
) -> None:
    """Fake-run what the change reaches, and hold every shape against the one the axes predict."""
    fake_mode = fake_mode_of(module.graph)
    stale: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.name in resized:
                node.meta["val"] = fake_mode.from_tensor(resized[node.name], static_shapes=True)
                stale.add(node)
        elif node.op == "call_function":
            if "val" in node.meta and node.name not in edited and not stale & set(node.all_input_nodes):
                continue
            if _depends_on_values(node):
                node.meta["val"] = _as_predicted(node, axes, counts)
            else:
                infer(node)
            stale.add(node)
            _compare(node, axes, counts)


def _depends_on_values(node: Node) -> bool:
    """Whether values decide how large the node's output is: what a mask picks, or where it is not zero."""
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        indices = node.args[1] if "index" in str(node.target) else None
        picked = [n for n in indices or () if isinstance(n, Node)] if isinstance(indices, list | tuple) else []
        if not picked or any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in picked):
            return True
    return not _symbols(node) <= set[str]().union(*map(_symbols, node.all_input_nodes))


def _symbols(node: Node) -> set[str]:
    """Names of the symbols in a node's sizes."""
    found: set[str] = set()
    for value in pytree.tree_leaves(node.meta.get("val")):
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, SymInt):
                found |= {str(symbol) for symbol in size.node.expr.free_symbols}
    return found


def _as_predicted(node: Node, axes: Axes, counts: Mapping[Axis, int]) -> Any:
    """The value of a node whose size depends on data: running it again would invent a new symbol for the same size."""
    value, dims = node.meta["val"], axes.dims.get(node.name)
    if not isinstance(value, Tensor) or not dims:
        return value
    shape = [kept_total(d, counts) if isinstance(s, int) else s for s, d in zip(value.shape, dims, strict=True)]
    return value if shape == list(value.shape) else value.new_empty(shape)


def _compare(node: Node, axes: Axes, counts: Mapping[Axis, int]) -> None:
    value, dims = node.meta["val"], axes.dims.get(node.name)
    pairs = [(value, dims)] if isinstance(value, Tensor) else zip(value, dims, strict=True) if dims else []
    for tensor, expected in pairs:
        if not isinstance(tensor, Tensor) or expected is None:
            continue
        have = [axes.stand_ins(s) for s in tensor.shape]
        said = [kept_total(d, counts) for d in expected]
        # two open sizes that the model puts together (the batch of two inputs) may take each other's name
        if [real_size(n, axes.sizes) for n in have] != [real_size(n, axes.sizes) for n in said]:
            raise InternalError(f"{node.format_node()} has shape {have} after slicing, its axes predict {said}")
