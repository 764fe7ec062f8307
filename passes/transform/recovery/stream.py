"""One program run node by node over batches, as far as it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from ....errors import FxpruneError


class Stream:
    """One batch on its way through one graph. Values live until their last reader has run, or while they are held."""

    def __init__(self, module: GraphModule, tensors: Mapping[str, Tensor], flat: Sequence[Any]) -> None:
        self.module, self.tensors = module, tensors
        self.nodes = list(module.graph.nodes)
        self.place = {n.name: i for i, n in enumerate(self.nodes)}
        self.inputs = iter(flat)
        self.values: dict[str, Any] = {}
        self.held: set[str] = set()
        self.last = {n.name: max((self.place[u.name] for u in n.users), default=-1) for n in self.nodes}
        self.cursor = 0

    def advance(self, until: int) -> None:
        """Run the nodes before position ``until``."""
        while self.cursor < until:
            node = self.nodes[self.cursor]
            self.values[node.name] = self.run(node)
            for source in (*node.all_input_nodes, node):
                if self.last[source.name] <= self.cursor and source.name not in self.held:
                    self.values.pop(source.name, None)
            self.cursor += 1

    def run(self, node: Node, override: Mapping[str, Any] | None = None) -> Any:
        """One node's value; ``override`` stands in for values that have not been computed."""
        if node.op == "placeholder":
            return self.tensors[node.name] if node.name in self.tensors else next(self.inputs)
        if node.op == "output":
            return None
        if node.op == "get_attr":
            return getattr(self.module, str(node.target))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(n, override or {}))
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise FxpruneError(
                "the model failed on the calibration data",
                where=node.name,
                why=(str(error).strip().splitlines() or [type(error).__name__])[0],
                cure="check the data's shapes and types against the model's inputs",
            ) from error

    def _value(self, node: Node, override: Mapping[str, Any]) -> Any:
        if node.name in override:
            return override[node.name]
        # weights may have been solved for since their placeholder was passed
        return self.tensors[node.name] if node.name in self.tensors else self.values[node.name]

    def release(self, name: str) -> None:
        """Stop holding a value."""
        self.held.discard(name)
        if self.last[name] < self.cursor:
            self.values.pop(name, None)
