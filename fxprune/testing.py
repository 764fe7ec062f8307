"""The oracle: the dense graph with elements masked where they are contracted. Public, for authors of passes and rules.

A mask on a producer's weights would be wrong as soon as a bias, a norm or a sigmoid follows; a mask on the operand of
each contraction is what "this element is not there" means, for any model.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from .errors import VerifyError
from .ir.agreement import relative_error, seeded
from .ir.axes import Statistic
from .ir.axis import Keep, kept_index, kept_total, total
from .ir.dataflow import NORMS, Family, bind_values, family
from .ir.example_sizes import runtime_sizes
from .ir.group import Switch
from .ir.plan import CompressionPlan
from .ir.program import Program
from .ir.provenance import first_line
from .ir.signature import Sizes
from .target.parity import inputs_that_run, steady


def keep_of(program: Program, plan: CompressionPlan) -> Keep:
    """Leaf axis -> kept indices, for every group that ``plan`` cuts."""
    return plan.keep(program.need("groups"))


def masked_run(program: Program, plan: CompressionPlan, flat: Sequence[Any]) -> list[Any]:
    """Outputs (flat) of the dense ``program`` on user inputs ``flat`` when only what ``plan`` keeps contributes.

    Sums and products see zeros in place of removed elements; means and variances run over the kept ones. A part that is
    gone is zero where it reaches the rest.
    """
    parts = (g for g in program.need("groups") if isinstance(g, Switch) and g.name in plan.choices)
    silent = {end for part in parts if not len(plan.kept(part)) for end in part.ends}
    return masked(program, keep_of(program, plan), flat, silent)


def masked(program: Program, keep: Keep, flat: Sequence[Any], silent: Collection[str] = ()) -> list[Any]:
    """:func:`masked_run` for kept elements given by axis, and names of nodes whose values are zero. Outputs keep their
    dense shape."""
    return run_flat(program, flat, _Masked(program, keep, flat, silent))


def masking_error(
    program: Program, sliced: Program, seed: int = 0, limit: float = float("inf"), sizes: Sizes | None = None
) -> float:
    """:func:`relative_error` of ``sliced`` against ``program`` masked by its plan, on seeded inputs like the example's.

    Ops that draw random numbers draw the same ones in both runs. Where the error is beyond ``limit``, samples at which
    the masked program itself jumps when its inputs move by a rounding error (``parity.steady``) do not
    count: there, two exact forms of it may decide differently.

    sizes   values of the program's symbols, where they are not to be the example's
    """

    def run_masked(inputs: Sequence[Any]) -> list[Any]:
        with seeded(seed):
            return masked_run(program, program.need("plan"), inputs)

    try:
        flat, want = inputs_that_run(program, run_masked, sizes, seed, seed)
    except Exception as failure:
        raise VerifyError(
            "the captured graph does not run on its own example inputs",
            where=program.name,
            why=f"{type(failure).__name__}: {first_line(failure)}",
            cure="give inputs that the model takes (`--input`)",
        ) from failure
    with seeded(seed):
        got = run_flat(sliced, flat)
    error = relative_error(got, want)
    if error <= limit:
        return error
    kept = steady(run_masked, flat, want, limit, seed)
    return error if kept is None else relative_error([g[kept] for g in got], [w[kept] for w in want])


def run_flat(program: Program, flat: Sequence[Any], interpreter: Interpreter | None = None) -> list[Any]:
    """Outputs (flat) of the program's graph on user inputs ``flat`` in graph order."""
    interpreter = interpreter or Interpreter(program.exported.graph_module)
    with torch.no_grad():
        return list(pytree.tree_leaves(interpreter.run(*program.arguments(flat))))


class _Masked(Interpreter):
    def __init__(self, program: Program, keep: Keep, flat: Sequence[Any], silent: Collection[str] = ()) -> None:
        super().__init__(program.exported.graph_module)
        self.silent = silent
        axes = program.need("axes")
        self.axes, self.keep, self.counts = axes, keep, {a: len(i) for a, i in keep.items()}
        self.sizes = runtime_sizes(program, flat)
        self.masks = collections.defaultdict(list)
        for c in axes.contractions:
            if self._cut(c.dim):
                self.masks[c.node].append((*c.operands[0], c.dim))
        self.selected: dict[str, list[tuple[int, Any]]] = collections.defaultdict(list)
        self.named: dict[str, list[Statistic]] = collections.defaultdict(list)
        for s in axes.statistics:
            if self._cut(s.dim) and s.operand:
                self.named[s.node].append(s)
            elif self._cut(s.dim):
                self.selected[s.node].append((s.position, s.dim))

    def _cut(self, dim: Any) -> bool:
        return kept_total(dim, self.counts) != total(dim)

    def run_node(self, n: Node) -> Any:
        return torch.zeros_like(self._run(n)) if n.name in self.silent else self._run(n)

    def _run(self, n: Node) -> Any:
        if not any(n.name in found for found in (self.masks, self.selected, self.named)):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        bound = bind_values(n.target, args, kwargs)
        for path, position, dim in self.masks.get(n.name, ()):
            name, _, index = path.partition(".")
            operand = bound[name][int(index)] if index else bound[name]
            masked = self._mask(operand, position, dim)
            bound[name] = [masked if i == int(index) else t for i, t in enumerate(bound[name])] if index else masked
        for s in self.named.get(n.name, ()):  # its output has no such dim: over the kept elements, it is the sliced one
            bound[s.operand] = bound[s.operand].index_select(s.position, kept_index(s.dim, self.keep, self.sizes))
        if n.name in self.selected:
            return self._statistic(n, bound)
        return n.target(**bound) if "self" not in bound else n.target(bound.pop("self"), **bound)  # type: ignore[operator]

    def _mask(self, x: Tensor, position: int, dim: Any) -> Tensor:
        # the operand may show more than the contracted dim (a convolution's input holds group x channel)
        mask = x.new_zeros(x.shape[position])
        mask[kept_index(dim, self.keep, self.sizes)] = 1
        return x * mask.view([-1 if i == position % x.dim() else 1 for i in range(x.dim())])

    def _statistic(self, n: Node, bound: dict[str, Any]) -> Any:
        """Run the norm or mean over the kept elements only; removed positions come back as zeros."""
        first = next(iter(bound))
        x: Tensor = bound[first]
        functional = torch.nn.functional
        does = family(n)
        source = n.all_input_nodes[0].name
        whole = {p: self.axes.dims[source][p] for p, _ in self.selected[n.name]}
        index = {p: kept_index(dim, self.keep, self.sizes) for p, dim in whole.items()}
        small = x
        for position, kept in index.items():
            small = small.index_select(position, kept)
        if does not in NORMS:
            return n.target(small, **{k: v for k, v in bound.items() if k != first})  # type: ignore[operator]
        (position, kept), *more = index.items()
        assert not more, "a norm over one cut dim is all the oracle knows"
        affine = {k: bound[k].index_select(0, kept) for k in ("weight", "bias") if bound.get(k) is not None}
        eps = {"eps": bound["eps"]} if bound.get("eps") is not None else {}
        if does is Family.GROUP_NORM:
            groups = next(lit for lit in self.axes.literals if lit.node == n.name and lit.argument == "num_groups")
            count = sum(kept_total(d, self.counts) for d in groups.dims)
            out = functional.group_norm(small, count, **affine, **eps)
        else:
            run = functional.rms_norm if does is Family.RMS_NORM else functional.layer_norm
            out = run(small, [len(kept)], **affine, **eps)
        return torch.zeros_like(x).index_copy(position, kept, out)
