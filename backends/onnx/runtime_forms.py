"""Forms of the exported graph that ONNX Runtime's CPU optimiser makes the best of: the same numbers, other ops."""

from __future__ import annotations

from typing import Any


def part_sums_from_norms(model: Any) -> int:
    """``Sum`` for ``Add`` in front of a LayerNormalization that alone reads it, so that the two are not fused.

    ONNX Runtime fuses them (SkipLayerNormalization). Its CPU kernel takes many times as long as the two ops that it
    replaces, and pruning does not shorten that: of BERT-base with a third of its MACs it takes a sixth. How many there
    were.
    """
    found = 0
    for node in model.graph.all_nodes():
        if node.op_type == "LayerNormalization" and node.inputs[0] is not None:
            source = node.inputs[0].producer()
            if source is not None and source.op_type == "Add" and len(node.inputs[0].uses()) == 1:
                source.op_type = "Sum"
                found += 1
    return found


def turn_gelus(model: Any) -> int:
    """``(x * (1 + erf)) * 0.5`` for ``x * (0.5 * (1 + erf))``: the order that runtimes fuse into one Gelu.

    Multiplying with a power of two is exact, so that the numbers stay. How many there were.
    """
    found = 0
    for node in model.graph.all_nodes():
        if node.op_type != "Mul":
            continue
        x, half = node.inputs
        inner = half.producer() if half is not None else None
        if inner is None or inner.op_type != "Mul" or len(half.uses()) != 1:
            continue
        factor, grown = inner.inputs
        if not (_half(factor) and _is_grown_erf(grown)):
            continue
        inner.replace_input_with(0, x)
        node.replace_input_with(0, half)
        node.replace_input_with(1, factor)
        half.shape, half.type = node.outputs[0].shape, node.outputs[0].type
        found += 1
    return found


def _half(value: Any) -> bool:
    constant = value.const_value
    return constant is not None and constant.size == 1 and float(constant.numpy().reshape(())) == 0.5


def _is_grown_erf(value: Any) -> bool:
    """Whether it is 1 + erf(..)."""
    node = value.producer()
    sources = [] if node is None or node.op_type != "Add" else [v.producer() for v in node.inputs if v is not None]
    return any(s is not None and s.op_type == "Erf" for s in sources)
