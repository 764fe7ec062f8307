"""The coupling graph as a picture: which groups reach which parameters, as ``.svg`` or ``.dot``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from ..errors import OptionError
from ..ir.group import Kind, PruneGroup
from ..ir.program import Program
from ..process.files import write_error

if TYPE_CHECKING:
    import networkx as nx

COLOURS: dict[str, str] = {
    Kind.HEAD: "#4c78a8",
    Kind.KV: "#4c78a8",
    Kind.QUERY: "#4c78a8",
    Kind.QK: "#72b7b2",
    Kind.V: "#72b7b2",
    Kind.QKV: "#72b7b2",
    Kind.FFN: "#f58518",
    Kind.CHANNEL: "#54a24b",
    Kind.WIDTH: "#b279a2",
    Kind.EXPERT: "#e45756",
}
OTHER, FROZEN = "#9d9d9d", "#d0d0d0"
ROW, LETTER = 18.0, 6.6  # pixels: one line of text, one letter of 11 px monospace


def coupling_graph(program: Program) -> nx.Graph:
    """Groups and parameters as nodes, an edge where a group's elements index a dimension of a parameter.

    Nodes are ``("group", name)`` and ``("parameter", name)``; groups carry ``group``, edges ``dimensions``.
    """
    import networkx as nx

    graph = nx.Graph()
    groups = [g for g in program.need("groups") if g.size > 1]
    reached = {s.parameter for g in groups for s in g.slots}
    graph.add_nodes_from(("parameter", name) for name in program.tensor_of_placeholder.values() if name in reached)
    for group in groups:
        graph.add_node(("group", group.name), group=group)
        for slot in group.slots:
            key = (("group", group.name), ("parameter", slot.parameter))
            dimensions = {*graph.get_edge_data(*key, {"dimensions": ()})["dimensions"], slot.position}
            graph.add_edge(*key, dimensions=tuple(sorted(dimensions)))
    return graph


def draw(program: Program, path: str | os.PathLike[str]) -> None:
    """Write the coupling graph to ``path``; the suffix decides between .svg and .dot. Raises OptionError on another."""
    path = Path(path)
    writers = {".svg": to_svg, ".dot": to_dot}
    if path.suffix not in writers:
        raise OptionError("the graph can be drawn as .svg or .dot", where=str(path))
    text = writers[path.suffix](coupling_graph(program), program.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error


def to_dot(graph: nx.Graph, title: str) -> str:
    """The graph in graphviz's language."""
    lines = [f"graph {_quote(title)} {{", "  rankdir=LR; node [shape=box, fontname=monospace, fontsize=10];"]
    for node in graph.nodes:
        group = graph.nodes[node].get("group")
        if group is None:
            lines.append(f"  {_quote('/'.join(node))} [label={_quote(node[1])}];")
        else:
            lines.append(
                f"  {_quote('/'.join(node))} [label={_quote(_label(group))}, style=filled, "
                f"fillcolor={_quote(_colour(group))}, tooltip={_quote(group.frozen or 'prunable')}];"
            )
    for one, two, facts in graph.edges(data=True):
        group, parameter = (one, two) if one[0] == "group" else (two, one)
        lines.append(
            f"  {_quote('/'.join(group))} -- {_quote('/'.join(parameter))} [label={_quote(_dimensions(facts))}];"
        )
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(graph: nx.Graph, title: str) -> str:
    """Three columns: prunable groups, the parameters they reach, frozen groups. In graph order, so edges stay short."""
    columns = _columns(graph)
    width = [max((len(_text(graph, n)) for n in column), default=0) * LETTER + 16 for column in columns]
    gap = 140.0
    left = [12.0, 12 + width[0] + gap, 12 + width[0] + width[1] + 2 * gap]
    heights = _place(graph, columns)
    place = {node: (left[c], heights[node]) for c, column in enumerate(columns) for node in column}
    bottom = max(heights.values(), default=0.0) + 2 * ROW
    right = left[2] + width[2] + 12
    edges, boxes = [], []
    for one, two, facts in graph.edges(data=True):
        (x0, y0), (x1, y1) = sorted((place[one], place[two]))
        group = graph.nodes[one if one[0] == "group" else two]["group"]
        x0 += width[0] if x0 == left[0] else width[1]
        middle, dash = (x0 + x1) / 2, ' stroke-dasharray="3 3"' if group.frozen else ""
        edges.append(
            f'<path d="M{x0:.0f} {y0:.0f} C{middle:.0f} {y0:.0f} {middle:.0f} {y1:.0f} {x1:.0f} {y1:.0f}" '
            f'stroke="{_colour(group)}"{dash}><title>{escape(_dimensions(facts))}</title></path>'
        )
    for c, column in enumerate(columns):
        for node in column:
            x, y = place[node]
            group = graph.nodes[node].get("group")
            fill = "#f6f6f6" if group is None else _colour(group)
            ink = "#fff" if group is not None and not group.frozen else "#222"
            tip = node[1] if group is None else f"{_label(group)}: {group.frozen or 'prunable'}"
            boxes.append(
                f'<g><title>{escape(tip)}</title><rect x="{x:.0f}" y="{y - 7.5:.0f}" width="{width[c]:.0f}" '
                f'height="15" rx="4" fill="{fill}" stroke="#bbb"/><text x="{x + 8:.0f}" y="{y + 3.5:.1f}" '
                f'fill="{ink}">{escape(_text(graph, node))}</text></g>'
            )
    heads = "".join(
        f'<text x="{x:.0f}" y="40" font-weight="bold">{word}</text>'
        for x, word in zip(left, ("prunable groups", "parameters", "frozen groups"), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right:.0f}" height="{bottom:.0f}" '
        f'viewBox="0 0 {right:.0f} {bottom:.0f}" font-family="monospace" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="12" y="18" font-size="13">{escape(title)}: '
        f'what is pruned together</text>{heads}\n<g fill="none" stroke-opacity="0.6">\n'
        + "\n".join(edges)
        + "\n</g>\n"
        + "\n".join(boxes)
        + "\n</svg>\n"
    )


def _columns(graph: nx.Graph) -> tuple[list[Any], list[Any], list[Any]]:
    groups = [(n, facts["group"]) for n, facts in graph.nodes(data=True) if n[0] == "group"]
    parameters = [n for n in graph if n[0] == "parameter"]  # in the order of the graph
    return [n for n, g in groups if not g.frozen], parameters, [n for n, g in groups if g.frozen]


def _place(graph: nx.Graph, columns: tuple[list[Any], list[Any], list[Any]]) -> dict[Any, float]:
    """Height of every node: parameters in rows, groups at the mean of what they reach, pushed apart."""
    top = 60.0
    height = {node: top + i * ROW for i, node in enumerate(columns[1])}
    for column in (columns[0], columns[2]):
        wish = {n: sum(height[p] for p in graph[n]) / max(1, graph.degree(n)) for n in column}
        last = top - ROW
        for node in sorted(column, key=lambda n: wish[n]):
            last = height[node] = max(wish[node], last + ROW)
    return height


def _text(graph: nx.Graph, node: Any) -> str:
    group = graph.nodes[node].get("group")
    return node[1] if group is None else _label(group)


def _label(group: PruneGroup) -> str:
    return f"{group.name}  {group.size}"


def _colour(group: PruneGroup) -> str:
    return FROZEN if group.frozen else COLOURS.get(str(group.kind), OTHER)


def _dimensions(facts: Any) -> str:
    return ", ".join(f"[{position}]" for position in facts["dimensions"])


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'
