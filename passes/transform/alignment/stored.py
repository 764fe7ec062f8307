"""Which entries of the stored parameters a weight is made of, where it is moved and never mixed."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from ....ir.dataflow import VIEWS, Family, bind, family, op_name
from ....ir.program import Program

MOVES = VIEWS | {Family.SPLIT, Family.PART, Family.PICK, Family.JOIN}
PICKS = "index_select"


@dataclass(frozen=True)
class Stored:
    """A value whose every entry is one entry of a parameter or buffer.

    names    qualified names of the tensors
    origin   which of them each entry is of;  place: where in it, flattened. int64, both in the shape of the value
    """

    names: tuple[str, ...]
    origin: Tensor
    place: Tensor

    def view(self, view: Callable[[Tensor], Tensor]) -> Stored:
        """The same entries, or some of them, in another arrangement."""
        return Stored(self.names, view(self.origin), view(self.place))

    def present(self) -> list[str]:
        """The tensors of which an entry is in it."""
        return [self.names[i] for i in self.origin.unique().tolist()]

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The value, from these tensors. fp64"""
        value = torch.zeros(self.place.shape, dtype=torch.float64)
        for number, name in enumerate(self.names):
            mine = self.origin == number
            value[mine] = tensors[name].detach().flatten()[self.place[mine].to(tensors[name].device)].to(value)
        return value

    def write(self, tensors: Mapping[str, Tensor], value: Tensor) -> None:
        """Put ``value`` into these tensors, which are contiguous."""
        for name in self.present():
            mine = self.origin == self.names.index(name)
            tensors[name].view(-1)[self.place[mine].to(tensors[name].device)] = value[mine].to(tensors[name])

    def touches(self, name: str, size: int) -> Tensor:
        """True where an entry of a tensor of ``size`` entries is in it. [size]"""
        found = torch.zeros(size, dtype=torch.bool)
        if name in self.names:
            found[self.place[self.origin == self.names.index(name)]] = True
        return found


class Store:
    """The parameters and buffers of a program, and who reads them."""

    def __init__(self, program: Program) -> None:
        self.bound, self.tensors = program.tensor_of_placeholder, program.tensors
        self.placeholders = {self.bound[n.name]: n for n in program.placeholders() if n.name in self.bound}
        held = [self.tensors[name] for name in self.bound.values() if name in self.tensors]
        self.pointers = collections.Counter(t.data_ptr() for t in held if t.numel())
        self.bindings = collections.Counter(self.bound.values())
        self.written = program.written

    def trace(self, node: Node) -> Stored | None:
        """What ``node`` is made of; None where that is not stored, or not merely moved."""
        names: list[str] = []
        values: dict[Node, Any] = {}  # (origin, place), or for several outputs a list of these for both
        for one in _ancestors(node):
            name = self.bound.get(one.name)
            if one.op == "placeholder" and name in self.tensors:
                place = torch.arange(self.tensors[name].numel()).view(self.tensors[name].shape)
                values[one] = (torch.full_like(place, len(names)), place)
                names.append(name)
            elif not _moves(one):
                return None
            elif op_name(one) == PICKS:  # of an index that slicing cuts: that of a table which layers shared
                source, dim, index = (bind(one)[n] for n in ("self", "dim", "index"))
                if index.name not in self.bound:
                    return None
                chosen = self.tensors[self.bound[index.name]].cpu()
                values[one] = tuple(values[source][i].index_select(dim, chosen) for i in (0, 1))
            elif family(one) is Family.CAST:
                values[one] = values[one.all_input_nodes[0]]
            else:
                values[one] = tuple(_move(one, {n: values[n][i] for n in one.all_input_nodes}) for i in (0, 1))
        found = values[node]
        return Stored(tuple(names), *found) if isinstance(found[0], Tensor) else None

    def readers(self, name: str) -> Iterator[tuple[Node, Node]]:
        """(who reads it, as what value) for every reader of a tensor, behind whatever moves it."""
        pending = [self.placeholders[name]]
        while pending:
            value = pending.pop()
            for user in value.users:
                if _moves(user):
                    pending.append(user)
                else:
                    yield user, value

    def is_alone(self, name: str) -> bool:
        """Whether no other name stands for its memory, and nothing writes into it."""
        single = self.bindings[name] == 1 and self.pointers[self.tensors[name].data_ptr()] <= 1
        return single and self.placeholders[name].name not in self.written


def _moves(node: Node) -> bool:
    return node.op == "call_function" and (family(node) in MOVES or op_name(node) == PICKS)


def _move(node: Node, values: Mapping[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _ancestors(node: Node) -> list[Node]:
    """The node and all that it is made of, in graph order."""
    seen, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return [n for n in node.graph.nodes if n in seen]
