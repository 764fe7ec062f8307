"""Plugins

A package of yours adds to fxprune through entry points of the group fxprune.plugins, named kind.name. The kinds are
criterion, rule, reducer, search, backend, pass and kind. In its pyproject.toml:

    [project.entry-points."fxprune.plugins"]
    "criterion.first" = "fxprune_example.criterion:First"
    "rule.fxprune_example" = "fxprune_example.rules"
    "reducer.crop" = "fxprune_example.reducer:Crop"
    "search.even" = "fxprune_example.search:even"
    "backend.mydevice" = "fxprune_example.backend:MyDevice"
    "pass.say-hello" = "fxprune_example.say_hello:SayHello"
    "kind.branch" = "fxprune_example.branch:BRANCH"

Then the names are there: --importance first, --tokens crop, --search even, --target mydevice, --prune ffn,branch,
--pipeline "..,say-hello{to=you},..". Nothing is imported before it is asked for; built-in names cannot be taken over; a
plugin that is broken is named where it matters and disturbs nobody else. `fxprune doctor` tries every plugin.

The files below are the whole package; tests install and run it.

A criterion (fxprune_example/criterion.py). It gets the program with its groups, and one non-negative tensor per
prunable group is its answer; `comparable = True` if scores of different groups may be compared.

    \"\"\"A criterion: one non-negative number per element.\"\"\"

    import torch
    from torch import Tensor

    from fxprune.extend import Calibration, Criterion, Program, prunable


    class First(Criterion):
        \"\"\"Early elements matter more: ``I[i] = size - i``. Unit: places.\"\"\"

        name = "first"
        unit = "places"

        def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
            return {g.name: torch.arange(g.size, 0, -1, dtype=torch.float64) for g in prunable(program)}

An op rule (rules.py), here for ops of the package itself (ops.py). The entry point is named after the namespace
of the ops (aten, torchvision, yours) and its value is the module. A rule returns the dimensions of the output, made
of those of the inputs: it may `w.unify(a, b)` what must agree, `w.contract` what is summed over, `w.freeze(dim,
why)` what must stay. When in doubt, freeze.

    \"\"\"Ops of one's own: what models call.\"\"\"

    import torch

    torch.library.define("fxprune_example::twist", "(Tensor x) -> Tensor")
    torch.library.define("fxprune_example::dense", "(Tensor x, Tensor weight) -> Tensor")


    @torch.library.impl("fxprune_example::twist", "CompositeImplicitAutograd")
    def twist(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


    @torch.library.impl("fxprune_example::dense", "CompositeImplicitAutograd")
    def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

and their rules. An op that multiplies by a weight says three things more: what it sums over (`w.contract`), what it
costs (`w.matmul`), and which argument is what (`declare`, a line in the table of ops). What it leaves out is named
in the report: "sliced but cannot be recovered: mylib::op at node". `declare` also takes a `Family`, for ops that
move elements or work element by element.

    \"\"\"Axis rules for the ops of one library: what their output's dimensions are made of.\"\"\"

    from fxprune.extend import Args, Dims, Product, Walk, declare, rule


    @rule("fxprune_example::twist")
    def twisted(w: Walk, a: Args) -> Dims:
        return list(a.x)  # element by element: every dimension is the input's


    @rule("fxprune_example::dense")
    def multiplied(w: Walk, a: Args) -> Dims:
        \"\"\"y[.., o] = x[.., i] weight[o, i]\"\"\"
        w.unify(a.x[-1], a.weight[1])
        w.contract(a.weight[1], ("x", len(a.x) - 1), ("weight", 1))  # summed over: criteria look here
        w.matmul(a.x[:-1], (), a.weight[1], a.weight[0], "linear")  # what it costs
        w.tag("produce", a.weight[0])
        return [*a.x[:-1], a.weight[0]]


    declare("fxprune_example::dense", Product("x", "weight"))  # recovery solves for it as it does for linear

A token reducer (reducer.py), with the op that it inserts: plain ATen with static counts, which every target takes.

    \"\"\"A token reducer, with the op that it inserts and that op's rule.\"\"\"

    from dataclasses import dataclass
    from typing import Any

    import torch
    from torch import Tensor

    from fxprune.extend import Reducer, check_counts, define, reduced, rule, sizes, unchanged


    def crop_tokens(x: Tensor, size: Tensor | None, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
        \"\"\"Drop the last ``r`` tokens. Static counts: (x', their sizes, every token's place or -1).\"\"\"
        tokens = x.shape[1]
        check_counts(tokens, r, protected, tokens - protected - 1)
        if r == 0:
            return unchanged(x, size)
        place = torch.arange(tokens, device=x.device)
        place = torch.where(place < tokens - r, place, -1).repeat(x.shape[0], 1)
        return x[:, : tokens - r].clone(), sizes(x, size)[:, : tokens - r].clone(), place


    def crop_macs(x: tuple[int, ...], size: tuple[int, ...] | None, r: int, protected: int) -> int:
        \"\"\"Nothing is multiplied.\"\"\"
        return 0


    SCHEMA = "(Tensor x, Tensor? size, int r, int protected) -> (Tensor, Tensor, Tensor)"
    define("crop_tokens", SCHEMA, crop_tokens, crop_macs)
    rule("fxprune::crop_tokens")(reduced)


    @dataclass(frozen=True)
    class Crop(Reducer):
        \"\"\"The last tokens go.\"\"\"

        name = "crop"
        merges = False

        def reduce(self, taps: Any, r: int) -> Any:
            return taps.op("crop_tokens", taps.x, taps.size, r, taps.protected)

A search (search.py). A ladder is one group's choice: `counts[i]` elements are worth `values[i]`. What exceeds the
limit is an error.

    \"\"\"A search: one rung per ladder, within the limit.\"\"\"

    from collections.abc import Sequence

    from fxprune.extend import Expression, Ladder, ledger_at


    def even(ladders: Sequence[Ladder], terms: Sequence[Expression], limit: float) -> list[int]:
        \"\"\"Every group keeps the same share of its rungs: the largest share that fits.\"\"\"
        for share in range(100, -1, -1):
            levels = [one.top * share // 100 for one in ladders]
            if ledger_at(terms, ladders, levels).total <= limit:
                return levels
        return [0] * len(ladders)

A backend (backend.py). What `lower` writes is run against the program before anyone gets it. What it needs of the
machine stands in `requires` (modules, "a CUDA GPU", "a C++ compiler"), for fxprune doctor.

    \"\"\"A backend: how a program becomes a file, and how that file runs.\"\"\"

    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar

    from fxprune.extend import Backend, Lowered, Program, Runner, eager, read_program, write_program


    @dataclass(frozen=True)
    class MyDevice(Backend):
        \"\"\"Here: a .pt2 under another name.\"\"\"

        name: ClassVar[str] = "mydevice"
        suffix: ClassVar[str] = ".mine.pt2"
        granularity: ClassVar[int] = 4

        def lower(self, program: Program, directory: Path) -> Lowered:
            path = self.payload(directory)
            write_program(program.exported, path)
            return Lowered(path, (path,), self.load(path))

        def load(self, payload: Path) -> Runner:
            return eager(read_program(payload))

A pass (say_hello.py), for --pipeline. An Analysis or Search leaves graph and weights alone; a Transform may change
them and drops the facts. The pipeline checks that, and verifies the program after every pass; what a plugin breaks is
a PluginError that names the plugin. Classes may be called as you like: names are those of the entry points.

    \"\"\"A pass, for --pipeline: a frozen dataclass with one method; its fields are its options.\"\"\"

    from dataclasses import dataclass

    from fxprune.extend import Analysis, Program


    @dataclass(frozen=True)
    class SayHello(Analysis):
        \"\"\"Leave a note in the report.\"\"\"

        to: str = "world"

        def run(self, program: Program) -> Program:
            return program.but(notes=(*program.notes, f"hello, {self.to}"))

A kind (branch.py): something that a search may choose, beside heads and neurons under one budget. It is a pair of
passes: one adds what there is of it to the program's groups, one carries out what the plan says. A `Switch` is a part
of the graph that is there or not: what lies `inside` costs nothing where it is gone, zeros at its `ends` are the same
as its absence (checked in every run), and `shares` are the groups that say what it is worth. A `Tie` holds groups to
one count. Both are scored, searched, planned, replayed, reported and explained like any group. Pipelines name the
passes after their classes.

    \"\"\"A kind of thing to choose: residual branches, ``x + f(x)``, that may go as a whole.\"\"\"

    from collections.abc import Iterator
    from dataclasses import dataclass

    import torch
    from torch.fx import Node

    from fxprune.extend import Analysis, Axis, Program, Switch, Transform, copy_graph, rebuild, with_macs

    ADD = torch.ops.aten.add.Tensor


    @dataclass(frozen=True)
    class FindBranches(Analysis):
        \"\"\"Add every residual branch to the program's groups.\"\"\"

        needs = ("axes", "groups")
        gives = ("groups",)

        def run(self, program: Program) -> Program:
            found = (part for node in program.graph.nodes for part in branches(program, node))
            return with_macs(program.but(groups=(*program.need("groups"), *found)))


    def branches(program: Program, add: Node) -> Iterator[Switch]:
        \"\"\"The branch that ``add`` adds to what it reads itself.\"\"\"
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
        \"\"\"``end`` and everything that is made for it alone.\"\"\"
        inside: set[Node] = {end} if set(end.users) == {add} else set()
        for node in reversed(end.graph.nodes):
            if node.users and set(node.users) <= inside:
                inside.add(node)
        return inside


    @dataclass(frozen=True)
    class DropBranches(Transform):
        \"\"\"Take out the branches that the plan says are gone: ``x + f(x)`` becomes ``x``.\"\"\"

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

Inside fxprune's own tree the same things are a file beside their like and one line in fxprune/registry.py (README,
"The code").
"""
