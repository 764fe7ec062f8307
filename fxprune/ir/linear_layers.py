"""Layers with a weight: which argument is what. Of linear ones the weight as a matrix [out, in], its cost and zeros."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..errors import PlanError
from .axis import Axis
from .choice import AnyChoice
from .dataflow import MOVES, MULTIPLIES, Family, behind_views, bind, family, op_name, product
from .example_sizes import stand_ins
from .group import PruneGroup, Scores
from .importance import ImportanceScores
from .program import Program
from .signature import samples_in
from .sparsity import TWO_OF_FOUR, Sparsity, Tile, grid, two_of_four

ENDS = MOVES | {Family.SPLIT, Family.PICK, Family.SOFTMAX, Family.LOG_SOFTMAX, Family.EXPAND}
"""Between a classifier and what the graph returns nothing but these stands, and ``SQUASHES``."""
SQUASHES = ("sigmoid", "tanh")


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its input by a weight, and for which one can solve.

    operand  name of the argument that holds the input;  source: the input
    form     ``linear`` W [out, in], ``transposed`` W [in, out] or ``conv`` W [out, in, ..kernel]
    """

    operand: str
    source: Node
    weight: Node
    bias: Node | None
    form: str

    @property
    def into(self) -> int:
        """The dimension of the weight that is summed over."""
        return 0 if self.form == "transposed" else 1


def layer_at(node: Node, tensors: Collection[str]) -> Layer | str | None:
    """The layer at ``node``, or why it cannot be solved for; None where no weight is multiplied.

    tensors   names of the placeholders that stand for parameters and buffers
    """
    does = family(node)
    if node.op != "call_function" or (does is not None and does not in MULTIPLIES):
        return None
    if not any(behind_views(n).name in tensors for n in node.all_input_nodes):
        return None
    one, args = product(node), bind(node)
    if one is None and does is None:
        return "the table of ops does not say what it multiplies"
    convolves = does is Family.CONVOLUTION
    if one is None or one.form in ("", "deconv") or args.get("transposed") or args.get("groups", 1) != 1:
        what = "grouped and transposed convolutions" if convolves else "products of this kind"
        return f"{what} are not solved for"
    source, weight, bias = args[one.left], args[one.right], args.get(one.added)
    if not isinstance(source, Node) or not isinstance(weight, Node) or weight.name not in tensors:
        return "its weight is not multiplied as it is stored"
    dims = len(weight.meta["val"].shape)
    if convolves and (dims not in (3, 4) or isinstance(args.get("padding"), str)):
        return "this kind of convolution is not solved for"
    if not convolves and dims != 2:
        return "its weight has not two dimensions"
    return Layer(one.left, source, weight, bias if isinstance(bias, Node) else None, one.form)


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

    def store(self, matrix: Tensor) -> Tensor:
        """[out, in] the way round that the weight is stored."""
        return (matrix.T if self.transposed else matrix).contiguous()


@dataclass(frozen=True, kw_only=True)
class BlockGroup(PruneGroup):
    """A group whose elements are the tiles of one weight, numbered row by row. Its axis is its own: it is in no tensor.

    pattern  ``32x32`` or ``2:4`` (a tile is then one weight)
    """

    sliced: ClassVar[bool] = False

    matrix: Matrix
    pattern: str
    tile: Tile

    def sizes(self, count: int) -> dict[Axis, int]:
        """Weights keep their size: what tiles save is reckoned by the search over tiles."""
        return {}

    def choose(self, count: int, scores: Scores) -> dict[str, AnyChoice]:
        """The best ``count`` tiles, or with 2:4 the two best of every four, as a plan says it; {} where all stay."""
        own = scores[self.name]
        if self.pattern == TWO_OF_FOUR:
            kept = two_of_four(own.values.view(self.matrix.shape))
        elif count == self.size:
            return {}
        else:
            kept = torch.ones(self.size, dtype=torch.bool)
            kept[self.removal(own)[: self.size - count]] = False
            kept = kept.view(grid(self.matrix.shape, self.tile))
        return {self.name: Sparsity(self.pattern, self.matrix.shape, kept)}

    def removal(self, scores: ImportanceScores) -> Tensor:
        """Tiles in the order in which they go; of equal ones the first. [size] int64"""
        return scores.values.argsort(stable=True) if scores.order is None else scores.order.flip(0)


def matrices(program: Program) -> list[Matrix]:
    """Every linear layer whose weight is a floating parameter of two dimensions, in graph order."""
    bound, tensors = program.tensor_of_placeholder, program.tensors
    parameters = program.exported.graph_signature.inputs_to_parameters
    pointers = collections.Counter(tensors[n].data_ptr() for n in parameters.values() if n in tensors)
    known, found = stand_ins(program), []
    for node in program.graph.nodes:
        layer = layer_at(node, parameters)
        if not isinstance(layer, Layer) or layer.form == "conv":
            continue
        weight, bias, transposed = layer.weight, layer.bias, layer.form == "transposed"
        tensor, value = tensors[bound[weight.name]], node.meta.get("val")
        if not tensor.is_floating_point() or not isinstance(value, Tensor):
            continue
        shape = (tensor.shape[1], tensor.shape[0]) if transposed else (tensor.shape[0], tensor.shape[1])
        total = 1
        for size in value.shape[:-1]:
            total *= known.real(size)
        batch = max(1, samples_in(pytree.tree_leaves(program.example_inputs)))
        shared = len(weight.users) > 1 or pointers[tensor.data_ptr()] > 1
        movable = bias.name if bias is not None and bias.name in bound else ""
        found.append(
            Matrix(
                node.name,
                layer.source.name,
                layer.operand,
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
        if not forward and not _ends(current):
            return False
        for other in current.users if forward else current.all_input_nodes:
            if forward and other.op == "output":
                reached = True
            elif forward and not _ends(other):
                return False
            elif other not in seen:
                seen.add(other)
                pending.append(other)
    return reached


def _ends(node: Node) -> bool:
    return family(node) in ENDS or op_name(node) in SQUASHES
