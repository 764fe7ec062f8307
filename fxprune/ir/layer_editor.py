"""Editing one layer of an exported program: new tensors as placeholders, new nodes in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import InternalError
from .fake_run import fake_mode_of, infer
from .program import Program
from .rebuild import copy_graph, rebuild


class Replacing:
    """A copy of a program's graph in which layers are exchanged for others that hold other tensors.

    by   name of the pass, for the nodes it makes
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program, self.by = program, by
        self.module = copy_graph(program.exported)
        self.graph: Graph = self.module.graph
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.mode = fake_mode_of(self.graph)
        self.state = dict(program.exported.state_dict)
        self.specs = list(program.exported.graph_signature.input_specs)

    def tensor(self, beside: str, suffix: str, value: Tensor) -> Node:
        """A placeholder of its own for ``value``, after that of the parameter whose placeholder is ``beside``.

        Floating tensors are parameters without gradient, others buffers.
        """
        at = next(i for i, s in enumerate(self.specs) if s.arg.name == beside)
        base = str(self.specs[at].target)
        name = f"{base}_{suffix}"
        with self.graph.inserting_after(self.nodes[beside]):
            node = self.graph.placeholder(f"{beside}_{suffix}")
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        self.nodes[node.name] = node
        floating = value.is_floating_point()
        kind = InputKind.PARAMETER if floating else InputKind.BUFFER
        spec = InputSpec(kind, TensorArgument(node.name), name, persistent=None if floating else True)
        self.specs.insert(at + 1, spec)
        self.state[name] = torch.nn.Parameter(value, requires_grad=False) if floating else value
        return node

    def buffer(self, name: str, value: Tensor) -> Node:
        """A placeholder for a new buffer of this name, behind those of all parameters and buffers."""
        held = (InputKind.PARAMETER, InputKind.BUFFER)
        at = max(i for i, s in enumerate(self.specs) if s.kind in held)
        with self.graph.inserting_after(self.nodes[str(self.specs[at].arg.name)]):
            node = self.graph.placeholder(f"b_{name}")
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        self.specs.insert(at + 1, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        self.nodes[node.name], self.state[name] = node, value
        return node

    def call(self, origin: Node, target: Any, *args: Any) -> Node:
        """A node that carries a fake value, the user's source line of ``origin`` and this pass's name."""
        node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
        node.meta["fxprune_pass"] = self.by
        infer(node)
        return node

    def instead(self, old: Node, new: Node) -> None:
        """All readers of ``old`` read ``new``."""
        have, want = new.meta["val"].shape, old.meta["val"].shape
        # asked of the solver, not with !=, which would tie open sizes to the example's
        if len(have) != len(want) or not all(statically_known_true(a == b) for a, b in zip(have, want, strict=True)):
            raise InternalError(
                f"{new.name} has shape {list(new.meta['val'].shape)}, it stands for {old.name} of "
                f"{list(old.meta['val'].shape)}",
                pipeline=self.by,
            )
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def finish(self) -> ExportedProgram:
        """The program; tensors that nothing reads any more are gone."""
        bound = self.program.tensor_of_placeholder
        left = {s.arg.name for s in self.specs}
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node.name in bound and self._was_read(node.name):
                self.graph.erase_node(node)
                left.discard(node.name)
                self.state.pop(bound[node.name], None)
        specs = [s for s in self.specs if s.arg.name in left]
        outputs = list(self.program.exported.graph_signature.output_specs)
        return rebuild(
            self.program.exported, self.module, state_dict=self.state, signature=ExportGraphSignature(specs, outputs)
        )

    def _was_read(self, placeholder: str) -> bool:
        """Whether the program that was given read this tensor."""
        return any(n.name == placeholder and n.users for n in self.program.graph.nodes)
