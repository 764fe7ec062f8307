"""Half precision as part of the graph: every cast is written down, so that it can be run and checked anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ...errors import OptionError
from ...ir.dataflow import MULTIPLIES, NORMS, Family, family
from ...ir.fake_run import run_node
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild

aten = torch.ops.aten

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
WIDE = NORMS | {Family.STEEP, Family.SUM, Family.MEAN, Family.VARIANCE, Family.NORM, Family.CUMULATE, Family.DISTANCE}
WIDE |= {Family.REDUCE}
"""Computed in float32, and so is what reads nothing else: sums lose digits and squares overflow. What a norm gives is
rounded at once: what follows moves half the bytes."""
NARROW = MULTIPLIES | {Family.ATTENTION, Family.TABLE}
"""Computed in half precision: what the hardware is fast at, and where the weights are."""
FILLS = frozenset({Family.FILL, Family.ADD, Family.LIKE, Family.CREATE, Family.SCATTER, Family.PAD})
"""A number beyond the range stands for "as far as it goes" here; as a factor it would mean something else."""
SPATIAL = frozenset({Family.CONVOLUTION, Family.POOL, Family.RESAMPLE})
"""What stays float32 on request."""


@dataclass(frozen=True)
class CastFloats(Transform):
    """float32 becomes ``dtype`` where that is safe; inputs and outputs stay as the caller knows them.

    Products and convolutions read and write ``dtype``; norms, sums, powers and roots are computed in float32; all
    else follows its inputs, and takes ``dtype`` where they differ. Created constants (positions, masks) stay float32
    until something in ``dtype`` reads them. Where no data went into them (a mask's -3e38), finite values beyond its
    range become half of its largest, so that two masks may be added; data that is too large becomes infinite, and is
    not hidden. Factors beyond the range are multiplied by in float32.
    Weights that are read in ``dtype`` only are stored so. Programs without float32 stay as they are.

    dtype    ``float16`` or ``bfloat16``
    spatial  False: convolutions, pooling and interpolation stay float32 (ONNX knows them in bfloat16 from opset 22 on)
    """

    dtype: str = "float16"
    spatial: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"floats cannot be cast to '{self.dtype}'", where="cast-floats", cure=" or ".join(DTYPES))

    def run(self, program: Program) -> Program:
        return _Casting(program, DTYPES[self.dtype], self.slug(), self.spatial).finish()


class _Casting:
    """One walk over a copy of the graph; every node's dtype is settled before those that read it."""

    def __init__(self, program: Program, dtype: torch.dtype, by: str, spatial: bool) -> None:
        self.program, self.dtype, self.by, self.spatial = program, dtype, by, spatial
        self.largest = torch.finfo(dtype).max
        self.module = copy_graph(program.exported)
        self.graph = self.module.graph
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        lifted = program.exported.graph_signature.inputs_to_lifted_tensor_constants
        self.constant = {n for n in self.graph.nodes if n.op == "placeholder" and n.name in lifted}  # no data in them
        self.changed = False

    def finish(self) -> Program:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._settle(node)
            elif node.op == "output":
                self._restore_outputs(node)
        state, constants = self._store_narrow()
        if not self.changed:
            return self.program
        exported = rebuild(self.program.exported, self.module, state_dict=state, constants=constants)
        return self.program.without_facts(exported=exported)

    def _settle(self, node: Node) -> None:
        before = _dtypes(node)
        reads = [n for n in node.all_input_nodes if _is_float(n, self.dtype)]
        if all(n in self.constant for n in reads):
            self.constant.add(node)
        if not reads:
            return  # integers, and constants that are created: both stay
        does = family(node)
        if does in WIDE or self._stays_wide(node, does):
            wanted = torch.float32
        elif does in NARROW or any(_dtypes(n)[0] == self.dtype for n in reads if n.op != "placeholder"):
            wanted = self.dtype
        else:
            wanted = torch.float32 if all(_dtypes(n)[0] == torch.float32 for n in reads) else self.dtype
        for read in reads:
            if _dtypes(read)[0] != wanted and not isinstance(read.meta["val"], list | tuple):
                node.replace_input_with(read, self._cast(read, wanted, node))
        if wanted is self.dtype:
            self._clamp_numbers(node)
        if torch.float32 in before or self.dtype in before:
            self._refresh(node)
        rounds = does in NORMS and isinstance(node.meta["val"], Tensor)
        if rounds and torch.float32 in _dtypes(node) and torch.float32 in before:
            self._round(node)

    def _cast(self, source: Node, dtype: torch.dtype, reader: Node) -> Node:
        """``source`` in ``dtype``; made once, right behind it."""
        made = self.casts.get((source, dtype))
        if made is None:
            place = source
            if source.op == "placeholder":  # behind the last of them: a graph's inputs stand together
                place = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            value = source
            if dtype is self.dtype and source in self.constant:
                limits = (-self.largest / 2, self.largest / 2)
                value = place = self._emit(place, reader, aten.clamp.default, source, *limits)
            made = self._emit(place, reader, aten.to.dtype, value, dtype)
            self.casts[source, dtype] = made
        return made

    def _stays_wide(self, node: Node, does: Family | None) -> bool:
        """Whether the node stays float32: for a factor that is out of range, or because it was asked for."""
        numbers = any(self._beyond(v) for v in pytree.tree_leaves((node.args, node.kwargs)))
        return (numbers and does not in FILLS) or (not self.spatial and does in SPATIAL)

    def _beyond(self, value: Any) -> bool:
        return isinstance(value, float) and self.largest < abs(value) < float("inf")

    def _emit(self, place: Node, origin: Node, target: Any, *args: Any) -> Node:
        """A node behind ``place`` with the source line of ``origin``."""
        with self.graph.inserting_after(place):
            node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta["fxprune_pass"] = self.by
        value = args[0].meta["val"]
        node.meta["val"] = value.to(args[1]) if target is aten.to.dtype else value
        self.changed = True
        return node

    def _round(self, norm: Node) -> None:
        """What a norm gives, in half precision, for all that read it."""
        users = list(norm.users)
        rounded = self._emit(norm, norm, aten.to.dtype, norm, self.dtype)
        for user in users:
            user.replace_input_with(norm, rounded)
        self.casts[norm, self.dtype] = rounded

    def _clamp_numbers(self, node: Node) -> None:
        """Finite numbers among the arguments that half precision cannot hold become half of the largest it can."""

        def fits(value: Any) -> Any:
            if self._beyond(value):
                return self.largest / 2 if value > 0 else -self.largest / 2
            return value

        node.args = pytree.tree_map_only(float, fits, node.args)
        node.kwargs = pytree.tree_map_only(float, fits, node.kwargs)

    def _refresh(self, node: Node) -> None:
        """The node's fake value with the dtypes that torch gives it now; shapes stay as they are known."""
        old = node.meta["val"]
        new = pytree.tree_leaves(run_node(node))
        flat, spec = pytree.tree_flatten(old)
        cast = [
            o.to(n.dtype) if isinstance(o, Tensor) and o.dtype != n.dtype else o for o, n in zip(flat, new, strict=True)
        ]
        if any(a is not b for a, b in zip(cast, flat, strict=True)):
            node.meta["val"] = pytree.tree_unflatten(cast, spec)
            self.changed = True

    def _restore_outputs(self, output: Node) -> None:
        """The caller gets the dtypes of the program that was given."""
        returned = next(n for n in self.program.graph.nodes if n.op == "output").args[0]
        results = list(output.args[0])  # type: ignore[arg-type]
        for place, (now, then) in enumerate(zip(results, returned, strict=True)):
            if (
                isinstance(now, Node)
                and isinstance(now.meta.get("val"), Tensor)
                and now.meta["val"].dtype != then.meta["val"].dtype
            ):
                results[place] = self._cast_back(now, then.meta["val"].dtype)
        output.args = (tuple(results),)

    def _cast_back(self, node: Node, dtype: torch.dtype) -> Node:
        known = self.casts.get((node, dtype))
        return known if known is not None else self._emit(node, node, aten.to.dtype, node, dtype)

    def _store_narrow(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors that are read in half precision only are kept so, and their casts go."""
        state, constants = dict(self.program.exported.state_dict), dict(self.program.exported.constants)
        bound = self.program.tensor_of_placeholder
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and n.name in bound]:
            cast, name = self.casts.get((node, self.dtype)), bound[node.name]
            if cast is None or list(node.users) != [cast]:
                continue
            held = state if name in state else constants
            held[name] = narrow(held[name], self.dtype)
            node.meta["val"] = node.meta["val"].to(self.dtype)
            cast.replace_all_uses_with(node)
            self.graph.erase_node(cast)
        return state, constants


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; a mask's "minus infinity" stays finite. Parameters stay parameters."""
    largest, value = torch.finfo(dtype).max, tensor.detach()
    value = torch.where(value.isfinite() & (value < -largest), -largest / 2, value).to(dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _is_float(node: Node, dtype: torch.dtype) -> bool:
    return any(d in (torch.float32, dtype) for d in _dtypes(node))


def _dtypes(node: Node) -> Sequence[torch.dtype]:
    """Of the node's tensors, floating ones first."""
    found = [v.dtype for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sorted(found, key=lambda d: not d.is_floating_point) or [torch.int64]
