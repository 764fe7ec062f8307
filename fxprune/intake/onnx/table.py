"""The table of ops: ONNX's name -> the function that computes it in torch, and how it reads its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .graph import Node

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Translation:
    """An op in torch.

    run      ``run(op, *inputs)`` gives the output, or a tuple of them. An input that is left out is None
    known    positions of inputs that must be known while the graph is read: a shape, axes, where a slice begins. They
             come as a tuple of numbers, sizes of open dimensions among them
    numbers  whether a constant of one element comes as a Python number; else as a tensor like all inputs
    """

    run: Callable[..., Any]
    known: frozenset[int] = frozenset()
    numbers: bool = False


@dataclass(frozen=True)
class Op:
    """What a translation may ask of the node that it stands for.

    wide   floats are fp64 in this run, whatever the file says
    """

    node: Node
    opset: int
    wide: bool = False

    def attribute(self, name: str, otherwise: Any = None) -> Any:
        """An attribute of the node, or what holds where the file does not say it."""
        return self.node.attributes.get(name, otherwise)

    def flag(self, name: str, otherwise: bool = False) -> bool:
        """An attribute that is 0 or 1."""
        return bool(self.attribute(name, int(otherwise)))

    @property
    def outputs(self) -> int:
        """How many outputs are asked for."""
        return len(self.node.outputs)

    def gives(self, position: int) -> bool:
        """Whether this output is asked for."""
        return position < self.outputs and bool(self.node.outputs[position])


class NotTranslatedError(Exception):
    """A node that is outside of what its translation covers; says what."""


TRANSLATIONS: dict[str, Translation] = {}
"""ONNX's name of an op, with its domain where that is not ONNX's own -> how it is computed."""


def translates(*names: str, known: tuple[int, ...] = (), numbers: bool = False) -> Callable[[Function], Function]:
    """The function below computes the ops of these names."""

    def add(run: Function) -> Function:
        for name in names:
            assert name not in TRANSLATIONS, name
            TRANSLATIONS[name] = Translation(run, frozenset(known), numbers)
        return run

    return add
