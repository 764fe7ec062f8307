"""Is the module the file? Both run on the same inputs, at two values of every open size: the proof's first link."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CaptureError
from ...ir.agreement import OF_ONE, TOLERANCE, relative_error
from ...ir.double import within_rounding
from ...ir.proof import Link
from .graph import Graph
from .module import OnnxModule
from .runtime import FileRun
from .trials import Trial, draw

COMPARED = "the ONNX file in onnxruntime and the module made of it"
_BOUNDED = frozenset({"Sigmoid", "Softmax", "Tanh", "HardSigmoid", "Erf"})
_MOVES = frozenset({"Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
_DRAWS = (0, 7, 19)
"""Seeds of inputs that are tried where the first show a difference: a number at an edge may fall on either side."""


def compare_with_file(module: OnnxModule, run: FileRun, trial: Trial) -> Link:
    """How near the module is to the file. Raises CaptureError with the output, the largest difference, and the node in
    which it starts."""
    limit = tolerance_of(module)
    worst, rounded = 0.0, 0.0
    tried: list[Mapping[str, int]] = []
    for sizes in (trial.sizes, trial.others) if trial.others != trial.sizes else (trial.sizes,):
        found = [_at(module, run, sizes, seed, limit) for seed in _DRAWS[:1]]
        if found[0][0] > limit:
            found += [_at(module, run, sizes, seed, limit) for seed in _DRAWS[1:]]
            if sorted(error for error, _, _ in found)[1] > limit:
                _refuse(module, run, sizes, found[0])
        error, _, by_rounding = min(found)
        worst, rounded = max(worst, error), max(rounded, by_rounding)
        tried.append(dict(sizes))
    return Link(COMPARED, worst, limit, tuple(tried), rounded)


def tolerance_of(module: OnnxModule) -> float:
    """That of the coarsest dtype among weights and inputs."""
    dtypes = {t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()}
    dtypes |= {one.dtype for one in module.inputs.values() if one.dtype.is_floating_point}
    return max((TOLERANCE.get(d, 1e-4) for d in dtypes), default=TOLERANCE[torch.float32])


def _at(
    module: OnnxModule, run: FileRun, sizes: Mapping[str, int], seed: int, limit: float
) -> tuple[float, str, float]:
    """(largest relative difference, the output that has it, a larger one that is rounding)."""
    given = draw(module.graph, sizes, seed)
    want = run(given)
    with torch.no_grad():
        got = module.compute(given)
    bounded = _ends_at_one(module.graph)
    worst, name, rounded = 0.0, "", 0.0
    for one in want:
        error = relative_error([got[one]], [want[one]])
        if error > limit and one in bounded and _largest(got[one], want[one]) <= OF_ONE:
            rounded, error = max(rounded, error), 0.0
        if error > limit and _is_rounding(module, given, one, got[one], want[one], limit):
            rounded, error = max(rounded, error), 0.0
        if error > worst or not name:
            worst, name = error, one
    return worst, name, rounded


def _is_rounding(
    module: OnnxModule, given: Mapping[str, Tensor], name: str, got: Tensor, want: Tensor, limit: float
) -> bool:
    """Whether the file is as near to what the module gives in fp64 as the module itself is."""
    try:
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        with torch.no_grad():
            exact = copy.deepcopy(module).double().compute(wide, wide=True)[name]
    except Exception:  # whatever torch says of a dtype that a kernel does not have
        return False
    return within_rounding([want], [got], [exact], limit)


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max()) if got.shape == want.shape else float("inf")


def _ends_at_one(graph: Graph) -> set[str]:
    """Values between -1 and 1 because of the function that gives them, moved or joined since."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op in _BOUNDED or (node.op in _MOVES and node.inputs[0] in found):
            found.update(node.outputs)
    return found


def _refuse(module: OnnxModule, run: FileRun, sizes: Mapping[str, int], found: tuple[float, str, float]) -> None:
    error, name, _ = found
    said = ", ".join(f"{word}={size}" for word, size in sizes.items())
    start = _where_it_starts(module, sizes)
    raise CaptureError(
        "the module made of the file does not compute what onnxruntime makes of it",
        where=f"{module.path}: output {name}"
        + (f", at {said}" if said else "")
        + (f"; it starts in {start}" if start else ""),
        why=f"they differ by {error:.1e} of the largest value (tolerance {tolerance_of(module):.0e})",
        cure="a translation is wrong: please open an issue with that node; meanwhile give the PyTorch model",
    )


def _where_it_starts(module: OnnxModule, sizes: Mapping[str, int]) -> str:
    """The first node whose values differ, asked of the file value by value; "" if that cannot be told."""
    graph, limit = module.graph, tolerance_of(module)
    made = [n.outputs[0] for n in graph.nodes if n.outputs]
    try:
        inner = replace(graph, outputs=tuple(made), notes=("all values",))
        given = draw(graph, sizes)
        want = FileRun(inner)(given)
        with torch.no_grad():
            got: Any = module.compute(given, tuple(made))
        for node in graph.nodes:
            name = node.outputs[0]
            if name in want and relative_error([got[name]], [want[name]]) > limit:
                return str(node)
    except Exception:  # an explanation that fails must not hide what it explains
        return ""
    return ""
