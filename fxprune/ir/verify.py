"""The invariants that every program keeps, checked after every pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InternalError
from .axis import total
from .program import Program


def verify(program: Program, graph_changed: bool = True) -> None:
    """Raise :class:`InternalError` unless graph, signature, tensors, groups and plan agree.

    ``graph_changed=False`` skips what only depends on the graph (lint, signature, tensor shapes).
    """
    if graph_changed:
        _verify_graph(program)
    if program.groups is not None:
        _verify_groups(program)
    if program.plan is not None and program.groups is not None:
        program.plan.check(program.group_by_name)


def _verify_graph(program: Program) -> None:
    exported = program.exported
    try:
        exported.graph.lint()
        exported.validate()
    except Exception as error:  # torch raises several types here; each means that the pass broke the graph
        raise InternalError(f"the graph is not valid: {error}") from error
    tensors, bound = program.tensors, program.tensor_of_placeholder
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name not in bound or not isinstance(value, Tensor):
            continue
        name = bound[node.name]
        if name not in tensors:
            raise InternalError(f"placeholder {node.name} stands for {name}, which does not exist")
        have, said = tuple(tensors[name].shape), tuple(value.shape)
        if have != said:
            raise InternalError(f"{name} has shape {have}, the graph says {said}")
    for name, tensor in tensors.items():
        if isinstance(tensor, torch._subclasses.FakeTensor):
            raise InternalError(f"{name} is a fake tensor")


def _verify_groups(program: Program) -> None:
    tensors = program.tensors
    names = [g.name for g in program.need("groups")]
    if len(set(names)) != len(names):
        raise InternalError("two groups share a name")
    for group in program.need("groups"):
        for slot in group.slots:
            tensor = tensors.get(slot.parameter)
            if tensor is None or slot.position >= tensor.dim():
                raise InternalError(f"group {group.name} reaches {slot.parameter}[{slot.position}], which is not there")
            if total(slot.dim) != tensor.shape[slot.position]:
                raise InternalError(
                    f"{slot.parameter}[{slot.position}] has {tensor.shape[slot.position]} elements, "
                    f"its axes say {total(slot.dim)}"
                )
    for name, score in (program.scores or {}).items():
        group = program.group_by_name.get(name)
        if group is None or score.values.shape != (group.size,):
            raise InternalError(f"scores of {name} do not fit its group")
