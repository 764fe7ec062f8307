"""The weights and the graph of a stream in another basis: norms folded into their readers, everything along the stream
multiplied by one orthogonal matrix."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ....ir.axis import Axis
from ....ir.constants import evaluate
from ....ir.dataflow import is_mutable
from ....ir.layer_editor import Replacing
from ....ir.norms import RowNorm
from ....ir.program import Program
from ..sparsify_blocks import with_parameters
from .uses import Change, Uses

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Folded:
    """A program whose streams have no norm weights: each in its own basis still, ready for any other.

    made   name of a parameter or buffer -> (the tensor that it is made of, what is made of it)
    """

    program: Program
    uses: tuple[Uses, ...]
    made: Mapping[str, tuple[Tensor, Change]]

    def rotate(self, bases: Mapping[Axis, Tensor]) -> Program:
        """The same function with the coordinates of each stream those of the columns of its basis. [D, D] fp64, each
        orthogonal

        Every weight is made anew of the original one in fp64 and rounded once.
        """
        centred = {one.axis for one in self.uses if one.centred}
        changed = {name: _value(t, change, centred, bases) for name, (t, change) in self.made.items()}
        return self.program.without_facts(exported=with_parameters(self.program, changed))


def fold(program: Program, uses: Sequence[Uses], by: str) -> Folded:
    """The program with the streams' norms folded: their weights into the readers, centring into the writers, and each
    norm x / sqrt(|x|^2 / D + eps) with D a number (SliceGPT, arXiv 2401.15024, section 3.2, with a constant width).

    by   name of the pass, for the nodes that it makes
    """
    edit = Replacing(program, by)
    maker = _Maker(program, uses, edit)
    with torch.no_grad():
        maker.make()
        for node, weight, shift in (one for each in uses for one in each.biases):
            _add_bias(edit, node, shift, weight, maker)
    for one in uses:
        _drop(edit, one.dropped)
        for norm in one.norms:
            _write_out(edit, norm)
    edit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or is_mutable(n))
    exported = edit.finish()
    state = {**exported.constants, **exported.state_dict}
    made = {name: one for name, one in maker.made.items() if name in state}
    return Folded(program.without_facts(exported=exported), tuple(uses), made)


def find_untied(program: Program, uses: Sequence[Uses]) -> list[tuple[str, int]]:
    """(name, elements) of tensors that would be two afterwards."""
    bound, tensors, found = program.tensor_of_placeholder, program.tensors, dict[str, int]()
    places: dict[int, list[tuple[str, Change]]] = {}
    for source, versions in _versions(uses).items():
        if source.name in bound:
            name = bound[source.name]
            places.setdefault(tensors[name].data_ptr(), []).extend((name, change) for change, _ in versions)
    for pairs in places.values():
        name, change = pairs[0]
        if not all(change.same(other) for _, other in pairs):
            found[name] = tensors[name].numel()
    return list(found.items())


def _versions(uses: Sequence[Uses]) -> dict[Node, list[tuple[Change, list[Node]]]]:
    """Constant -> what different users need it to become, each with these users."""
    needed: dict[tuple[Node, Node], Change] = {}
    for user, change in (one for each in uses for one in each.changes):
        key = user, change.source
        needed[key] = needed[key].and_(change) if key in needed else change
    found: dict[Node, list[tuple[Change, list[Node]]]] = {}
    for (user, source), change in needed.items():
        versions = found.setdefault(source, [])
        users = next((users for known, users in versions if known.same(change)), None)
        if users is None:
            versions.append((change, [user]))
        else:
            users.append(user)
    return found


def _value(tensor: Tensor, change: Change, centred: Collection[Axis], bases: Mapping[Axis, Tensor]) -> Tensor:
    """What becomes of ``tensor``, in fp64; streams without a basis among ``bases`` stay in their own."""
    made = tensor.detach().double()
    if change.shift is not None:
        made = made + change.shift.to(made)
    if change.gamma is not None and change.into is not None:
        made = made * _along(change.gamma, change.into, made)
    if change.scale is not None and change.out is not None:
        made = made * _along(change.scale, change.out, made)
    if change.out is not None and change.written in centred:
        made = made - made.mean(change.out, keepdim=True)
    for dim, axis in ((change.out, change.written), (change.into, change.read)):
        if dim is not None and axis is not None and axis in bases:
            made = (made.movedim(dim, -1) @ bases[axis].to(made)).movedim(-1, dim)
    return made.contiguous()


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    return vector.to(like).view([-1 if i == dim else 1 for i in range(like.dim())])


# ---------------------------------------------------------------- tensors


class _Maker:
    """Gives every use of a constant its own version, in place where only one is needed."""

    def __init__(self, program: Program, uses: Sequence[Uses], edit: Replacing) -> None:
        self.program, self.edit = program, edit
        self.bound, self.tensors = program.tensor_of_placeholder, program.tensors
        self.centred = {one.axis for one in uses if one.centred}
        self.versions = _versions(uses)
        self.made: dict[str, tuple[Tensor, Change]] = {}

    def make(self) -> None:
        values = evaluate(self.program, [s for s in self.versions if s.name not in self.bound])
        for source, versions in self.versions.items():
            here = self.bound.get(source.name)
            users = {user for _, some in versions for user in some}
            alone = here in self.edit.state and set(source.users) <= users
            value = self.tensors[here] if here is not None else values[source]
            for number, (change, some) in enumerate(versions):
                if alone and number == 0:
                    assert here is not None
                    self._put(here, value, change)
                    continue
                new = self.add(source, f"rotated{number or ''}", value, change)
                for user in some:
                    self.edit.nodes[user.name].replace_input_with(self.edit.nodes[source.name], new)

    def _put(self, name: str, value: Tensor, change: Change) -> None:
        self.made[name] = value, change
        fresh = _value(value, change, self.centred, {}).to(value)
        trained = isinstance(value, torch.nn.Parameter)
        self.edit.state[name] = torch.nn.Parameter(fresh, value.requires_grad) if trained else fresh

    def add(self, source: Node, suffix: str, value: Tensor, change: Change) -> Node:
        """A placeholder of its own for the new version of ``value``, beside the first parameter that it comes from."""
        origin = next(_origins(source, self.bound))
        fresh = _value(value, change, self.centred, {}).to(value)
        node = self.edit.tensor(origin.name, suffix, fresh)
        name = f"{self.bound[origin.name]}_{suffix}"
        if self.tensors[self.bound[origin.name]].requires_grad:
            self.edit.state[name] = torch.nn.Parameter(fresh)
        self.made[name] = value, change
        return node

    def of(self, user: Node, source: Node) -> Change:
        """What ``user`` needs ``source`` to become."""
        return next(change for change, users in self.versions[source] if user in users)


def _origins(node: Node, bound: Mapping[str, str]) -> Iterator[Node]:
    """The parameters that a constant is made of, the nearest first."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        if current.name in bound:
            yield current
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)


