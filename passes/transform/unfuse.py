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
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

aten = torch.ops.aten


@dataclass(frozen=True)
class Unfuse(Transform):
    """Rewrite ``view(.., n, H, d)`` [+ ``permute``] + ``unbind`` of the n to ``split`` and n views.

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
    source, shape = view.args[0], _shape(view)
    if not isinstance(source, Node) or not isinstance(shape, list | tuple):
        return None
    have, out = source.meta["val"].shape, view.meta["val"].shape
    lead = len(have) - 1
    if len(out) < len(have) + 2 or any(a is not b and a != b for a, b in zip(have[:lead], out[:lead], strict=True)):
        return None
    pieces = out[lead]
    if not isinstance(pieces, int) or pieces not in (2, 3) or not isinstance(shape[lead], int) or shape[lead] != pieces:
        return None
    order, last = list(range(len(out))), view
    user = next(iter(view.users))
    if user.target is aten.permute.default:
        permutation: Any = bind(user)["dims"]
        order, last = [d % len(out) for d in permutation], user
    readers = list(_readers(last, order.index(lead)))
    if len(readers) != len(last.users) and len(readers) != pieces:
        return None
    return _Match(source, view, order, lead, pieces, readers) if readers else None


def _shape(view: Node) -> Any:
    """The sizes that a view gives, as its op calls them; None for one that names a part of them."""
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
    shape: list[Any] = list(_shape(match.view))
    shape.pop(match.lead)
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
            piece = call(aten.reshape.default, call(operator.getitem, split, i), shape)
            made.append(call(aten.permute.default, piece, order) if order != sorted(order) else piece)
    for reader, i in match.readers:
        old, new = reader.meta["val"], made[i].meta["val"]
        assert isinstance(old, Tensor)
        assert len(old.shape) == len(new.shape)
        reader.replace_all_uses_with(made[i])
