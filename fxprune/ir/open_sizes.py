"""The open sizes of a program: what it takes, and that no pass leaves it taking less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.export import ExportedProgram

from .program import Program

if TYPE_CHECKING:  # it brings sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


@dataclass(frozen=True)
class OpenSizes:
    """What a program takes, as text.

    inputs   user input tensor -> its sizes, symbols such as ``s77`` where they are open
    bounds   symbol -> (least, largest) size
    guards   conditions on the symbols, those of the program and those that torch has recorded since
    """

    inputs: Mapping[str, tuple[str, ...]]
    bounds: Mapping[str, tuple[str, str]]
    guards: frozenset[str]

    def compare_with(self, after: OpenSizes) -> str:
        """How ``after`` takes less than this, in words; empty where it does not."""
        for name, sizes in self.inputs.items():
            for position, (was, now) in enumerate(zip(sizes, after.inputs.get(name, sizes), strict=True)):
                if was != now and not was.isdigit():
                    return f"dimension {position} of input '{name}' was {was} and is {now}"
        for condition in sorted(after.guards - self.guards):
            return f"the program would hold only for {condition}"
        for symbol, bounds in self.bounds.items():
            if after.bounds.get(symbol, bounds) != bounds:
                return (
                    f"{symbol} was between {' and '.join(bounds)} and is between {' and '.join(after.bounds[symbol])}"
                )
        return ""


def open_sizes(program: Program) -> OpenSizes:
    """What ``program`` takes now. Symbols are shared between programs, so one that torch ties is tied in all."""
    wanted, env = set(program.user_inputs), shape_env_of(program.exported)
    values = {n.name: n.meta.get("val") for n in program.placeholders() if n.name in wanted}
    return OpenSizes(
        inputs={name: tuple(map(str, value.shape)) for name, value in values.items() if isinstance(value, Tensor)},
        bounds={} if env is None else {str(s): (str(r.lower), str(r.upper)) for s, r in env.var_to_range.items()},
        guards=frozenset(
            [*program.exported._guards_code, *([] if env is None else (str(guard.expr) for guard in env.guards))]
        ),
    )


def shape_env_of(exported: ExportedProgram) -> ShapeEnv | None:
    """Where torch keeps what it knows of the program's symbols; None where it has none."""
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode.shape_env
    return None
