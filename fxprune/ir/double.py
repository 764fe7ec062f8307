"""A program in fp64: what it computes when rounding is out of the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from .program import Program
from .rebuild import copy_graph, rebuild

WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    torch.complex64: torch.complex128,
}
ROUNDINGS = 4  # two exact forms of one computation round differently; by more than so many times, they are not one


def in_double(program: Program) -> Program:
    """``program`` with floating weights, constants and casts in fp64, for its graph to be run node by node.

    Its facts hold as before; fake values keep their old dtypes, so no pass may run on it. Costs a copy of the weights.
    """
    module = copy_graph(program.exported)
    parts = [part for part in module.modules() if isinstance(part, GraphModule)]
    for part in parts:
        for node in list(part.graph.nodes):
            if "_assert_tensor_metadata" in str(node.target):
                part.graph.erase_node(node)
                continue
            node.args = pytree.tree_map_only(torch.dtype, _wider, node.args)
            node.kwargs = pytree.tree_map_only(torch.dtype, _wider, node.kwargs)
    exported, tensors = program.exported, {id(t): widen(t) for t in program.tensors.values()}

    def twin(value: Any) -> Any:
        return tensors.get(id(value), value)

    return program.but(
        exported=rebuild(
            exported,
            module,
            state_dict={k: twin(t) for k, t in exported.state_dict.items()},
            constants={k: twin(t) for k, t in exported.constants.items()},
        )
    )


def run_nodes(program: Program, flat: Sequence[Any]) -> list[Any]:
    """Outputs (flat) of the program's graph on user inputs ``flat`` in graph order, node by node."""
    with torch.no_grad():
        run = Interpreter(program.exported.graph_module).run
        return list(pytree.tree_leaves(run(*program.arguments(flat))))


def exactly(program: Program, flat: Sequence[Any]) -> list[Any] | None:
    """Outputs (flat) of ``program`` computed in fp64; None where an op of it knows no fp64."""
    try:
        return run_nodes(in_double(program), [widen(value) for value in flat])
    except Exception:  # whatever torch says of a dtype that a kernel does not have
        return None


def within_rounding(got: Sequence[Any], own: Sequence[Any], exact: Sequence[Any] | None, limit: float) -> bool:
    """Whether ``got`` is as near to ``exact``, what fp64 gives, as ``own`` is, what the program gives in its own types.

    As near: within ``limit``, relative to the largest magnitude, or within ROUNDINGS times the error of ``own``. A
    model that does not keep ``limit`` itself says nothing about whoever differs from it by that much.
    """
    if exact is None or not len(got) == len(own) == len(exact):
        return False
    trios = [trio for trio in zip(got, own, exact, strict=True) if all(isinstance(t, Tensor) for t in trio)]
    if any(not g.shape == o.shape == e.shape for g, o, e in trios):
        return False
    return all(_off(g, e) <= max(limit * (e.is_floating_point()), ROUNDINGS * _off(o, e)) for g, o, e in trios)


def _off(one: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest magnitude; the share of values that differ where they are counts."""
    if not exact.numel():
        return 0.0
    if not (exact.is_floating_point() or exact.is_complex()):
        return float((one != exact).double().mean())
    gap = (widen(one) - exact).abs()
    gap = torch.where(one.isnan() & exact.isnan() | (widen(one) == exact), 0.0, gap)
    off = gap.max() / exact.abs().nan_to_num(0, 0, 0).max().clamp_min(torch.finfo(one.dtype).tiny)
    return float("inf") if bool(off.isnan()) else float(off)


def widen(value: Any) -> Any:
    """A tensor in fp64 where it is of a shorter floating type; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype not in WIDE:
        return value
    wide = value.detach().to(WIDE[value.dtype])
    return torch.nn.Parameter(wide, requires_grad=False) if isinstance(value, torch.nn.Parameter) else wide


def _wider(dtype: torch.dtype) -> torch.dtype:
    return WIDE.get(dtype, dtype)
