"""The law of the table of ops: each translation gives what onnxruntime gives, on random inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from support.onnx_files import normal, run, write

from fxprune.intake.onnx.module import read_module
from fxprune.intake.onnx.prepare import LINEAR
from fxprune.intake.onnx.table import TRANSLATIONS

OPSETS = (11, 13, 18, 21, 23)
X, IMAGE = normal(2, 3, 4), normal(2, 4, 7, 8)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True)
class Case:
    """A node: its inputs (arrays are inputs of the file), those that are constants in it, its attributes.

    opsets   the first and the last in which the node is written so
    """

    inputs: tuple[Any, ...]
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opsets: tuple[int, int] = (11, 23)


def case(*inputs: Any, at: tuple[int, int] = (11, 23), outputs: int = 1, **attributes: Any) -> Case:
    """``at``: opsets. A list among the inputs is a constant of the file."""
    return Case(tuple(inputs), (), attributes, outputs, at)


POSITIVE, UNIT = np.abs(X) + 0.1, np.tanh(X) * 0.9
TRUTH = X > 0
TABLE, IDS = normal(9, 5), np.array([[0, 8, 3], [1, 1, 2]], dtype=np.int64)
_PLAIN = "Abs Neg Exp Floor Ceil Round Sign Sin Cos Tan Atan Sinh Cosh Asinh Erf Relu Sigmoid Tanh Softplus Softsign"
CASES: dict[str, list[Case]] = {
    **{op: [case(X)] for op in _PLAIN.split()},
    **{op: [case(POSITIVE)] for op in ("Log", "Sqrt", "Reciprocal")},
    **{op: [case(UNIT)] for op in ("Asin", "Acos", "Atanh")},
    "Acosh": [case(POSITIVE + 1)],
    **{op: [case(X, normal(3, 1)), case(X, [np.float32(0.5)]), case([normal(1)], X)] for op in ("Add", "Sub", "Mul")},
    "Div": [case(X, POSITIVE), case(np.array([7, -7, 8]), np.array([2, 2, -3])), case([np.float32(2)], POSITIVE)],
    "Pow": [case(POSITIVE, [np.float32(2)]), case(POSITIVE, X)],
    "Mod": [case(np.array([7, -7, 8]), np.array([2, 3, -3])), case(X, POSITIVE, fmod=1)],
    **{op: [case(X, normal(3, 4, seed=1), normal(4))] for op in ("Max", "Min", "Sum", "Mean")},
    **{op: [case(X, normal(2, 3, 4, seed=1))] for op in ("Less", "Greater", "Equal")},
    **{op: [case(X, [np.float32(0.1)], at=(12, 23))] for op in ("LessOrEqual", "GreaterOrEqual")},
    **{op: [case(TRUTH, ~TRUTH[:1])] for op in ("And", "Or", "Xor")},
    **{op: [case(np.array([6, 5]), np.array([3, 4]), at=(18, 23))] for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    "BitwiseNot": [case(np.array([6, -5]), at=(18, 23))],
    "Not": [case(TRUTH)],
    "IsNaN": [case(np.array([1, np.nan, np.inf], dtype=np.float32), at=(13, 23))],
    "IsInf": [case(np.array([1, np.nan, np.inf, -np.inf], dtype=np.float32), detect_negative=n) for n in (0, 1)],
    "Identity": [case(X)],
    "Dropout": [case(X, outputs=2, at=(13, 23))],
    "Clip": [case(X, [np.float32(-0.5)], [np.float32(0.5)]), case(X, [np.float32(0)])],
    "Where": [case(TRUTH, X, [np.float32(0)]), case(TRUTH, X, normal(4))],
    "Cast": [case(X * 3, to=7), case(X, to=9), case(IDS, to=1), case(X, to=10)],
    "CastLike": [case(IDS, X, at=(15, 23))],
    "Gelu": [case(X, approximate=how, at=(20, 23)) for how in ("none", "tanh")],
    "HardSigmoid": [case(X * 4), case(X * 4, alpha=1 / 6, beta=0.5)],
    "HardSwish": [case(X * 4, at=(14, 23))],
    "LeakyRelu": [case(X), case(X, alpha=0.3)],
    "PRelu": [case(X, [normal(3, 1)]), case(X, [normal(1)]), case(X, [normal(4)])],
    "Elu": [case(X, alpha=0.7)],
    "Selu": [case(X), case(X, alpha=1.2, gamma=0.9)],
    "Celu": [case(X, alpha=1.5, at=(12, 23))],
    "Mish": [case(X, at=(18, 23))],
    "ThresholdedRelu": [case(X, alpha=0.4)],
    "Softmax": [case(X), case(X, axis=1), case(X, axis=-1)],
    "LogSoftmax": [case(X), case(X, axis=1)],
    "MatMul": [case(X, normal(2, 4, 5)), case(X, [normal(4, 5)]), case(normal(4), X.transpose(0, 2, 1))],
    "Gemm": [
        case(normal(3, 4), [normal(4, 5)], [normal(5)]),
        case(normal(3, 4), [normal(5, 4)], [normal(1, 5)], transB=1),
        case(normal(4, 3), normal(4, 5), normal(3, 1), transA=1, alpha=0.5, beta=2.0),
    ],
    "Einsum": [case(X, normal(2, 3, 5), equation="bij, bik -> bjk", at=(12, 23))],
    "Conv": [
        case(IMAGE, [normal(6, 4, 3, 3)], [normal(6)], pads=[1, 1, 1, 1], strides=[2, 1]),
        case(IMAGE, [normal(8, 1, 3, 3)], group=4, pads=[0, 1, 2, 1]),
        case(IMAGE, [normal(6, 4, 3, 2)], auto_pad="SAME_UPPER", strides=[2, 2]),
        case(IMAGE, [normal(6, 4, 3, 2)], auto_pad="SAME_LOWER"),
        case(IMAGE[..., 0], [normal(6, 4, 3)], dilations=[2]),
        case(normal(1, 2, 4, 5, 6), [normal(3, 2, 2, 2, 2)], auto_pad="VALID"),
    ],
    "ConvTranspose": [
        case(IMAGE, [normal(4, 3, 3, 3)], [normal(3)], strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        case(IMAGE, [normal(4, 3, 3, 3)], strides=[2, 2], pads=[0, 1, 1, 0]),
        case(IMAGE, [normal(4, 3, 3, 3)], strides=[2, 2], auto_pad="SAME_UPPER"),
        case(IMAGE, [normal(4, 3, 3, 3)], strides=[2, 2], output_shape=[15, 16]),
        case(IMAGE[..., 0], [normal(4, 1, 3)], group=2),
    ],
    "MaxPool": [
        case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        case(IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        case(IMAGE, kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2]),
        case(IMAGE[..., 0], kernel_shape=[3], dilations=[2]),
    ],
    "AveragePool": [
        case(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        case(IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        case(IMAGE, kernel_shape=[3, 2], auto_pad="SAME_UPPER", strides=[2, 2]),
        case(IMAGE, kernel_shape=[3, 3], pads=[0, 1, 2, 1], count_include_pad=1),
    ],
    "GlobalAveragePool": [case(IMAGE), case(X)],
    "GlobalMaxPool": [case(IMAGE), case(X)],
    "BatchNormalization": [case(IMAGE, *([a] for a in (normal(4), normal(4), normal(4), np.abs(normal(4)) + 1)))],
    "LayerNormalization": [
        case(X, [normal(4)], [normal(4)], at=(17, 23)),
        case(X, [normal(3, 4)], axis=1, epsilon=0.01, at=(17, 23)),
    ],
    "RMSNormalization": [case(X, [normal(4)], at=(23, 23))],
    "InstanceNormalization": [case(IMAGE, [normal(4)], [normal(4)])],
    "GroupNormalization": [case(IMAGE, [normal(4)], [normal(4)], num_groups=2, at=(21, 23))],
    "LpNormalization": [case(X, p=p, axis=1) for p in (1, 2)],
    "LRN": [case(IMAGE, size=3, alpha=0.1)],
    "MeanVarianceNormalization": [case(IMAGE, axes=[0, 2, 3])],
    **{
        op: [
            case(POSITIVE, axes=[1], at=(11, 12 if op == "ReduceSum" else 17)),
            case(POSITIVE, [ints(-1, 0)], keepdims=0, at=(13 if op == "ReduceSum" else 18, 23)),
            case(POSITIVE),
        ]
        for op in TRANSLATIONS
        if op.startswith("Reduce")
    },
    "ArgMax": [case(X, axis=1), case(X, axis=-1, keepdims=0)],
    "ArgMin": [case(X, axis=1)],
    "TopK": [case(X, [ints(2)], outputs=2), case(X, [ints(3)], axis=1, largest=0, outputs=2)],
    "CumSum": [case(X, [np.array(1)]), case(X, [np.array(-1)], exclusive=1, reverse=1)],
    "Shape": [case(X), case(X, start=1, at=(15, 23))],
    "Size": [case(X)],
    "Reshape": [case(X, [ints(0, -1)]), case(X, [ints(4, 3, 2)])],
    "Flatten": [case(IMAGE, axis=axis) for axis in (0, 1, 2, -1, 4)],
    "Transpose": [case(X), case(X, perm=[1, 0, 2])],
    "Squeeze": [case(X[:, :1], [ints(1)], at=(13, 23)), case(X[:, :1], axes=[1], at=(11, 12)), case(X[:1])],
    "Unsqueeze": [case(X, [ints(0, -1)], at=(13, 23)), case(X, axes=[0, 4], at=(11, 12))],
    "Expand": [case(X[:, :1], [ints(2, 3, 1)]), case(X, [ints(2, 1, 1, 4)])],
    "Tile": [case(X, [ints(1, 2, 3)])],
    "Concat": [case(X, normal(2, 5, 4), axis=1), case(X, [normal(2, 1, 4)], axis=-2)],
    "Split": [
        case(X, outputs=2, axis=2, at=(11, 17)),
        case(X, [ints(1, 3)], outputs=2, axis=-1, at=(13, 23)),
        case(X, outputs=2, axis=1, num_outputs=2, at=(18, 23)),
    ],
    "Slice": [
        case(X, [ints(1)], [ints(2**63 - 1)], [ints(1)]),
        case(X, [ints(0, -1)], [ints(-1, -9)], [ints(1, 2)], [ints(1, -2)]),
        case(X, [ints(-1)], [ints(-(2**62))], [ints(2)], [ints(-1)]),
    ],
    "Pad": [
        case(IMAGE, [ints(0, 0, 1, 2, 0, 1, 0, 1)], [np.float32(2)]),
        case(IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1)], mode="reflect"),
        case(IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1)], mode="edge"),
        case(IMAGE, [ints(1, 2)], [np.float32(0)], [ints(-1)], at=(18, 23)),
    ],
    "Gather": [
        case([TABLE], IDS), case(X, [np.array(-1)], axis=1), case(X, [ints(0, -1)], axis=2), case(X, IDS % 2, axis=0),
    ],
    "GatherElements": [case(X, np.array([[[0, -1, 1, 0]]] * 2), axis=1)],
    "GatherND": [case(X, np.array([[0, 1], [-1, 2]]))],
    "ScatterND": [
        case(X, [np.array([[0, 1], [1, 2]])], normal(2, 4)),
        case(X, [np.array([[1], [0]])], X, reduction="add", at=(16, 23)),
    ],
    "ScatterElements": [
        case(X, np.array([[[0, -1, 1, 0]]] * 2), normal(2, 1, 4), axis=1),
        case(X, np.array([[[0, -1, 1, 0]]] * 2), normal(2, 1, 4), axis=1, reduction="add", at=(16, 23)),
    ],
    "OneHot": [
        case(IDS, [np.array(9)], [np.array([0, 1], dtype=np.float32)]),
        case(IDS, [ints(9)], [ints(2, 5)], axis=1),
    ],
    "Trilu": [case(X, at=(14, 23)), case(X, [np.array(1)], upper=0, at=(14, 23))],
    "ConstantOfShape": [case([ints(2, 3)]), case([ints(2, 3)], value=helper.make_tensor("v", 7, [1], [4]))],
    "Range": [
        case([np.array(1)], [np.array(9)], [np.array(3)]),
        case([np.float32(0)], [np.float32(2)], [np.float32(0.5)]),
    ],
    "EyeLike": [case(X[0], k=1)],
    "Resize": [
        case(IMAGE, [normal(0)], [np.array([1, 1, 2, 2], np.float32)], mode=mode, coordinate_transformation_mode=where)
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        if not (mode == "cubic" and where == "asymmetric")
    ]
    + [
        case(IMAGE, [normal(0)], [np.array([1, 1, 0.6, 1.7], np.float32)], mode=mode, nearest_mode=rounding)
        for mode, rounding in [("linear", "floor"), *(("nearest", r) for r in ("floor", "ceil", "round_prefer_ceil"))]
    ]
    + [
        case(IMAGE, [normal(0)], [normal(0)], [ints(2, 4, 14, 5)], mode=mode, coordinate_transformation_mode=where)
        for mode, where in (("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "asymmetric"))
    ],
    "DepthToSpace": [case(normal(2, 8, 3, 2), blocksize=2, mode=mode) for mode in ("DCR", "CRD")],
    "SpaceToDepth": [case(normal(2, 3, 4, 6), blocksize=2)],
    "GridSample": [case(IMAGE, np.tanh(normal(2, 3, 5, 2)), align_corners=a, at=(20, 23)) for a in (0, 1)],
    "Attention": [
        case(normal(2, 2, 3, 4), normal(2, 2, 5, 4), normal(2, 2, 5, 4, seed=1), at=(23, 23)),
        case(normal(2, 3, 8), normal(2, 3, 4), normal(2, 3, 4, seed=1), q_num_heads=4, kv_num_heads=2, at=(23, 23)),
    ],
    "com.microsoft::Gelu": [case(X)],
    "com.microsoft::FastGelu": [case(X), case(X, [normal(4)])],
    "com.microsoft::BiasGelu": [case(X, [normal(4)])],
    "com.microsoft::QuickGelu": [case(X)],
    "com.microsoft::FusedMatMul": [case(X, normal(2, 5, 4), transB=1, alpha=0.5)],
    "com.microsoft::SkipLayerNormalization": [case(X, X + 1, [normal(4)], [normal(4)], [normal(4)])],
    "SimplifiedLayerNormalization": [case(X, [normal(4)])],
}  # fmt: skip
NOT_HELD = {LINEAR, "Upsample"}
"""What no file of these opsets holds: the first is made of others, the second ended before them."""


def written() -> list[Any]:
    return [
        pytest.param(op, one, opset, id=f"{op}-{number}-{opset}")
        for op, cases in CASES.items()
        for number, one in enumerate(cases)
        for opset in (OPSETS if len(cases) < 4 else (OPSETS[0], OPSETS[2], OPSETS[4]))
        if one.opsets[0] <= opset <= one.opsets[1]
    ]


@pytest.mark.parametrize(("op", "one", "opset"), written())
def test_a_translation_gives_what_onnxruntime_gives(op: str, one: Case, opset: int, tmp_path: Path) -> None:
    domain, _, name = op.rpartition("::")
    given = {f"i{i}": a for i, a in enumerate(one.inputs) if not isinstance(a, list)}
    constants = {f"i{i}": np.asarray(a[0]) for i, a in enumerate(one.inputs) if isinstance(a, list)}
    outputs = [f"o{i}" for i in range(one.outputs)]
    node = helper.make_node(name, [f"i{i}" for i in range(len(one.inputs))], outputs, domain=domain, **one.attributes)
    described = {n: (a.dtype, a.shape) for n, a in given.items()}
    path = write(
        tmp_path / "m.onnx", [node], described, outputs, constants, opset=opset, domains=[domain] * bool(domain)
    )
    try:
        want = run(path, given)
    except Exception as failure:
        if "NOT_IMPLEMENTED" in str(failure) or "is not a registered function" in str(failure):
            pytest.skip(str(failure)[:80])
        raise
    module, _ = read_module(path)
    with torch.no_grad():
        got = module.compute({n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in given.items()})
    for key, value in want.items():
        assert got[key].numpy().dtype == value.dtype
        np.testing.assert_allclose(got[key].numpy(), value, rtol=2e-4, atol=2e-5)


def test_every_op_is_held_to_onnxruntime() -> None:
    assert set(CASES) | NOT_HELD == set(TRANSLATIONS)
    assert len(TRANSLATIONS) > 100
