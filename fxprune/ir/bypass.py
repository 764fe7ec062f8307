"""A graph run as if some of its parts were gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .group import Switch


class Bypassing(Interpreter):
    """Runs a graph in which, where a part is gone, a value is that of an earlier node; what only the part needs is
    skipped.

    parts    the parts that are gone (see ``Switch.past``)
    closed   node -> [experts] True for experts that are gone: in what it reads they are minus infinity
    watched  names of nodes whose values are kept in ``found``; those that are skipped are not there
    """

    def __init__(
        self,
        module: GraphModule,
        parts: Iterable[Switch] = (),
        watched: Collection[str] = (),
        closed: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(module)
        self.closed = closed or {}
        gone = list(parts)
        self.past = dict(pair for part in gone for pair in part.past)
        self.skipped = {name for part in gone if part.past for name in part.inside}
        self.watched, self.found = frozenset(watched), dict[str, Any]()
        self._before, self._held = frozenset(self.past.values()), dict[str, Any]()

    def run_node(self, n: Node) -> Any:
        """One node's value: that of another where a part before it is gone."""
        if n.name in self.past:
            value = self._held[self.past[n.name]]
        elif n.name in self.skipped and n.op != "placeholder":  # who reads it is skipped as well
            return None
        else:
            value = self.run_own(n)
        if n.name in self._before:
            self._held[n.name] = value
        if n.name in self.watched:
            self.found[n.name] = value
        return value

    def run_own(self, n: Node) -> Any:
        """What the node itself makes of what it reads."""
        if n.name not in self.closed:
            return super().run_node(n)
        (scores, *args), kwargs = self.fetch_args_kwargs_from_env(n)
        open_ones = scores.masked_fill(self.closed[n.name].to(scores.device), -torch.inf)
        return n.target(open_ones, *args, **kwargs)  # type: ignore[operator]
