"""What every token reducer is, and what it can tap at a site."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from ....errors import OptionError
from ....ir.token_flow import TokenSite
from ....ops import OPS

aten = torch.ops.aten


class Taps:
    """One site in the graph at hand: its values as nodes, made when they are asked for. New nodes go behind ``x``.

    x          [batch, tokens, width], what is reduced
    size       [batch, tokens, 1], how many tokens each one stands for; None: one each
    tokens     how many there are here, ``left`` of ``site.tokens``
    """

    def __init__(
        self, graph: Graph, nodes: dict[str, Node], site: TokenSite, size: Node | None, left: int, made_by: str
    ) -> None:
        self.graph, self.nodes, self.site, self.size, self.left = graph, nodes, site, size, left
        self.x, self.made_by = nodes[site.value], made_by
        self._last = self.x
        self.protected = site.protected

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node behind everything made so far."""
        with self.graph.inserting_after(self._last):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update(stack_trace=self.x.meta.get("stack_trace"), fxprune_pass=self.made_by)
        self._last = node
        return node

    def op(self, name: str, *args: Any) -> Node:
        """One of our ops."""
        return self.emit(OPS[f"fxprune::{name}"].target, *args)

    def metric(self) -> Node:
        """What similarity is measured on: the mean over heads of the attention's keys. [batch, tokens, d]

        Where the keys cannot be tapped, the reduced value itself, as in OPTIN's reference code.
        """
        if not self.site.key:
            return self.x
        key = self.nodes[self.site.key]
        mean = self.emit(aten.mean.dim, key, [1])
        return self.emit(aten.transpose.int, mean, 1, 2) if self.site.transposed else mean

    def attention(self, rows: int = 0) -> Node:
        """softmax(q k^T + log size) [batch, heads, rows or all, tokens]. Raises OptionError where it cannot be had."""
        site = self.site
        if site.query and site.key:
            query, key = self.nodes[site.query], self.nodes[site.key]
            return self.op("attention_map", query, key, self.size, site.scale, rows)
        if not site.mapped:
            raise OptionError(
                "the attention cannot be tapped",
                where=f"{site.attention}, site {site.name}",
                why="it is neither scaled_dot_product_attention nor a softmax of [batch, heads, tokens, tokens]",
                cure="use `--tokens tome`",
            )
        return self.nodes[site.attention]

    def score(self, kind: str) -> Node:
        """One number per token, protected ones 0. [batch, tokens]"""
        if not self.site.values:
            raise OptionError(
                "the values of the attention cannot be tapped",
                where=f"site {self.site.name}",
                cure="use `--tokens tome`",
            )
        rows = 1 if kind in ("class", "class-value") else 0
        return self.op("token_score", self.attention(rows), self.nodes[self.site.values], kind, self.protected)


class Counting:
    """Taps that build nothing: they count the multiply-accumulates of the ops that a reducer would insert.

    shapes   of query, key and values [1, heads, tokens, d] and of x [1, tokens, width] in the dense graph, by role
    """

    def __init__(self, site: TokenSite, left: int, shapes: Mapping[str, Sequence[int]]) -> None:
        self.site, self.left, self.shapes, self.macs = site, left, shapes, 0
        self.protected = site.protected
        self.x: Any = (1, left, shapes["x"][-1])
        self.size: Any = (1, left, 1)

    def op(self, name: str, *args: Any) -> Any:
        """Count one op; its result as a shape, where a reducer may use it."""
        op = OPS[f"fxprune::{name}"]
        self.macs += op.macs(**dict(zip([a.name for a in op.target._schema.arguments], args, strict=True)))
        return (1, self.left)

    def metric(self) -> Any:
        """[1, tokens, d]"""
        key = self.shapes.get("key")
        return self.x if key is None else (1, self.left, key[2] if self.site.transposed else key[3])

    def attention(self, rows: int = 0) -> Any:
        """[1, heads, rows or all, tokens]"""
        query = self.shapes.get("query")
        if query is not None:
            shape = (1, query[1], self.left, query[3])
            self.op("attention_map", shape, shape, self.size, self.site.scale, rows)
            return (1, query[1], rows or self.left, self.left)
        heads = self.shapes["values"][1] if "values" in self.shapes else 1
        return (1, heads, self.left, self.left)

    def score(self, kind: str) -> Any:
        """[1, tokens]"""
        values = self.shapes.get("values", (1, 1, self.left, 1))
        attention = self.attention(1 if kind in ("class", "class-value") else 0)
        return self.op("token_score", attention, (1, values[1], self.left, values[3]), kind, self.protected)


class Reducer(ABC):
    """How tokens become fewer. A frozen dataclass whose fields are its options.

    name      as on the command line
    merges    whether a token stands for several afterwards: attention then counts it as often (proportional attention,
              ToMe section 3.1), averages weigh by it, and tokens can be restored
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = True

    def __str__(self) -> str:
        """``name{option=value}``: the text that makes this reducer again."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]
        said = [
            f"{f.name}={str(v).lower() if isinstance(v, bool) else v}"
            for f in fields
            if (v := getattr(self, f.name)) != f.default
        ]
        return self.name + (f"{{{','.join(said)}}}" if said else "")

    def cap(self, tokens: int, protected: int) -> int:
        """The most tokens that may go at once."""
        return max(0, tokens - protected - 1)

    @property
    def weighs(self) -> bool:
        """Whether attention and averages count a token as often as it stands for."""
        return self.merges

    @abstractmethod
    def reduce(self, taps: Any, r: int) -> Any:
        """The node of (x' [batch, tokens - r, width], size', place [batch, tokens]).

        taps   :class:`Taps`, or :class:`Counting`, which builds nothing
        """


def half(tokens: int, protected: int) -> int:
    """ToMe's cap: a token of one half merges into one of the other half."""
    return max(0, (tokens - protected) // 2)
