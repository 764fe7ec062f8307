"""Mixtures of experts: which scores send rows to which expert's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from ...ir.dataflow import MOVES, Family, bind, family, op_name

GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")
OFFSETS = ("offs", "offset", "offsets")  # arguments that say where each expert's rows end
THROUGH = MOVES | {Family.CAST, Family.COPY, Family.SAME}


@dataclass(frozen=True)
class Routing:
    """Rows go to the experts with the ``count`` largest scores, sorted by expert; offsets say where each one's end.

    top      the ``topk`` that chooses;  scores: what it reads, [.., experts]
    masked   the node that reads the scores where an expert is gone when they are minus infinity: the softmax before
             the choice, else the choice itself
    counted  the node that counts each expert's rows (``histc``), experts in number;  offsets: their running sum
    ids      the number of the expert of every row, in the order of the products' rows
    tables   look-ups by the numbers of the chosen experts: of a row each, or (``gather``) among all along the last dim
    nodes    those at which the experts' dim may shrink: every value is made of those of the experts that stay
    """

    top: Node
    scores: Node
    masked: Node
    counted: Node
    offsets: Node
    ids: Node
    tables: tuple[Node, ...]
    nodes: frozenset[str]

    @property
    def count(self) -> int:
        found = bind(self.top)["k"]
        assert isinstance(found, int)
        return found


def routing_of(offsets: object) -> Routing | None:
    """What leads to the offsets of a grouped product; None where it is not this:

    ``cumsum(histc(ids, experts, 0, experts - 1))`` of ``ids = sort(topk(scores).indices)``, where nothing but look-ups
    else reads the numbers of experts
    """
    counted = _source(offsets, "cumsum")
    ids = None if counted is None or op_name(counted) != "histc" else _back(bind(counted)["self"])
    order = None if ids is None else _item(ids, "sort", 0)
    top = None if order is None else _item(_back(bind(order)["self"]), "topk", 1)
    if not isinstance(offsets, Node) or counted is None or ids is None or order is None or top is None:
        return None
    scores, size, bins = bind(top)["self"], ids.meta["val"].dim(), bind(counted)
    if not isinstance(scores, Node) or not _over_last(top, scores) or not bind(top).get("largest", True):
        return None
    experts = scores.meta["val"].shape[-1]
    tables = _tables(top, counted)
    if size != 1 or tables is None or (bins["bins"], bins["min"], bins["max"]) != (experts, 0, experts - 1):
        return None
    before = _back(scores)
    soft = before if family(before) is Family.SOFTMAX and _over_last(before, before) else None
    inside = {top, counted, offsets, order, *tables, *([soft] if soft is not None else [])}
    return Routing(top, scores, soft or top, counted, offsets, ids, tuple(tables), frozenset(n.name for n in inside))


def products_of(graph: Graph) -> dict[str, tuple[Routing, list[Node]]]:
    """Name of the choice -> its routing and the grouped products by it, in the order of the graph."""
    found: dict[str, tuple[Routing, list[Node]]] = {}
    for node in graph.nodes:
        if op_name(node) in GROUPED:
            routing = routing_of(next((n for n in map(bind(node).get, OFFSETS) if isinstance(n, Node)), None))
            if routing is not None:
                found.setdefault(routing.top.name, (routing, []))[1].append(node)
    return found


def _tables(top: Node, counted: Node) -> list[Node] | None:
    """Look-ups by the numbers of the chosen experts, of a row each (biases) or among all (their weights). None where
    these numbers are read in another way: they are others once experts are gone."""
    pending = [user for user in top.users if op_name(user) == "getitem" and user.args[1] == 1]
    found, seen = list[Node](), set(pending)
    while pending:
        ids = pending.pop()
        for user in ids.users:
            if op_name(user) == "sort":
                more = [u for u in user.users if op_name(u) == "getitem" and u.args[1] == 0]
            elif family(user) in THROUGH:
                more = [user]
            elif _looks_up(user, ids):
                more, found = [], [*found, user]
            elif user is counted:
                more = []
            else:
                return None
            pending += [u for u in more if u not in seen]
            seen.update(more)
    return found


def _looks_up(user: Node, ids: Node) -> bool:
    args = bind(user)
    if op_name(user) == "index":
        return isinstance(args["self"], Node) and list(args["indices"]) == [ids]
    return op_name(user) == "gather" and args["index"] is ids and _over_last(user, ids)


def _over_last(node: Node, like: Node) -> bool:
    """Whether an op goes along the last dim of a tensor."""
    dim = bind(node).get("dim", -1)
    return isinstance(dim, int) and dim in (-1, like.meta["val"].dim() - 1)


def _source(node: object, op: str) -> Node | None:
    """What such an op at ``node`` reads."""
    if not isinstance(node, Node) or op_name(_back(node)) != op:
        return None
    found = bind(_back(node)).get("self")
    return _back(found) if isinstance(found, Node) else None


def _item(node: Node, op: str, number: int) -> Node | None:
    """The op with several results of which ``node`` is one."""
    source = node.args[0] if op_name(node) == "getitem" and node.args[1] == number else None
    return source if isinstance(source, Node) and op_name(source) == op else None


def _back(node: Node) -> Node:
    """What a value is a view or a cast of."""
    while node.op == "call_function" and family(node) in THROUGH and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
