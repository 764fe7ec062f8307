"""REAP: how much an expert adds, where rows are sent to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from ....data.batch import Batch, Calibration, evenly
from ....errors import InternalError, OptionError
from ....ir.axis import leaves
from ....ir.dataflow import Family, family
from ....ir.group import Kind
from ....ir.program import Program
from ..routing import Routing, products_of
from .criterion import Criterion
from .features import wide


@dataclass(frozen=True)
class Reap(Criterion):
    """``S[j] = mean over rows x that are sent to expert j of g_j(x) |f_j(x)|``     g: its weight, f: what it gives

    An expert that no row is sent to scores zero.

    samples   that are looked at, from all over the data (0: all of them)

    Shapes   rows of all samples and positions, each as often as it is sent to an expert
    Unit     length of what is added to the stream; comparable within a layer and, as streams are, between layers
    Source   Lasby et al. 2025, arXiv:2510.13999: the router-weighted activation. Theirs prunes the same number of
             every layer, which ``SearchPlan`` does not ask for
    Cost     one run of the model
    Law      zero for an expert whose last product is zero; relabelling experts relabels the scores
    """

    samples: int = 0

    name = "reap"
    unit = "length added"
    needs_data = True
    comparable = True
    only = frozenset({str(Kind.EXPERT)})

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise OptionError("samples cannot be fewer than none", where=f"reap{{samples={self.samples}}}")

    @torch.no_grad()
    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        if data is None or not data.batches:
            raise InternalError("reap importance needs calibration data")
        places = self._places(program)
        sums = {name: torch.zeros(size, dtype=torch.float64) for name, (size, _, _) in places.items()}
        rows = {name: torch.zeros(size, dtype=torch.float64) for name, (size, _, _) in places.items()}
        watched = {name for _, ids, added in places.values() for name in (ids, added)}
        for batch in self._select_samples(program, data):
            seen = _Watch(program, watched)
            seen.run(*program.arguments(program.flatten(batch.args, batch.kwargs)))
            for name, (size, ids, added) in places.items():
                expert = seen.found[ids].flatten().long().cpu()
                length = wide(seen.found[added]).double().flatten(1).norm(dim=1).cpu()
                sums[name].index_add_(0, expert, length)
                rows[name] += torch.bincount(expert, minlength=size).double()
        return {name: total / rows[name].clamp_min(1) for name, total in sums.items()}

    def _places(self, program: Program) -> dict[str, tuple[int, str, str]]:
        """Group -> (its size, names of the nodes with every row's expert, and with what that row is given)."""
        products = products_of(program.graph)
        chosen = program.need("axes").tags.get("routed", ())
        found = {}
        for group in self.select_groups(program):
            top = next(node for dim, node in chosen if group.axis in leaves(dim))
            routing, made = products[top]
            found[group.name] = (group.size, routing.ids.name, _find_added(made[-1], routing).name)
        return found

    def _select_samples(self, program: Program, data: Calibration) -> list[Batch]:
        if not self.samples or program.fixed_batch:
            return list(data.batches)
        chosen = evenly(data.batches, min(self.samples, len(data.batches)))
        each = -(-self.samples // len(chosen))
        return [b if b.size <= each else b.pick(torch.tensor(evenly(range(b.size), each))) for b in chosen]


def _find_added(product: Node, routing: Routing) -> Node:
    """The rows that experts give, with their bias and weight where these follow at once."""
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        bias = family(user) is Family.ADD and any(other in routing.tables for other in user.all_input_nodes)
        if not bias and family(user) is not Family.MULTIPLY:
            break
        node = user
    return node


class _Watch(Interpreter):
    """A run that keeps the values of some nodes."""

    def __init__(self, program: Program, watched: set[str]) -> None:
        super().__init__(program.exported.graph_module)
        self.watched, self.found = watched, dict[str, Tensor]()

    def run_node(self, n: Node) -> Tensor:
        value: Tensor = super().run_node(n)
        if n.name in self.watched:
            self.found[n.name] = value
        return value
