"""Small ONNX files, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
KINDS = {np.dtype(t): k for t, k in {
    "float32": FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE, "int64": TensorProto.INT64,
    "int32": TensorProto.INT32, "bool": TensorProto.BOOL,
}.items()}  # fmt: skip

Array = np.ndarray


def write(
    path: Path,
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[Any, Sequence[Any]]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 18,
    domains: Sequence[str] = (),
) -> Path:
    """An ONNX file.

    inputs   name -> (a numpy dtype, its sizes: numbers, or words that leave them open)
    domains  of ops that are not ONNX's own
    """
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(n, KINDS[np.dtype(t)], list(s)) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    sets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8 if opset < 20 else 10)
    onnx.save(model, path)
    return path


def normal(*shape: int, seed: int = 0) -> Array:
    """Seeded normal numbers."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def run(path: Path, given: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime makes of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(given)), strict=True))


def perceptron(path: Path, *, opset: int = 18, batch: int | str = "batch", width: int = 32, **more: Any) -> Path:
    """Two layers, named as PyTorch's exporter names them: 16 inputs, ``width`` neurons, 4 outputs."""
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["/net/up/MatMul_output_0"], name="/net/up/MatMul"),
        helper.make_node("Add", ["net.up.bias", "/net/up/MatMul_output_0"], ["/net/up/sum"], name="/net/up/Add"),
        helper.make_node("Relu", ["/net/up/sum"], ["/net/act/Relu_output_0"], name="/net/act/Relu"),
        helper.make_node(
            "Gemm", ["/net/act/Relu_output_0", "net.down.weight", "net.down.bias"], ["logits"], name="/net/down/Gemm",
            transB=1,
        ),
    ]  # fmt: skip
    constants = {
        "onnx::MatMul_1": normal(16, width),
        "net.up.bias": normal(width),
        "net.down.weight": normal(4, width),
        "net.down.bias": normal(4),
    }
    return write(path, nodes, {"x": ("float32", [batch, 16])}, ["logits"], constants, opset=opset, **more)
