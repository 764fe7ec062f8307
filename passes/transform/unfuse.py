"""``Unfuse``: read a fused qkv projection as three, so that query/key width and value width come apart."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...ir.dataflow import Family, bind, family
from ...ir.fake_run import infer
from ...ir.guards import is_same_size
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

aten = torch.ops.aten


@dataclass(frozen=True)
class Unfuse(Transform):
    """Rewrite ``view(.., n, H, d)`` [+ ``permute`` or what moves dims alike] + ``unbind`` of the n to ``split`` and n
    views; ``view(.., n, H d)``, as the packed projection of ``nn.MultiheadAttention`` has it, as well.

    The literal ``[.., n, H, d]`` cannot say that q, k and v have different widths; three views can. Exact, and no
    slower: the split is free. Optional: heads and FFN neurons do not need it.
    """

    def run(self, program: Program) -> Program:
        module = copy_graph(program.exported)
        found = [match for n in module.graph.nodes if (match := _match(n)) is not None]
        for match in found:
            _rewrite(match, self.slug())
        if not found:
            return program
        module.graph.eliminate_dead_code()
        return program.without_facts(exported=rebuild(program.exported, module))


@dataclass(frozen=True)
class _Match:
    source: Node  # what is viewed, [*lead, n * rest]
    view: Node
    order: list[int]  # the permutation after the view
    lead: int  # rank of lead
    pieces: int  # n
    readers: list[tuple[Node, int]]  # node that reads one piece, and which


def _match(view: Node) -> _Match | None:
    if family(view) is not Family.RESHAPE or len(view.users) != 1:
        return None
    source = view.args[0]
    if not isinstance(source, Node):
        return None
    have, out = source.meta["val"].shape, view.meta["val"].shape
    lead = len(have) - 1
    sizes = _sizes(view, lead)
    if len(out) < len(have) + 1 or not all(map(is_same_size, have[:lead], out[:lead])):
        return None
    pieces = out[lead]
    if not isinstance(pieces, int) or pieces not in (2, 3) or not sizes or not isinstance(sizes[0], int):
        return None
    order, last = _trace_moves(view)
    if last is None:
        return None
    readers = list(_readers(last, order.index(lead)))
    if len(readers) != len(last.users) and len(readers) != pieces:
        return None
    return _Match(source, view, order, lead, pieces, readers) if readers else None


def _trace_moves(view: Node) -> tuple[list[int], Node | None]:
    """(where the dims of the view are behind whatever moves them and nothing else, the last node of that)."""
    order: list[int | None] = list(range(len(view.meta["val"].shape)))  # None: a dim of size one that was put in
    last = view
    while len(last.users) == 1:
        user, rank = next(iter(last.users)), len(order)
        given: dict[str, Any] = bind(user)
        if user.target is aten.permute.default:
            order = [order[d % rank] for d in given["dims"]]
        elif user.target is aten.transpose.int:
            one, two = given["dim0"] % rank, given["dim1"] % rank
            order[one], order[two] = order[two], order[one]
        elif user.target is aten.unsqueeze.default:
            order.insert(given["dim"] % (rank + 1), None)
        elif user.target is aten.squeeze.dim and order[given["dim"] % rank] is None:
            del order[given["dim"] % rank]
        elif family(user) is not Family.COPY:
            break
        last = user
    whole = [d for d in order if d is not None]
    return whole, last if len(whole) == len(order) else None


def _sizes(view: Node, lead: int) -> Any:
    """The sizes of the view behind ``lead`` dims that stay; None where they are not told one by one."""
    given = bind(view)
    if view.target is aten.unflatten.int:
        at = given["dim"] % len(view.args[0].meta["val"].shape)  # type: ignore[union-attr]
        return given["sizes"] if at == lead else None
    sizes = _shape(view)
    return sizes[lead:] if isinstance(sizes, list | tuple) else None


def _shape(view: Node) -> Any:
    given = bind(view)
    return given.get("shape", given.get("size"))


def _readers(last: Node, position: int) -> Iterator[tuple[Node, int]]:
    """Nodes that pick one piece: ``unbind`` + ``getitem``, or ``select`` with a static index."""
    rank = len(last.meta["val"].shape)
    for user in last.users:
        given = bind(user)
        dim: Any = given.get("dim", 0)
        if user.target is aten.unbind.int and dim % rank == position:
            yield from ((item, int(item.args[1])) for item in user.users if item.target is operator.getitem)  # type: ignore[arg-type]
        elif user.target is aten.select.int and dim % rank == position and isinstance(given["index"], int):
            yield user, given["index"] % last.meta["val"].shape[position]
        else:
            return


def _rewrite(match: _Match, made_by: str) -> None:
    graph, trace = match.view.graph, match.view.meta.get("stack_trace")
    sizes = list(_sizes(match.view, match.lead))[1:]
    order = [d - (d > match.lead) for d in match.order if d != match.lead]
    width = match.source.meta["val"].shape[-1] // match.pieces

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta.update(stack_trace=trace, fxprune_pass=made_by)
        infer(node)
        return node

    with graph.inserting_before(match.view):
        split = call(aten.split_with_sizes.default, match.source, [width] * match.pieces, -1)
        made = []
        for i in range(match.pieces):
            piece = call(operator.getitem, split, i)
            if len(sizes) > 1 and match.view.target is aten.unflatten.int:
                piece = call(aten.unflatten.int, piece, -1, sizes)
            elif len(sizes) > 1:
                piece = call(aten.reshape.default, piece, [*_shape(match.view)[: match.lead], *sizes])
            made.append(call(aten.permute.default, piece, order) if order != sorted(order) else piece)
    for reader, i in match.readers:
        old, new = reader.meta["val"], made[i].meta["val"]
        assert isinstance(old, Tensor)
        assert len(old.shape) == len(new.shape)
        reader.replace_all_uses_with(made[i])