# ---------------------------------------------------------------- nodes


def _add_bias(edit: Replacing, reader: Node, shift: Tensor, weight: Node, maker: _Maker) -> None:
    """A reader without a bias gets one; where it writes a stream, the bias is part of that."""
    node, like = edit.nodes[reader.name], maker.of(reader, weight)
    zeros = torch.zeros(shift.shape, dtype=node.meta["val"].dtype, device=shift.device)
    written = None if like.written is None else 0
    change = Change(weight, written, written=like.written, scale=like.scale, shift=shift)
    bias = maker.add(weight, f"shift_{node.name}", zeros, change)
    names = [a.name for a in node.target._schema.arguments]
    if "bias" in names:
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs) | {"bias": bias}
        node.args, node.kwargs = tuple(given.pop(n) for n in names[: names.index("bias") + 1]), given
        return
    with edit.graph.inserting_after(node):
        new = edit.call(node, aten.add.Tensor, node, bias)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _drop(edit: Replacing, dropped: tuple[tuple[Node, Node], ...]) -> None:
    """What is folded into weights is gone: its readers read its operand."""
    for node, operand in dropped:
        old = edit.nodes[node.name]
        # of a chain the operand may be gone already: what stands in its place is an argument now
        new = next(n for n in old.all_input_nodes if n.name == operand.name or n.name not in _names(node, operand))
        if new.meta["val"].dtype != old.meta["val"].dtype:
            with edit.graph.inserting_before(old):
                new = edit.call(old, aten.to.dtype, new, old.meta["val"].dtype)
        edit.instead(old, new)


def _names(node: Node, operand: Node) -> set[str]:
    return {n.name for n in node.all_input_nodes if n is not operand}


def _write_out(edit: Replacing, norm: RowNorm) -> None:
    """x / sqrt(|x|^2 / D + eps), D a number: cutting the stream leaves it, so cutting is masking."""
    old, x = edit.nodes[norm.node.name], edit.nodes[norm.source.name]
    width, dtype = int(norm.source.meta["val"].shape[-1]), old.meta["val"].dtype

    def call(target: Any, *args: Any) -> Node:
        return edit.call(old, target, *args)

    with edit.graph.inserting_before(old):
        if x.meta["val"].dtype in HALVES:
            x = call(aten.to.dtype, x, torch.float32)
        power = call(aten.sum.dim_IntList, call(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        root = call(aten.rsqrt.default, call(aten.add.Tensor, call(aten.div.Tensor, power, width), norm.eps))
        new = call(aten.mul.Tensor, x, root)
        if new.meta["val"].dtype != dtype:
            new = call(aten.to.dtype, new, dtype)
    edit.instead(old, new)
