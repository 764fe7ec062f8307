"""``Program``: the one noun that flows. An exported graph plus the typed facts known about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..errors import FxpruneError, InternalError
from .axes import Axes
from .axis import Axis
from .group import PruneGroup, with_bases
from .importance import ImportanceScores
from .plan import CompressionPlan
from .proof import Link
from .token_flow import TokenFlow
from .writes import find_written_inputs

FACTS = ("axes", "groups", "scores", "plan", "tokens")
_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)  # inputs of a graph that are its own


@dataclass(frozen=True)
class Program:
    """A ``torch.export.ExportedProgram`` and what is known about it. Never mutated: a pass returns a new one.

    axes, groups, scores, plan and tokens are absent (None) until their pass has run, and again after a transform
    changed the graph: absent, never stale.

    proof   how near it is to the user's module, by way of the forms in between
    whole   between rounds of pruning: the program that they began with, its plan that of all rounds so far. No fact,
            and no part of a result: ``join-rounds`` goes back to it
    """

    exported: ExportedProgram
    name: str = "model"
    axes: Axes | None = None
    groups: tuple[PruneGroup, ...] | None = None
    scores: Mapping[str, ImportanceScores] | None = None
    plan: CompressionPlan | None = None
    tokens: TokenFlow | None = None
    notes: tuple[str, ...] = field(default=())
    proof: tuple[Link, ...] = field(default=())
    whole: Program | None = field(default=None, repr=False)

    def in_bases_of(self, before: Program) -> Program:
        """The same with its groups, which were found again behind ``before``, known to be in the bases of those."""
        return self.but(groups=with_bases(self.need("groups"), before.group_by_name))

    def but(self, **changes: Any) -> Program:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def without_facts(self, **changes: Any) -> Program:
        """A copy whose facts are dropped: what a transform returns."""
        return self.but(**dict.fromkeys(FACTS), **changes)

    def need(self, fact: str) -> Any:
        value = getattr(self, fact)
        if value is None:
            raise InternalError(f"the fact '{fact}' is not there yet")
        return value

    @property
    def group_by_name(self) -> dict[str, PruneGroup]:
        return {g.name: g for g in self.need("groups")}

    # ------------------------------------------------------------ the graph and its tensors

    @property
    def graph(self) -> torch.fx.Graph:
        return self.exported.graph

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter, buffer and lifted constant by its qualified name."""
        constants = {k: v for k, v in self.exported.constants.items() if isinstance(v, Tensor)}
        return {**constants, **self.exported.state_dict}

    @property
    def tensor_of_placeholder(self) -> dict[str, str]:
        """Placeholder name -> qualified name of the parameter, buffer or constant it stands for."""
        found: dict[InputKind, dict[str, str]] = {kind: {} for kind in _TENSORS}
        for spec in self.exported.graph_signature.input_specs:  # once: the signature's own tables are made at each call
            if spec.kind in found and isinstance(spec.arg, TensorArgument) and isinstance(spec.target, str):
                found[spec.kind][spec.arg.name] = spec.target
        return {name: target for bound in found.values() for name, target in bound.items()}

    def placeholders(self) -> Iterator[Node]:
        return (n for n in self.graph.nodes if n.op == "placeholder")

    @property
    def user_inputs(self) -> list[str]:
        """Names of the graph's user inputs, in order (tensors and non-tensors)."""
        bound = self.tensor_of_placeholder
        return [n.name for n in self.placeholders() if n.name not in bound]

    @property
    def fixed_batch(self) -> bool:
        """Whether the graph takes one batch size only: a tensor input whose first dimension is a number, or a symbol
        that the model's code has tied to one."""
        wanted = set(self.user_inputs)
        inputs = [n.meta.get("val") for n in self.placeholders() if n.name in wanted]
        sizes = [v.shape[0] for v in inputs if isinstance(v, Tensor) and v.dim()]
        return any(isinstance(size, int) or size.node.maybe_as_int() is not None for size in sizes)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """User inputs in graph order. Raises FxpruneError when they do not match the captured signature."""
        spec = self.exported.call_spec.in_spec
        kwargs = dict(kwargs or {})
        names = list(spec.child(1).context) if spec.num_children == 2 else []
        if set(names) == set(kwargs):
            kwargs = {k: kwargs[k] for k in names}
        flat, got = pytree.tree_flatten((tuple(args), kwargs))
        if got != spec:
            raise FxpruneError(
                "the inputs do not match the captured signature",
                where=self.name,
                why=f"expected {spec}, got {got}",
                cure="pass the inputs the model was captured with",
            )
        return flat

    def arguments(self, flat: Sequence[Any]) -> list[Any]:
        """Values of all placeholders in graph order, given the user inputs ``flat``: feed them to an Interpreter.

        What the graph writes into is a copy: every run begins with the same values, and leaves them so.
        """
        tensors, bound, rest = self.tensors, self.tensor_of_placeholder, iter(flat)
        values = [tensors[bound[n.name]] if n.name in bound else next(rest) for n in self.placeholders()]
        written = self.written
        return [
            v.detach().clone() if n.name in written and isinstance(v, Tensor) else v
            for n, v in zip(self.placeholders(), values, strict=True)
        ]

    @cached_property
    def written(self) -> frozenset[str]:
        """Placeholders whose memory the graph writes into."""
        return frozenset(find_written_inputs(self.graph))

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) that the graph was captured with."""
        inputs = self.exported.example_inputs
        if inputs is None:
            raise InternalError("the exported program carries no example inputs")
        return inputs[0], inputs[1]

    def group_of(self, axis: Axis) -> PruneGroup | None:
        return next((g for g in self.groups or () if g.axis is axis), None)
