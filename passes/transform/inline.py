"""``Inline``: open the regions that export wraps (``no_grad``, ``autocast``), so that the walk sees through them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class Inline(Transform):
    """Replace each wrapped region by its body. Neither gradient mode nor a disabled autocast matters at inference;
    an autocast region that is *enabled* changes dtypes and stays closed (its axes freeze)."""

    def run(self, program: Program) -> Program:
        if not any(_is_wrapper(n) for n in program.graph.nodes):
            return program
        module = copy_graph(program.exported)
        while found := [n for n in module.graph.nodes if _is_wrapper(n)]:
            for node in found:
                _open(module, node)
        return program.without_facts(exported=rebuild(program.exported, module))


def _is_wrapper(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in WRAPPERS:
        return False
    body = next((a for a in node.args if isinstance(a, Node) and a.op == "get_attr"), None)
    enabled = name == "wrap_with_autocast" and node.args[2] is True  # (device, dtype, enabled, cache, body, *inputs)
    return body is not None and not enabled


def _open(module: GraphModule, node: Node) -> None:
    at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
    attribute: Node = node.args[at]  # type: ignore[assignment]
    body: GraphModule = getattr(module, str(attribute.target))
    inputs, env, outputs = iter(node.args[at + 1 :]), {}, None
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(inputs)
            elif inner.op == "output":
                outputs = torch.fx.map_arg(inner.args[0], lambda n: env[n])
            elif inner.op == "get_attr":  # a nested region: its body moves to the outer module
                name = _free_name(module, str(inner.target))
                setattr(module, name, getattr(body, str(inner.target)))
                env[inner] = module.graph.get_attr(name)
            else:
                env[inner] = module.graph.node_copy(inner, lambda n: env[n])
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
    if node.users:
        single: Any = outputs if isinstance(outputs, Node) else outputs[0]  # type: ignore[index]
        node.replace_all_uses_with(single)
    module.graph.erase_node(node)
    if not attribute.users:
        module.graph.erase_node(attribute)
        if hasattr(module, str(attribute.target)):
            delattr(module, str(attribute.target))


def _free_name(module: GraphModule, name: str) -> str:
    name = name.replace(".", "_")
    while hasattr(module, name):
        name += "_"
    return name
