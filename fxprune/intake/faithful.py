"""Is the captured graph the module? Both run on the same inputs; where they part is found, and stops the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from ..errors import CaptureError, FxpruneError, VerifyError
from ..ir.agreement import compare, relative_error, seeded, tolerance_of, why_random
from ..ir.double import exactly, run_nodes, within_rounding
from ..ir.program import Program
from ..ir.proof import Link
from ..ir.signature import DRAWS, all_other, dim_names, find_refusal, input_sizes, input_values, sample_inputs
from .containers import plain
from .diagnose import first_line
from .evaluation import evaluation_form, own_inputs, unwrap

COMPARED = "the module and its captured graph"
SEED = 0


def compare_with_module(model: nn.Module, program: Program) -> tuple[Link, list[str]]:
    """(how near ``program`` is to ``model`` on the example inputs and at another value of every open size, notes).

    The module runs as it is; its random numbers are drawn alike. What could not be compared is told in the notes: a
    module that draws others than its graph, or that does not take inputs that are drawn.

    Raises CaptureError with the largest difference, and the submodule where it starts.
    """
    words, notes, tried, worst = dim_names(program), list[str](), list[Mapping[str, int]](), 0.0
    for sizes, draws in _inputs(program):
        named = {words[s]: n for s, n in sizes.items()}
        label = ", ".join(f"{k}={v}" for k, v in named.items())
        try:
            error, said = _first_that_runs(model, program, draws, label if tried else "the example inputs")
        except _DoesNotRun as failure:
            if not tried:
                raise CaptureError(
                    "the model fails on the example inputs", where=program.name, why=str(failure)
                ) from failure
            notes.append(f"the graph was not compared with the model at {label}: {failure}")
            continue
        notes += said
        worst = max(worst, error)
        tried.append(named)
    return Link(COMPARED, worst, tolerance_of(program), tuple(tried)), notes


def _first_that_runs(
    model: nn.Module, program: Program, draws: Sequence[list[Any]], label: str
) -> tuple[float, list[str]]:
    """:func:`difference` on the first of several draws of inputs that the model takes. Raises _DoesNotRun with what it
    says of the first of them."""
    failure: _DoesNotRun | None = None
    for flat in draws:
        args, kwargs = pytree.tree_unflatten(flat, program.exported.call_spec.in_spec)
        try:
            return difference(model, program, args, kwargs, label)
        except _DoesNotRun as error:
            failure = failure or error
    assert failure is not None
    raise failure


def compare_on_data(
    model: Any, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Link, ...], list[str]]:
    """(how near ``program`` is to ``model`` on samples of the user's data, notes). Nothing where the model is a program
    itself, or where the samples cannot be run. Raises CaptureError as :func:`compare_with_module` does."""
    if not isinstance(model, nn.Module):
        return (), []
    try:
        error, notes = difference(unwrap(model), program, args, kwargs, "the first samples of the data")
    except (_DoesNotRun, FxpruneError) as failure:
        if isinstance(failure, CaptureError):
            raise
        return (), []  # what the data lacks is told where it is used
    return (Link(f"{COMPARED}, on the data", error, tolerance_of(program)),), notes


class _DoesNotRun(Exception):
    """One of the two does not run on these inputs, so that nothing can be compared."""


def difference(
    model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], label: str
) -> tuple[float, list[str]]:
    """(largest difference of an output relative to its magnitude, notes) on one set of inputs."""
    flat = [v.detach().clone() if isinstance(v, Tensor) else v for v in program.flatten(args, kwargs)]
    with evaluation_form(model):
        want = _call(model, args, kwargs)
        try:
            with seeded(SEED):
                got = by_name(program, run_nodes(program, flat))
        except Exception as error:
            raise _DoesNotRun(f"the graph says: {first_line(error)}") from error
        said = {n: "the model or its graph lacks it" for n in sorted(set(got) ^ set(want))}
        said |= {n: "the model returns only NaN" for n in got.keys() & want.keys() if _only_nan(want[n])}
        shared = [name for name in got if name not in said]
        notes = [f"{name} was not compared with the model at {label}: {why}" for name, why in said.items()]
        try:
            for name in shared:
                _compare(got[name], want[name], tolerance_of(program), name, label)
        except VerifyError as failed:
            why = _no_defect(model, program, args, kwargs, flat, [(n, got[n], want[n]) for n in shared])
            if not why:
                raise _unfaithful(model, program, args, kwargs, flat, failed) from None
            return 0.0, [*notes, f"the graph could not be compared with the model at {label}: {why}"]
    return relative_error([got[n] for n in shared], [want[n] for n in shared]), notes


def _compare(got: Tensor, want: Tensor, limit: float, name: str, label: str) -> None:
    compare(got, want, limit, what="the captured graph", where=name, label=label, reference="the model itself")


def _only_nan(value: Tensor) -> bool:
    return value.numel() > 0 and bool(value.isnan().all())


def _no_defect(
    model: nn.Module,
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: Sequence[Any],
    outputs: Sequence[tuple[str, Tensor, Tensor]],
) -> str:
    """Why outputs (name, the graph's, the model's) that differ say nothing; empty where they show that the graph is
    another computation."""
    limit, (random, _) = tolerance_of(program), why_random(program)
    if random:
        return random
    again = _call(model, args, kwargs)
    if relative_error([again[n] for n, _, _ in outputs], [want for _, _, want in outputs]) > limit:
        return "two calls of it with the same inputs and the same seed differ"
    exact = exactly(program, flat)
    if exact is None:
        return ""
    named = by_name(program, exact)
    got, want, fp64 = zip(*((got, want, named[n]) for n, got, want in outputs), strict=True)
    return "they differ by rounding, as both do from what fp64 gives" if within_rounding(want, got, fp64, limit) else ""


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that the module returns, by name. Raises _DoesNotRun with what it says."""
    positional, keyword = own_inputs(args, kwargs)
    try:
        with seeded(SEED):
            returned = model(*positional, **keyword)
    except Exception as error:
        raise _DoesNotRun(f"the model says: {first_line(error) or type(error).__name__}") from error
    return _name_tensors(plain(returned, []))


def by_name(program: Program, flat: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors among a graph's outputs by their place in what the user gets."""
    spec = program.exported.call_spec.out_spec
    return _name_tensors(pytree.tree_unflatten(list(flat)[len(flat) - spec.num_leaves :], spec))


def _name_tensors(value: Any) -> dict[str, Tensor]:
    paths, _ = pytree.tree_flatten_with_path(value)
    return {f"output{pytree.keystr(path)}": leaf for path, leaf in paths if isinstance(leaf, Tensor)}


def _inputs(program: Program) -> list[tuple[dict[str, int], list[list[Any]]]]:
    """(sizes by symbol, draws of user inputs): at most two samples of the example, and drawn ones of other sizes."""
    hints = input_sizes(program)
    batch = {str(v.shape[0]) for v in input_values(program) if isinstance(v, Tensor) and v.dim()} & hints.keys()
    few = {s: min(2, hints[s]) for s in batch}
    if find_refusal(program, {**hints, **few}) is not None:  # samples that belong together: the frames of a clip
        few = {s: hints[s] for s in batch}
    rows = [
        example.narrow(0, 0, few[str(value.shape[0])])
        if isinstance(example, Tensor) and example.dim() and str(value.shape[0]) in few
        else example
        for value, example in zip(input_values(program), pytree.tree_leaves(program.example_inputs), strict=True)
    ]
    found = [({**hints, **few}, [rows])]
    if hints:
        other = all_other(program)
        small = {**other, **{s: 3 for s in batch}}
        sizes = other if find_refusal(program, small) is not None else small
        found.append((sizes, [sample_inputs(program, sizes, SEED, draw) for draw in DRAWS]))
    return found


def _unfaithful(
    model: nn.Module,
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: Sequence[Any],
    failed: VerifyError,
) -> CaptureError:
    try:
        start = where_it_starts(model, program, args, kwargs, flat)
    except Exception:  # an explanation that fails must not hide what it explains
        start = ""
    return CaptureError(
        "the captured graph does not compute what the model computes",
        where=f"{failed.where}" + (f"; it starts in {start}" if start else ""),
        why=f"{failed.why}. The code of the model takes another way while it is traced",
        cure="look there for code that asks whether it is traced or compiled, or keeps things from earlier calls; pass "
        "explicitly what it decides (a mask), or export it yourself and pass the ExportedProgram",
    )


def where_it_starts(
    model: nn.Module, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], flat: Sequence[Any]
) -> str:
    """The first submodule, in the order in which they finish, whose output is another in the graph; "" if none is."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name not in outputs:
                outputs[name] = [t.detach().clone() for t in pytree.tree_leaves(plain(output, [])) if _floats(t)]

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    try:
        _call(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    leaving = _leaving(program)
    recorder = _Recorder(program, {node for nodes in leaving.values() for node in nodes})
    with torch.no_grad(), seeded(SEED):
        recorder.run(*program.arguments([v.detach().clone() if isinstance(v, Tensor) else v for v in flat]))
    limit, kinds = tolerance_of(program), {name: type(m).__name__ for name, m in model.named_modules()}
    for name, want in outputs.items():
        got = [recorder.values[n] for n in leaving.get(name, ()) if n in recorder.values]
        if len(got) != len(want) or not want or any(g.shape != w.shape for g, w in zip(got, want, strict=True)):
            continue  # what leaves it in the graph cannot be told apart
        if relative_error(got, want) > limit:
            return f"'{name}' ({kinds[name]})"
    return ""


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaving(program: Program) -> dict[str, list[Node]]:
    """Submodule -> the nodes of its first call whose values are read outside it, in graph order."""
    inside = {
        node: {path for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items() if "@" not in str(key)}
        for node in program.graph.nodes
    }
    found: dict[str, list[Node]] = {}
    for node, paths in inside.items():
        for path in paths:
            if any(path not in inside[user] for user in node.users) and _floats(node.meta.get("val")):
                found.setdefault(path, []).append(node)
    return found


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, program: Program, wanted: set[Node]) -> None:
        super().__init__(program.exported.graph_module)
        self.wanted, self.values = wanted, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value.clone()
        return value
