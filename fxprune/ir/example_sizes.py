"""What the symbolic sizes of a program are in its example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from ..process.silence import quiet
from .program import Program

if TYPE_CHECKING:  # sympy takes half a second
    from sympy import Expr

    from .sizes import StandIns


def stand_ins(program: Program) -> StandIns:
    """Numbers for the program's symbolic sizes, see :class:`fxprune.ir.sizes.StandIns`."""
    from .sizes import StandIns

    inputs, values = _of_inputs(program), _of_values(program)
    return StandIns({**values, **inputs}, _equations(program), values.keys() - inputs.keys())


def example_sizes(program: Program) -> dict[str, int]:
    """Symbol -> its size in the example inputs; empty for a program that carries none.

    Sizes that depend on values (what a boolean index picks) are found by running the program on its example.
    """
    return {**_of_values(program), **_of_inputs(program)}


def _of_inputs(program: Program) -> dict[str, int]:
    if program.exported.example_inputs is None:
        return {}
    return sizes_in(program, pytree.tree_leaves(program.example_inputs))


def _of_values(program: Program) -> dict[str, int]:
    unknown = [n for n in program.graph.nodes if n.meta.get("unbacked_bindings")]
    if not unknown or program.exported.example_inputs is None:
        return {}
    run = _Sizes(program, unknown)
    with torch.no_grad(), quiet():
        run.run(*program.arguments(program.flatten(*program.example_inputs)))
    return run.sizes


def runtime_sizes(program: Program, flat: Sequence[Any]) -> dict[int, int]:
    """Number of a symbolic size in the program's axes -> that size when it runs on user inputs ``flat``.

    Sizes that depend on values are those of the example.
    """
    made: StandIns = program.need("axes").stand_ins
    return {**made.example, **made.at(sizes_in(program, flat))}


def sizes_in(program: Program, flat: Sequence[Any]) -> dict[str, int]:
    """Symbol -> its size in the user inputs ``flat``, where they say it."""
    bound = program.tensor_of_placeholder
    fakes = [n.meta.get("val") for n in program.placeholders() if n.name not in bound]
    return dict(pair for one in zip(fakes, flat, strict=False) for pair in _match_sizes(*one))


def _match_sizes(known: Any, real: Any) -> Iterator[tuple[str, int]]:
    """(symbol, size) where a fake value's open sizes meet a real value's."""
    from sympy import Symbol

    for fake, value in zip(pytree.tree_leaves(known), pytree.tree_leaves(real), strict=False):
        if isinstance(fake, Tensor) and isinstance(value, Tensor):
            pairs = list(zip(fake.shape, value.shape, strict=False))
        else:
            pairs = [(fake, value)] if isinstance(value, int) else []
        for size, length in pairs:
            if isinstance(size, SymInt):
                count, symbol = size.node.expr.as_coeff_Mul()
                if isinstance(symbol, Symbol) and count.is_Integer:
                    yield str(symbol), int(length) // int(count)


class _Sizes(Interpreter):
    """Runs a program no further than to the last of the nodes whose sizes depend on values, and notes these."""

    def __init__(self, program: Program, nodes: list[Node]) -> None:
        super().__init__(program.exported.graph_module)
        self.wanted, self.sizes = set(nodes), dict[str, int]()

    def run_node(self, n: Node) -> Any:
        if not self.wanted:
            return None
        value = super().run_node(n)
        if n in self.wanted:
            self.wanted.discard(n)
            self.sizes.update(_match_sizes(n.meta.get("val"), value))
        return value


def _equations(program: Program) -> Iterator[Expr]:
    """What the graph was captured under: each held for the example inputs."""
    from sympy import Eq

    from .open_sizes import shape_env_of

    env = shape_env_of(program.exported)
    yield from (guard.expr for guard in (() if env is None else env.guards) if isinstance(guard.expr, Eq))
