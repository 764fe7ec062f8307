"""Inputs that an ONNX file takes: found by asking onnxruntime, at two values of every size that it leaves open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..example_inputs import BATCH, LENGTH, make
from ..rehearsal import first_line
from .graph import Graph, Input

Run = Callable[[Mapping[str, Tensor]], object]
_PICTURES = (224, 256, 320, 64, 640, 48, 32, 128, 512, 28)
_TOKENS = (LENGTH, 16, 8, 128, 64)
_OTHERS = (64, 32, 128, 16, 256, 512, 1024, 16000, 8)
_MOVES = frozenset({"Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Transpose", "Concat", "Slice"})


@dataclass(frozen=True)
class Trial:
    """What a file takes.

    sizes   word of an open size -> its value in the example
    others  the same, of another run: no open size is the example's
    closed  word -> why it has one size only, although the file leaves it open
    """

    sizes: Mapping[str, int]
    others: Mapping[str, int]
    closed: Mapping[str, str]


def try_sizes(graph: Graph, run: Run) -> Trial | None:
    """Sizes with which ``run`` computes something; None where none was found."""
    words = _words(graph.inputs)
    failure = ""
    for sizes in _candidates(words):
        why = _fails(graph, run, sizes)
        if why is None:
            return _with_others(graph, run, words, sizes)
        failure = failure or why
    return None


def draw(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Seeded inputs by the file's names: normal numbers, ids that the tables hold which they are looked up in, ones for
    masks."""
    below = ids_below(graph)
    return {
        one.name: make(
            [size if isinstance(size, int) else sizes[size] for size in one.shape],
            one.dtype,
            below.get(one.name, 2),
            ones="mask" in one.name.lower(),
            seed=seed + place,
        )
        for place, one in enumerate(graph.inputs)
    }


def ids_below(graph: Graph) -> dict[str, int]:
    """Input of whole numbers -> rows of the smallest table that it picks from, directly or turned."""
    sources = {one.name: {one.name} for one in graph.inputs if not one.dtype.is_floating_point}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "Gather" and node.inputs[0] in graph.constants:
            rows = graph.constants[node.inputs[0]].shape[node.attributes.get("axis", 0)]
            for name in sources.get(node.inputs[1], ()):
                found[name] = min(found.get(name, rows), rows)
        if node.op in _MOVES:
            sources[node.outputs[0]] = set().union(*(sources.get(name, set()) for name in node.inputs))
    return found


def _words(inputs: Sequence[Input]) -> dict[str, tuple[int, ...]]:
    """Word of an open size -> the values to try, the likeliest first."""
    found: dict[str, tuple[int, ...]] = {}
    for one in inputs:
        floats, rank = one.dtype.is_floating_point, len(one.shape)
        for position, size in enumerate(one.shape):
            if isinstance(size, int):
                continue
            if position == 0:
                found.setdefault(size, (BATCH,))
            else:
                found.setdefault(size, _PICTURES if floats and rank == 4 else _OTHERS if floats else _TOKENS)
    return found


def _candidates(words: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    longest = max((len(values) for values in words.values()), default=1)
    for batch in (BATCH, 1):
        for i in range(longest):
            found = {w: values[min(i, len(values) - 1)] for w, values in words.items()}
            yield {w: batch if words[w] == (BATCH,) else n for w, n in found.items()}
        if not any(values == (BATCH,) for values in words.values()):
            return


def _fails(graph: Graph, run: Run, sizes: Mapping[str, int]) -> str | None:
    try:
        run(draw(graph, sizes))
    except Exception as failure:  # onnxruntime's exception types are its own and many
        return first_line(failure)
    return None


def _with_others(graph: Graph, run: Run, words: Mapping[str, tuple[int, ...]], sizes: dict[str, int]) -> Trial:
    closed: dict[str, str] = {}
    others = dict(sizes)
    for word, size in sizes.items():
        is_batch = words[word] == (BATCH,)
        ways = (size + 1,) if is_batch else (size // 2 + 1, size // 2, size - 1, size + 32, 2 * size)
        first = ""
        for other in ways:
            why = _fails(graph, run, {**sizes, word: other})
            if why is None:
                others[word] = other
                break
            first = first or why
        else:
            closed[word] = f"onnxruntime takes {size} and none of {', '.join(map(str, ways))}: {first}"
    if _fails(graph, run, others) is not None:  # each alone, not together
        others = dict(sizes)
    return Trial(sizes, others, closed)


def as_example(inputs: Mapping[str, Input], drawn: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Inputs by the file's names in the order of the module's ``forward``."""
    return tuple(drawn[one.name] for one in inputs.values())
