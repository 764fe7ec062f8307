"""The weights of linear layers as matrices [out, in]: where they stand, what they cost, and what is zero in them."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..errors import PlanError
from .dataflow import LINEAR, MOVES, bind, op_name
from .group import PruneGroup
from .program import Program
from .signature import sizes_to_try
from .sparsity import Sparsity, Tile, grid

ENDS = MOVES | {
    "getitem",
    "unbind",
    "select",
    "split",
    "chunk",
    "split_with_sizes",
    "softmax",
    "log_softmax",
    "sigmoid",
    "tanh",
    "expand",
}
"""Between a classifier and what the graph returns nothing but these stands."""


@dataclass(frozen=True)
class Matrix:
    """One linear layer with a weight of its own.

    node       the layer;  source: the node it reads;  operand: the argument's name
    parameter  qualified name of the weight;  weight, bias: placeholders ("" for none)
    transposed True where the weight is stored [in, out]
    shape      (out, in)
    rows       rows of one sample that it is applied to, at the example's other sizes;  batch: samples of the example
    dense      why it stays dense by default, or ""
    """

    node: str
    source: str
    operand: str
    parameter: str
    weight: str
    bias: str
    transposed: bool
    shape: tuple[int, int]
    rows: int
    batch: int
    dense: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.rows * self.shape[0] * self.shape[1]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight as [out, in]."""
        return tensor.T if self.transposed else tensor

    def stored(self, matrix: Tensor) -> Tensor:
        """[out, in] the way round that the weight is stored."""
        return (matrix.T if self.transposed else matrix).contiguous()


@dataclass(frozen=True, kw_only=True)
class BlockGroup(PruneGroup):
    """A group whose elements are the tiles of one weight, numbered row by row. Its axis is its own: it is in no tensor.

    pattern  ``32x32`` or ``2:4`` (a tile is then one weight)
    """

    matrix: Matrix
    pattern: str
    tile: Tile


def matrices(program: Program) -> list[Matrix]:
    """Every linear layer whose weight is a floating parameter of two dimensions, in graph order."""
    bound, tensors = program.tensor_of_placeholder, program.tensors
    parameters = program.exported.graph_signature.inputs_to_parameters
    pointers = collections.Counter(tensors[n].data_ptr() for n in parameters.values() if n in tensors)
    hints, found = _hints(program), []
    for node in program.graph.nodes:
        name = op_name(node)
        if node.op != "call_function" or name not in LINEAR:
            continue
        args, (operand, key, offset) = bind(node), LINEAR[name]
        source, weight, bias = args.get(operand), args.get(key), args.get(offset) if offset else None
        if not isinstance(source, Node) or not isinstance(weight, Node) or weight.name not in parameters:
            continue
        tensor, value = tensors[bound[weight.name]], node.meta.get("val")
        if tensor.dim() != 2 or not tensor.is_floating_point() or not isinstance(value, Tensor):
            continue
        transposed = name != "linear"
        shape = (tensor.shape[1], tensor.shape[0]) if transposed else (tensor.shape[0], tensor.shape[1])
        total = 1
        for size in value.shape[:-1]:
            total *= _size(size, hints)
        batch = max(1, _batch(program))
        shared = len(weight.users) > 1 or pointers[tensor.data_ptr()] > 1
        movable = bias.name if isinstance(bias, Node) and bias.name in bound else ""
        found.append(
            Matrix(
                node.name,
                source.name,
                operand,
                bound[weight.name],
                weight.name,
                movable,
                transposed,
                shape,
                -(-total // batch),
                batch,
                "its weight is shared" if shared else _end(node, program),
            )
        )
    return found


def sparse_layers(program: Program, blocks: Mapping[str, Sparsity]) -> Iterator[tuple[Matrix, Sparsity]]:
    """The layers whose weights ``blocks`` names, in graph order. Raises PlanError where a name or size does not fit."""
    known = {m.parameter: m for m in matrices(program)}
    for name, sparsity in blocks.items():
        where, layer = f"blocks of '{name}'", known.get(name)
        if layer is None:
            raise PlanError(
                "the plan names a weight that is no linear layer's here",
                where=where,
                why="it was made for another architecture, or edited",
                cure="make a new plan with `fxprune plan`",
            )
        if layer.shape != sparsity.shape:
            raise PlanError(
                "the plan was made for another architecture",
                where=where,
                why=f"the weight is {list(layer.shape)} here (after slicing) and {list(sparsity.shape)} in the plan",
                cure="make a new plan with `fxprune plan`",
            )
    yield from ((m, blocks[m.parameter]) for m in known.values() if m.parameter in blocks)


def live_tiles(matrix: Tensor, tile: Tile) -> Tensor:
    """True where a tile holds anything but zeros: what a weight is, whatever a plan once said. [rows, columns]"""
    rows, columns = grid((matrix.shape[0], matrix.shape[1]), tile)
    held = matrix.detach() != 0
    held = functional.pad(held, (0, columns * tile[1] - held.shape[1], 0, rows * tile[0] - held.shape[0]))
    return held.reshape(rows, tile[0], columns, tile[1]).any(3).any(1)


def _end(node: Node, program: Program) -> str:
    """Why a layer at either end of the network stays dense by default."""
    if _only(node, forward=True, inputs=set()):
        return "a classifier: the outputs come straight from it"
    inputs = {n for n in program.user_inputs}
    source = node.all_input_nodes[0]
    return "a patch embedding: it reads the input itself" if _only(source, forward=False, inputs=inputs) else ""


def _only(node: Node, forward: bool, inputs: set[str]) -> bool:
    """Whether nothing but moves stands between ``node`` and the outputs (forward), or the user inputs."""
    pending, seen = [node], {node}
    reached = False
    while pending:
        current = pending.pop()
        if not forward and current.op == "placeholder":
            if current.name not in inputs:
                return False
            reached = True
            continue
        if not forward and op_name(current) not in ENDS:
            return False
        for other in current.users if forward else current.all_input_nodes:
            if forward and other.op == "output":
                reached = True
            elif forward and op_name(other) not in ENDS:
                return False
            elif other not in seen:
                seen.add(other)
                pending.append(other)
    return reached


def _hints(program: Program) -> dict[str, int]:
    """Symbol -> its size in the example inputs."""
    return dict(sizes_to_try(program)[0])


def _size(size: int | torch.SymInt, hints: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({s: hints[str(s)] for s in expression.free_symbols if str(s) in hints}))


def _batch(program: Program) -> int:
    """Samples in the example inputs: the first dimension of the first tensor."""
    leaves = pytree.tree_leaves(program.example_inputs)
    return next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 1)
