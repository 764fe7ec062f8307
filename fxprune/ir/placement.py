"""Where a program lies: its tensors, its example inputs and the devices that its graph names, moved together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from .program import Program
from .rebuild import copy_graph, rebuild


def place(program: Program, device: torch.device) -> Program:
    """The same program on ``device``, facts and all; itself where it lies there already.

    Weights that share memory share it there too. Plans, scores and the indices that facts hold are about the graph, not
    about its values: they stay where they are. Raises what the device's allocator raises where there is no room.
    """
    if program.device == device:
        return program
    exported, moved = program.exported, _Moved(device)
    graph_module = copy_graph(exported)
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            move_literals(module.graph, device)
            for node in module.graph.nodes:
                node.meta["val"] = pytree.tree_map_only(Tensor, lambda t: t.to(device), node.meta.get("val"))
    inputs = exported.example_inputs
    placed = rebuild(
        exported,
        graph_module,
        state_dict={name: moved(tensor) for name, tensor in exported.state_dict.items()},
        constants={name: moved(value) for name, value in exported.constants.items()},
        example_inputs=None if inputs is None else pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs),
    )
    return program.but(exported=placed)


def whole_device(name: str | torch.device) -> torch.device:
    """The device with its number, as tensors on it say it: ``cuda`` is ``cuda:0`` unless another is current. Raises
    what torch raises where there is none.

    >>> whole_device("cpu")
    device(type='cpu')
    """
    return torch.empty(0, device=name).device


def move_literals(graph: Graph, device: torch.device) -> bool:
    """Point every device literal of the graph to ``device``; True when one changed."""
    changed = False

    def move_value(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed = True
            return device
        return value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = map_aggregate(node.args, move_value)
            node.kwargs = map_aggregate(node.kwargs, move_value)
    return changed


class _Moved:
    """Copies of tensors on a device, one for all that lie at the same place in memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.made = device, dict[tuple[int, int, torch.dtype], Tensor]()

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (value.data_ptr(), value.numel(), value.dtype)
        if not value.numel() or key not in self.made:
            self.made[key] = value.detach().to(self.device)  # keeps its strides where it is dense
        copy = self.made[key]
        if (copy.shape, copy.stride()) != (value.shape, value.stride()) and _dense(value):
            copy = copy.as_strided(value.shape, value.stride())
        return torch.nn.Parameter(copy, value.requires_grad) if isinstance(value, torch.nn.Parameter) else copy


def _dense(value: Tensor) -> bool:
    """Whether it fills its memory without gaps, in whatever order of its dimensions."""
    return value.permute(sorted(range(value.dim()), key=value.stride, reverse=True)).is_contiguous()
