"""Running an op on a graph's fake tensors: what it gives, without computing it and without tying open sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from ..errors import InternalError
from ..ops.library import OPS
from .guards import listen_to_guards

if TYPE_CHECKING:
    import sympy

ASKED = "fxprune_asked"  # key in a graph module's meta: the conditions on sizes by which torch chose kernels


def run_fake(graph: Graph, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """What ``target`` gives on fake tensors that belong to ``graph``.

    Composite ops and kernels are chosen by size while it runs: a convolution takes another kernel from 16 samples on.
    Such a choice changes nothing that is computed, but torch would keep it as a condition of the program, for good and
    for every program that shares its symbols. It is answered and not kept; :func:`collect_size_conditions` remembers
    it. A result whose shape depends on the choice is for the caller to hold against the shape that it predicts.

    The python dispatcher is on because composite ops would otherwise take a path that ties symbols to the example's.
    """
    mode = fake_mode_of(graph)
    outline = _outline_of(target)
    if outline is not None:
        with mode:
            return outline(**dict(zip((a.name for a in target._schema.arguments), args, strict=False)), **kwargs or {})
    env, asked = mode.shape_env, collect_size_conditions(graph)
    with (
        mode,
        enable_python_dispatcher(),
        nullcontext() if env is None else env.suppress_guards(),
        listen_to_guards(lambda condition: _remember(asked, condition)),
    ):
        return target(*args, **kwargs or {})


def _outline_of(target: Any) -> Callable[..., Any] | None:
    """What gives the results of one of our own ops without their values, where it says so."""
    op = OPS.get(target._schema.name) if isinstance(target, OpOverload) else None
    return None if op is None else op.outline


def collect_size_conditions(graph: Graph) -> dict[str, sympy.Basic]:
    """The conditions on sizes, by their text, by which kernels were chosen when ops of this graph ran on fakes."""
    module = graph.owning_module
    asked: dict[str, sympy.Basic] = {} if module is None else module.meta.setdefault(ASKED, {})
    return asked


def _remember(asked: dict[str, sympy.Basic], condition: sympy.Basic) -> None:
    asked[str(condition)] = condition


def run_node(node: Node) -> Any:
    """What ``node`` gives on the fake values of its inputs."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return run_fake(node.graph, node.target, args, kwargs)


def infer(node: Node) -> None:
    """Fill in ``meta["val"]`` of a node that a transform made or edited, from its inputs' fake tensors."""
    node.meta["val"] = run_node(node)
    node.meta.pop("tensor_meta", None)


def fake_mode_of(graph: Graph) -> FakeTensorMode:
    """The mode that the graph's fake tensors belong to. Raises InternalError when there are none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise InternalError("the program has no tensors")
