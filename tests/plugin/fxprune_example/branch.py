"""A kind of thing to choose: residual branches, ``x + f(x)``, that may go as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxprune.extend import Analysis, Axis, Program, Switch, Transform, copy_graph, rebuild, with_macs

ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class FindBranches(Analysis):
    """Add every residual branch to the program's groups."""

    needs = ("axes", "groups")
    gives = ("groups",)

    def run(self, program: Program) -> Program:
        found = (part for node in program.graph.nodes for part in branches(program, node))
        return with_macs(program.but(groups=(*program.need("groups"), *found)))


def branches(program: Program, add: Node) -> Iterator[Switch]:
    """The branch that ``add`` adds to what it reads itself."""
    nodes = [a for a in add.args[:2] if isinstance(a, Node) and a.op == "call_function" and add.target is ADD]
    for stream, end in zip(nodes, reversed(nodes), strict=True):
        inside = only_for(end, add)
        names, bound = frozenset(n.name for n in inside), program.tensor_of_placeholder
        reads = any(user in inside for user in stream.users) and names & bound.keys()
        if not reads or stream.meta["val"].shape != add.meta["val"].shape:
            continue
        last = [bound[n.name] for n in program.placeholders() if n.name in names][-1]
        shares = tuple(g.name for g in program.need("groups") if g.prunable and g.within(names))
        yield Switch(
            name=last.rpartition(".")[0] + ":branch",
            kind="branch",
            axis=Axis(1, "branch"),
            inside=names,
            ends=(end.name,),
            shares=shares,
            frozen="" if shares else "nothing in it has a score",
        )


def only_for(end: Node, add: Node) -> set[Node]:
    """``end`` and everything that is made for it alone."""
    inside: set[Node] = {end} if set(end.users) == {add} else set()
    for node in reversed(end.graph.nodes):
        if node.users and set(node.users) <= inside:
            inside.add(node)
    return inside


@dataclass(frozen=True)
class DropBranches(Transform):
    """Take out the branches that the plan says are gone: ``x + f(x)`` becomes ``x``."""

    needs = ("groups", "plan")

    def run(self, program: Program) -> Program:
        graph_module, plan = copy_graph(program.exported), program.need("plan")
        nodes = {n.name: n for n in graph_module.graph.nodes}
        for part in program.need("groups"):
            if isinstance(part, Switch) and part.kind == "branch" and not len(plan.kept(part)):
                (add,) = nodes[part.ends[0]].users
                add.replace_all_uses_with(next(a for a in add.args if a is not nodes[part.ends[0]]))
                graph_module.graph.erase_node(add)
                for node in (n for n in reversed(list(graph_module.graph.nodes)) if n.name in part.inside):
                    graph_module.graph.erase_node(node)
        return program.without_facts(exported=rebuild(program.exported, graph_module))


BRANCH = (FindBranches, DropBranches)
