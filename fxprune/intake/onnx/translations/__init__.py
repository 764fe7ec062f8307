"""ONNX's ops in torch, a function each, by family.

To add one, copy the family's nearest function and give it the op's name. It gets the node (``op.attribute("axis",
-1)``) and the inputs as tensors; inputs that are shapes, axes or the like are named as ``known`` and come as tuples of
numbers. What it does not cover it says by raising NotTranslatedError. Its line in ``CASES`` of
tests/intake/test_onnx_ops.py holds it to onnxruntime.
"""

from . import (
    activations,
    arithmetic,
    attention,
    convolutions,
    creation,
    indexing,
    norms,
    pictures,
    pools,
    products,
    reductions,
    shapes,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "convolutions",
    "creation",
    "indexing",
    "norms",
    "pictures",
    "pools",
    "products",
    "reductions",
    "shapes",
]
