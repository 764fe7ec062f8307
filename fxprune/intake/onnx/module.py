"""The module that an ONNX file becomes."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..stated import StatesInputs
from . import translations  # noqa: F401  fills the table
from .file import read_graph
from .graph import Graph, Input
from .known import FEW, HOSTED, Known, of_tensor
from .machine import check_translated, execute
from .naming import Held, name_constants
from .prepare import prepare
from .table import TRANSLATIONS, Op


class OnnxModule(StatesInputs):
    """What an ONNX file computes, op by op: inputs by its names, ``{name: tensor}`` of its outputs.

    Weights lie in a tree of modules under the paths that the file's nodes have. Sizes that the file fixes are checked,
    as onnxruntime does; an open one is any size.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = prepare(graph)
        check_translated(self.graph)
        self.inputs = _by_identifier(self.graph)
        sizes = _read_as_known(self.graph)
        self.known = {n: of_tensor(t) for n, t in self.graph.constants.items() if n in sizes or _is_number(t)}
        self.held: Mapping[str, str] = {}
        self.closed: Mapping[str, str] = {}
        for name, held in name_constants(self.graph, _read_as_tensors(self.graph, self.known)).items():
            _hold(self, held)
            self.held = {**self.held, name: held.path}
        self.__class__ = _naming(self.inputs)

    @property
    def own_names(self) -> Mapping[str, str]:
        """Input of ``forward`` -> its name in the file."""
        return {name: one.name for name, one in self.inputs.items()}

    @property
    def path(self) -> Path:
        """The file."""
        return self.graph.path

    def run(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """The outputs for inputs by position or under their names in ``forward``."""
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(self.inputs) or given.keys() != self.inputs.keys():
            raise TypeError(f"the file takes {', '.join(self.inputs)}; given are {', '.join(given)}")
        check_sizes(self.inputs, given)
        return self.compute({self.inputs[name].name: tensor for name, tensor in given.items()})

    def open_words(self) -> dict[str, dict[int, str]]:
        """Sizes that the file leaves open, but for those that have one value all the same."""
        return {
            name: {i: s for i, s in enumerate(one.shape) if isinstance(s, str) and s not in self.closed}
            for name, one in self.inputs.items()
        }

    def compute(
        self, given: Mapping[str, Tensor], wanted: tuple[str, ...] = (), wide: bool = False
    ) -> dict[str, Tensor]:
        """The outputs for inputs by the file's names, or other values that are ``wanted``; ``wide``: conversions to
        floats are to fp64, as weights and inputs then are. Raises LoadError or
        UnsupportedOp that names the node where one does not compute."""
        wanted = wanted or self.graph.outputs
        stored = {name: self._tensor(path) for name, path in self.held.items()}
        values: dict[str, Any] = {**stored, **self.known, **given}
        last = {name: node for node in self.graph.nodes for name in node.inputs}
        for node in self.graph.nodes:

            def tensor_of(position: int, node: Any = node) -> Tensor:
                name = node.inputs[position]
                value = values[name]
                return stored.get(name, value.tensor()) if isinstance(value, Known) else value

            read = [values[name] if name else None for name in node.inputs]
            made = execute(Op(node, self.graph.opset, wide), read, self.path, tensor_of)
            outputs = made if isinstance(made, tuple | list) else (made,)
            values.update(zip(node.outputs, outputs, strict=False))
            for name in node.inputs:  # as soon as nothing reads it, its memory is free
                if last[name] is node and name not in wanted:
                    values.pop(name, None)
        found = {name: values[name] for name in wanted}
        return {name: v.tensor() if isinstance(v, Known) else v for name, v in found.items()}

    def _tensor(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(owner), name)
        return tensor


def _naming(names: Iterable[str]) -> type[OnnxModule]:
    """The class of a module whose ``forward`` names these inputs: a signature is its class's, and copies of a module
    keep their class."""

    def forward(self: OnnxModule, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        return self.run(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("OnnxModule", (OnnxModule,), {"forward": forward, "__module__": __name__})


def check_sizes(inputs: Mapping[str, Input], given: Mapping[str, Any]) -> None:
    """Raise ValueError for a tensor that is another than the file says of its input. While it is traced, sizes of one
    word become one symbol here."""
    words: dict[str, Any] = {}
    for name, tensor in given.items():
        stated = inputs[name]
        if tensor.dim() != len(stated.shape):
            raise ValueError(f"the file wants {len(stated.shape)} dimensions of '{name}', there are {tensor.dim()}")
        if tensor.dtype != stated.dtype:
            raise ValueError(f"the file wants {stated.dtype} for '{name}', it is {tensor.dtype}")
        for i, (size, want) in enumerate(zip(tensor.shape, stated.shape, strict=True)):
            if isinstance(want, int) and size != want:
                raise ValueError(f"the file fixes dimension {i} of '{name}' at {want}, it is {size}")
            if isinstance(want, str) and size != words.setdefault(want, size):
                raise ValueError(f"sizes of '{want}' are one; in '{name}' it is {size}, before {words[want]}")


def read_module(path: Path) -> tuple[OnnxModule, tuple[str, ...]]:
    """(the module that ``path`` becomes, what must be known of it). Raises LoadError or UnsupportedOp."""
    graph = read_graph(path)
    module = OnnxModule(graph).eval()
    if not any(p.dim() > 1 for p in module.parameters()):
        notes: tuple[str, ...] = (*graph.notes, "the file holds no weight matrix")
        return module, notes
    return module, graph.notes


def _by_identifier(graph: Graph) -> dict[str, Input]:
    """Each input under a name that Python takes for one."""
    found: dict[str, Input] = {}
    for one in graph.inputs:
        name = re.sub(r"\W", "_", one.name)
        name = f"input_{name}" if not name.isidentifier() or keyword.iskeyword(name) or name == "self" else name
        while name in found:
            name += "_"
        found[name] = one
    return found


def _is_number(tensor: Tensor) -> bool:
    """Whether a constant may be a size, a number or a few of them, wherever it is read."""
    return tensor.numel() == 1 or (not tensor.is_floating_point() and tensor.numel() <= FEW)


def _read_as_known(graph: Graph) -> frozenset[str]:
    """Values that some node reads as sizes, axes or the like."""
    return frozenset(
        name for node in graph.nodes for i, name in enumerate(node.inputs) if i in TRANSLATIONS[node.op].known
    )


def _read_as_tensors(graph: Graph, known: Mapping[str, Known]) -> frozenset[str]:
    """Constants that some node reads as tensors, as far as can be told before anything runs."""
    hosted, wanted = {*known}, set[str]()
    for node in graph.nodes:
        read = [name for name in node.inputs if name]
        if node.op in ("Shape", "Size") or (node.op in HOSTED and read and all(name in hosted for name in read)):
            hosted.update(node.outputs)
            continue
        translation = TRANSLATIONS[node.op]
        for position, name in enumerate(node.inputs):
            if name not in graph.constants or position in translation.known:
                continue
            number = name in known and graph.constants[name].numel() == 1 and translation.numbers
            if not number:
                wanted.add(name)
    return frozenset(wanted)


def _hold(module: nn.Module, held: Held) -> None:
    *above, last = held.path.split(".")
    owner = module
    for part in above:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    if held.trained:
        owner.register_parameter(last, nn.Parameter(held.tensor))
    else:
        owner.register_buffer(last, held.tensor)
