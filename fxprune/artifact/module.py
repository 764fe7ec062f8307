"""An exported program as an ordinary, trainable ``nn.Module``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from ..process.silence import quiet


class ProgramModule(GraphModule):
    """A captured graph with its parameters under their original names: calls, trains, moves and copies like any module.

    The graph was captured in evaluation form and stays so: ``train()`` and ``eval()`` only set the flag, dropout is
    gone and batch norm uses its running statistics, which do not move. Gradients flow to every parameter, so
    fine-tuning and transfer learning work; that is fine-tuning with frozen batch-norm statistics and without dropout.

    ``to(device)`` also moves the constants that the graph creates. ``state_dict``, ``load_state_dict`` and ``deepcopy``
    work. To keep the module, save the artefact (or the state dict): a graph cannot be pickled whole.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> ProgramModule:
        result = super()._apply(fn, recurse)
        tensor = next(iter([*self.parameters(), *self.buffers()]), None)
        if tensor is not None and _move_literals(self.graph, tensor.device):
            self.recompile()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        with quiet():  # torch's own tree specs warn about themselves when they are copied
            twin = super().__deepcopy__(memo)
        assert isinstance(twin, ProgramModule)
        return twin


def module_of(exported: ExportedProgram) -> ProgramModule:
    """``exported`` as a module that shares its tensors.

    Wrong shapes at a call raise an AssertionError that names the input and the condition it breaks.
    """
    unlifted = exported.module()
    module = ProgramModule(unlifted, unlifted.graph, class_name="ProgramModule")
    _adopt(module, unlifted)
    module.meta.update(unlifted.meta)
    module.train(False)
    return module


def _adopt(module: nn.Module, source: nn.Module) -> None:
    """Keep the tensors that the graph does not read, so the state dict is complete, and which buffers persist."""
    for path, part in source.named_modules():
        mine = module
        for word in filter(None, path.split(".")):
            if not hasattr(mine, word):
                mine.add_module(word, nn.Module())
            mine = getattr(mine, word)
        for name, parameter in part._parameters.items():
            if name not in mine._parameters:
                mine.register_parameter(name, parameter)
        for name, buffer in part._buffers.items():
            if name not in mine._buffers:
                mine.register_buffer(name, buffer)
        mine._non_persistent_buffers_set |= part._non_persistent_buffers_set & set(mine._buffers)


def _move_literals(graph: Graph, device: torch.device) -> bool:
    """Point every device literal of the graph to ``device``; True when one changed."""
    changed = False

    def move_value(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed = True
            return device
        return value

    for node in graph.nodes:
        if isinstance(node, Node) and node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, move_value)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, move_value)
    return changed
