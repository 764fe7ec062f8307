"""A graph's floating outputs: which of them are logits, and one row per sample of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Interpreter, Node
from torch.nn import functional
from torch.utils import _pytree as pytree

from ....data.metrics import relative_entropy
from ....ir.program import Program


@dataclass(frozen=True)
class Output:
    """One floating user output of shape [batch, ...]; ``classes``: the dimension of its classes, None: not logits."""

    value: Tensor
    classes: int | None


def run(
    program: Program,
    flat: Sequence[Any],
    tensors: Mapping[str, Tensor] | None = None,
    interpreter: Interpreter | None = None,
) -> list[Any]:
    """All outputs of the graph on user inputs ``flat``; ``tensors`` replaces weights, by placeholder."""
    values = program.arguments(flat)
    if tensors:
        values = [tensors.get(n.name, v) for n, v in zip(program.placeholders(), values, strict=True)]
    return list((interpreter or Interpreter(program.exported.graph_module)).run(*values))


def floating(program: Program, outputs: Sequence[Any], samples: int) -> list[Output]:
    """Floating user outputs with one entry per sample and more than one dimension; no maps of pairs of samples.

    samples   of the batch, where its size is fixed. Where it is open, an output belongs to the input whose batch it
              has, whatever the numbers: a call may take texts and pictures, five of these and two of those

    Logits are what is called ``logits``, else 2-D outputs called ``*_logits``, else the first 2-D output of a model
    whose outputs have no names; over at least two classes. (The rule of the gradient criteria; an embedding without a
    name is taken for logits then, which makes the guard stricter and nothing else.)
    """
    specs = program.exported.graph_signature.output_specs
    user = [
        o if isinstance(o, Tensor) and o.is_floating_point() and o.dim() > 1 and per_sample(o, samples) else None
        for o, s, per_sample in zip(outputs, specs, _by_sample(program), strict=True)
        if s.kind == OutputKind.USER_OUTPUT
    ]
    named = [(name, o) for name, o in zip(_names(program, len(user)), user, strict=True) if o is not None]
    chosen = [o for name, o in named if name == "logits"]
    chosen = chosen or [o for name, o in named if name.endswith("_logits") and o.dim() == 2]
    if not chosen and not any(name for name, _ in named):
        chosen = [o for _, o in named if o.dim() == 2][:1]
    places = {id(o): 1 if o.dim() > 3 else o.dim() - 1 for o in chosen}
    return [Output(o, c if (c := places.get(id(o))) is not None and o.shape[c] > 1 else None) for _, o in named]


def _by_sample(program: Program) -> list[Callable[[Tensor, int], bool]]:
    """Per output a function of its value and the batch's size: whether its entries belong to one sample each. A map of
    all pairs of samples (CLIP) has no rows, and neither has what is as long as its values say."""

    def shape(node: Any) -> tuple[Any, ...]:
        value = node.meta.get("val") if isinstance(node, Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    inputs = [shape(n) for n in program.placeholders() if n.name in program.user_inputs]
    samples = {str(s[0]) for s in inputs if s and not isinstance(s[0], int)}

    def decide(sizes: tuple[Any, ...]) -> Callable[[Tensor, int], bool]:
        if any(str(size) in samples for size in sizes[1:] if not isinstance(size, int)):
            return lambda value, count: False
        if sizes and not isinstance(sizes[0], int) and sizes[0].node.expr.is_Symbol:
            belongs = str(sizes[0]) in samples
            return lambda value, count: belongs
        return lambda value, count: len(value) == count

    return [decide(shape(o)) for o in next(n for n in program.graph.nodes if n.op == "output").args[0]]


def _names(program: Program, count: int) -> list[str]:
    spec = program.exported.call_spec.out_spec
    if spec is None or spec.num_leaves != count:
        return [""] * count
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    return [str(path[0].key) if path and isinstance(path[0], pytree.MappingKey) else "" for path, _ in paths]


def rows(out: Tensor, mask: Tensor | None) -> Tensor:
    """One row per sample: positions are averaged (padding excepted), channels of a map are kept. [n, d], as ``out``

    Scores by position [n, positions] are the row itself, zero where there is padding.
    """
    if out.dim() == 2 and mask is not None and mask.shape == out.shape:
        return torch.where(mask.to(out.device), out, 0.0)
    if out.dim() == 4:
        return out.mean((2, 3))
    if out.dim() > 2:
        x = out.flatten(1, -2)
        keep = mask.to(x) if mask is not None and mask.shape == x.shape[:2] else x.new_ones(x.shape[:2])
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp_min(1)
    return out


def unit(out: Tensor, mask: Tensor | None) -> Tensor:
    """:func:`rows`, normalised, fp64, on the CPU."""
    return functional.normalize(rows(out.double(), mask), dim=1).cpu()


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several batches [n, d] under each other; where they are of different lengths (one entry per position,
    batches padded to their own longest), zeros make them as long as the longest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[1])) for part in parts])


def class_rows(out: Output, mask: Tensor | None) -> Tensor:
    """Logits by position, padding left out. [rows, classes], at least fp32"""
    assert out.classes is not None
    x = out.value.movedim(out.classes, -1)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return x[mask.to(x.device)]
    return x.flatten(0, -2)


def divergence(dense: Tensor, pruned: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over rows of KL(softmax(dense / T) || softmax(pruned / T)) T^2 (Hinton et al. 2015). []"""
    p, q = (functional.log_softmax(x / temperature, dim=-1) for x in (dense, pruned))
    return relative_entropy(p, q).mean() * temperature**2
