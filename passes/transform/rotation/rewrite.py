"""The weights and the graph of a stream in another basis: norms folded into their readers, everything along the stream
multiplied by one orthogonal matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

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
    """A program whose stream has no norm weights: what it is in its own basis, ready for any other.

    made     name of a parameter or buffer -> (the tensor that it is made of, what is made of it)
    untied   (name, elements) of tensors that two uses shared and that are two now
    """

    program: Program
    uses: Uses
    made: Mapping[str, tuple[Tensor, Change]]
    untied: tuple[tuple[str, int], ...]

    def rotated(self, basis: Tensor) -> Program:
        """The same function with the stream's coordinates those of the columns of ``basis``. [D, D] fp64, orthogonal

        Every weight is made anew of the original one in fp64 and rounded once.
        """
        changed = {name: _value(t, change, self.uses.centred, basis) for name, (t, change) in self.made.items()}
        return self.program.without_facts(exported=with_parameters(self.program, changed))


def fold(program: Program, uses: Uses, by: str) -> Folded:
    """The program with the stream's norms folded: their weights into the readers, centring into the writers, and each
    norm x / sqrt(|x|^2 / D + eps) with D a number (SliceGPT, arXiv 2401.15024, section 3.2, with a constant width).

    by   name of the pass, for the nodes that it makes
    """
    edit = Replacing(program, by)
    maker = _Maker(program, uses, edit)
    with torch.no_grad():
        maker.make()
    for node, shift in uses.biases:
        _add_bias(edit, edit.nodes[node.name], shift, maker)
    _drop(edit, uses.dropped)
    for norm in uses.norms:
        _write_out(edit, norm)
    edit.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or is_mutable(n))
    exported = edit.done()
    state = {**exported.constants, **exported.state_dict}
    made = {name: one for name, one in maker.made.items() if name in state}
    return Folded(program.without_facts(exported=exported), uses, made, tuple(maker.untied))


def untied_by(program: Program, uses: Uses) -> list[str]:
    """Names of tensors that would be two afterwards."""
    bound = program.tensor_of_placeholder
    found = []
    for source, variants in _variants(uses).items():
        if source.name in bound and len(variants) > 1:
            found.append(bound[source.name])
    by_place: dict[int, list[tuple[str, Change]]] = {}
    for source, variants in _variants(uses).items():
        if source.name in bound:
            place = program.tensors[bound[source.name]].data_ptr()
            by_place.setdefault(place, []).extend((bound[source.name], change) for change, _ in variants)
    for pairs in by_place.values():
        if len({name for name, _ in pairs}) > 1 and not all(_alike(pairs[0][1], change) for _, change in pairs):
            found.append(pairs[0][0])
    return list(dict.fromkeys(found))


def _variants(uses: Uses) -> dict[Node, list[tuple[Change, list[Node]]]]:
    """Constant -> what different users need it to become, each with these users."""
    found: dict[Node, list[tuple[Change, list[Node]]]] = {}
    for user, change in uses.changes:
        variants = found.setdefault(change.source, [])
        users = next((users for known, users in variants if known.same(change)), None)
        if users is None:
            variants.append((change, [user]))
        else:
            users.append(user)
    return found


def _alike(one: Change, two: Change) -> bool:
    """Whether two tensors of equal values stay equal."""
    plain = all(c.scale is None and c.gamma is None and c.shift is None for c in (one, two))
    return plain and (one.out, one.into) == (two.out, two.into)


def _value(tensor: Tensor, change: Change, centred: bool, basis: Tensor | None) -> Tensor:
    """What becomes of ``tensor``, in fp64; without a ``basis`` in the stream's own."""
    made = tensor.detach().double()
    if change.shift is not None:
        made = made + change.shift.to(made)
    if change.gamma is not None and change.into is not None:
        made = made * _along(change.gamma, change.into, made)
    if change.scale is not None and change.out is not None:
        made = made * _along(change.scale, change.out, made)
    if change.out is not None and centred:
        made = made - made.mean(change.out, keepdim=True)
    for dim in {d for d in (change.out, change.into) if d is not None} if basis is not None else ():
        made = (made.movedim(dim, -1) @ basis.to(made)).movedim(-1, dim)
    return made.contiguous()


def _along(vector: Tensor, dim: int, like: Tensor) -> Tensor:
    return vector.to(like).view([-1 if i == dim else 1 for i in range(like.dim())])


# ---------------------------------------------------------------- tensors


class _Maker:
    """Gives every use of a constant its own version, in place where only one is needed."""

    def __init__(self, program: Program, uses: Uses, edit: Replacing) -> None:
        self.program, self.uses, self.edit = program, uses, edit
        self.bound, self.tensors = program.tensor_of_placeholder, program.tensors
        self.made: dict[str, tuple[Tensor, Change]] = {}
        self.untied: list[tuple[str, int]] = [(name, self.tensors[name].numel()) for name in untied_by(program, uses)]

    def make(self) -> None:
        variants = _variants(self.uses)
        values = evaluate(self.program, [s for s in variants if s.name not in self.bound])
        for source, versions in variants.items():
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
        fresh = _value(value, change, self.uses.centred, None).to(value)
        trained = isinstance(value, torch.nn.Parameter)
        self.edit.state[name] = torch.nn.Parameter(fresh, value.requires_grad) if trained else fresh

    def add(self, source: Node, suffix: str, value: Tensor, change: Change) -> Node:
        """A placeholder of its own for the new version of ``value``, beside the first parameter that it comes from."""
        origin = next(_origins(source, self.bound))
        fresh = _value(value, change, self.uses.centred, None).to(value)
        node = self.edit.tensor(origin.name, suffix, fresh)
        name = f"{self.bound[origin.name]}_{suffix}"
        if self.tensors[self.bound[origin.name]].requires_grad:
            self.edit.state[name] = torch.nn.Parameter(fresh)
        self.made[name] = value, change
        return node


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


def _add_bias(edit: Replacing, node: Node, shift: Tensor, maker: _Maker) -> None:
    """A reader without a bias gets one."""
    weight = next(c.source for user, c in maker.uses.changes if user.name == node.name)
    zeros = shift.new_zeros(shift.shape).to(node.meta["val"].dtype)
    bias = maker.add(weight, f"shift_{node.name}", zeros, Change(weight, shift=shift))
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
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
