"""The ONNX file as bytes: what it holds, what is refused before it is written, and what writing takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fxprune.backends.onnx import file as onnx_file
from fxprune.backends.onnx.file import SMALL, write_checked
from fxprune.errors import LoweringError

DTYPES = (np.float32, np.float16, np.int64, np.bool_)


def made(sizes: list[tuple[int, int]], dtype: Any = np.float32) -> onnx.ModelProto:
    """A model that gathers rows of every constant and returns them."""
    values = np.random.default_rng(0)
    weights = [numpy_helper.from_array(values.normal(size=s).astype(dtype), f"w{i}") for i, s in enumerate(sizes)]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("Gather", [f"w{i}", "row"], [f"y{i}"]) for i in range(len(sizes))]
    outputs = [helper.make_tensor_value_info(f"y{i}", kind, ["n", s[1]]) for i, s in enumerate(sizes)]
    row = helper.make_tensor_value_info("row", TensorProto.INT64, ["n"])
    graph = helper.make_graph(nodes, "rows", [row], outputs, weights)
    return helper.make_model(graph, producer_name="test", opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_the_file_holds_the_model_whatever_its_weights(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], dtype: Any, inline: bool
) -> None:
    """Weights below and above a kilobyte, and lengths of one to three bytes in the file."""
    folder, model = tmp_path_factory.mktemp("file"), onnx_ir.from_proto(made(sizes, dtype))
    whole = onnx_ir.to_proto(model)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    write_checked(model, folder / "model.onnx", inline)
    assert all(value.const_value is held[name] for name, value in model.graph.initializers.items())
    assert {p.name for p in folder.iterdir()} == {"model.onnx"} | (set() if inline else {"model.onnx.data"})
    read = onnx.load(str(folder / "model.onnx"))
    for one in (whole, read):
        one.graph.initializer.sort(key=lambda t: t.name)
    for want, got in zip(whole.graph.initializer, read.graph.initializer, strict=True):
        assert want.name == got.name
        np.testing.assert_array_equal(numpy_helper.to_array(want), numpy_helper.to_array(got))
    for one in (whole, read):
        del one.graph.initializer[:]
    assert whole.SerializeToString(deterministic=True) == read.SerializeToString(deterministic=True)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / str(i) / "model.onnx" for i in range(2)]
    for path in files:
        path.parent.mkdir()
        write_checked(onnx_ir.from_proto(made([(40, 30), (2, 2)])), path, inline=True)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda graph: setattr(graph.node[0], "op_type", "Nonsense"), "not valid ONNX"),
        (lambda graph: graph.node[0].input.pop(), "not valid ONNX"),
        (lambda graph: setattr(graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 7), "contradict"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(damage: Any, said: str, tmp_path: Path) -> None:
    proto = made([(40, 30)])
    damage(proto.graph)
    with pytest.raises(LoweringError, match=said) as found:
        write_checked(onnx_ir.from_proto(proto), tmp_path / "model.onnx", inline=True)
    assert found.value.where == "rows"
    assert not list(tmp_path.iterdir())


def test_the_checker_is_given_no_large_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    check = onnx.checker.check_model

    def seen(path: str, full_check: bool) -> None:
        lengths.append(Path(path).stat().st_size)
        check(path, full_check=full_check)

    monkeypatch.setattr(onnx.checker, "check_model", seen)
    write_checked(onnx_ir.from_proto(made([(400, 300), (8, 8)])), tmp_path / "model.onnx", inline=True)
    assert len(lengths) == 1
    assert SMALL > lengths[0] > 8 * 8 * 4, "shape inference may read small ones"
    assert (tmp_path / "model.onnx").stat().st_size > 480_000


def test_lengths_are_varints() -> None:
    for length in (0, 1, 127, 128, 300, 16383, 16384, 2**31):
        tag, *rest = onnx_file._field(7, length)
        assert tag == 7 << 3 | 2
        assert sum((byte & 127) << 7 * i for i, byte in enumerate(rest)) == length
        assert [byte > 127 for byte in rest] == [True] * (len(rest) - 1) + [False]
