"""ONNX files as models: what they become, how near that is to the file, and what is said of those that cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.onnx_files import normal, perceptron, run, write

from fxprune.errors import LoadError
from fxprune.intake.capture import capture
from fxprune.intake.load import Loaded, load
from fxprune.intake.onnx.module import read_module
from fxprune.intake.onnx.parity import COMPARED
from fxprune.ir.program import Program
from fxprune.ir.signature import dim_names


def opened(path: Path) -> tuple[Loaded, Program]:
    loaded = load(path)
    return loaded, capture(loaded.model, loaded.args, loaded.kwargs, name=loaded.name)


# --- what a file becomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 18, 23])
def test_a_file_is_proven_at_two_sizes_and_keeps_its_names(opset: int, tmp_path: Path) -> None:
    loaded, program = opened(perceptron(tmp_path / "net.onnx", opset=opset))
    (link,) = loaded.proof
    assert (link.compared, link.tried) == (COMPARED, ({"batch": 2}, {"batch": 3}))
    assert link.max_rel < 1e-5
    assert program.user_inputs == ["x"]
    assert list(program.exported.module()(torch.zeros(5, 16))) == ["logits"]
    assert set(program.exported.state_dict) == {f"net.{a}.{b}" for a in ("up", "down") for b in ("weight", "bias")}


def test_products_with_a_constant_are_linear_layers(tmp_path: Path) -> None:
    _, program = opened(perceptron(tmp_path / "net.onnx"))
    ops = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert ops.count(torch.ops.aten.linear.default) == 2
    assert len(ops) == 3, "the bias is the layer's, and nothing else is left of the product"


def test_a_fixed_size_stays_fixed(tmp_path: Path) -> None:
    loaded, program = opened(perceptron(tmp_path / "net.onnx", batch=1))
    assert dim_names(program) == {}
    assert loaded.args[0].shape == (1, 16)
    with pytest.raises(LoadError, match="fixes dimension 0 of 'x' at 1"):
        load(tmp_path / "net.onnx", input="4x16")


def attention(path: Path, *, heads: int = 2, lie: str = "seq") -> Path:
    """Ids and their mask, with the shape arithmetic that exporters write."""
    width, make = 8, helper.make_node
    nodes = [
        make("Gather", ["table", "ids"], ["e"], name="/emb/Gather"),
        make("Shape", ["ids"], ["shape"], name="/Shape"),
        make("Concat", ["shape", "split"], ["whole"], axis=0),
        make("MatMul", ["e", "wq"], ["q_flat"], name="/att/q/MatMul"),
        make("MatMul", ["e", "wk"], ["k_flat"], name="/att/k/MatMul"),
        make("MatMul", ["e", "wv"], ["v_flat"], name="/att/v/MatMul"),
    ]
    for one in "qkv":
        perm = [0, 2, 3, 1] if one == "k" else [0, 2, 1, 3]
        nodes += [
            make("Reshape", [f"{one}_flat", "whole"], [f"{one}_r"]),
            make("Transpose", [f"{one}_r"], [one], perm=perm),
        ]
    nodes += [
        make("MatMul", ["q", "k"], ["scores"]),
        make("Unsqueeze", ["mask", "axes"], ["mask4"]),
        make("Cast", ["mask4"], ["keep"], to=TensorProto.BOOL),
        make("Where", ["keep", "scores", "least"], ["masked"]),
        make("Softmax", ["masked"], ["share"]),
        make("MatMul", ["share", "v"], ["mixed"]),
        make("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        make("Reshape", ["turned", "flat"], ["joined"]),
        make("MatMul", ["joined", "wo"], ["out"], name="/att/o/MatMul"),
    ]
    constants = {
        "table": normal(11, width), "split": np.array([heads, width // heads]), "axes": np.array([1, 2]),
        "least": np.float32(-1e4), "flat": np.array([0, 0, width]),
        **{f"w{n}": normal(width, width, seed=i) for i, n in enumerate("qkvo")},
    }  # fmt: skip
    inputs = {"ids": ("int64", ["n", "seq"]), "mask": ("int64", ["n", lie])}
    return write(path, nodes, inputs, ["out"], constants)


def test_open_sizes_of_one_word_are_one_size(tmp_path: Path) -> None:
    loaded, program = opened(attention(tmp_path / "a.onnx"))
    assert sorted(dim_names(program).values()) == ["batch", "sequence"]
    assert not program.notes
    assert loaded.model.vocabulary == 11
    assert int(loaded.args[0].max()) < 11
    given = {"ids": np.array([[1, 10, 3]] * 4), "mask": np.array([[1, 1, 0]] * 4)}
    got = program.exported.module()(*(torch.from_numpy(a) for a in given.values()))
    np.testing.assert_allclose(got["out"].detach().numpy(), run(loaded.model.path, given)["out"], rtol=1e-4, atol=1e-4)


def test_shape_arithmetic_leaves_nothing_in_the_program(tmp_path: Path) -> None:
    _, program = opened(attention(tmp_path / "a.onnx"))
    names = {str(n.target) for n in program.graph.nodes}
    assert not [n for n in names if "stack" in n or "scalar_tensor" in n or "cat" in n]


def test_names_come_from_paths(tmp_path: Path) -> None:
    loaded, _ = opened(attention(tmp_path / "a.onnx"))
    assert {n for n, _ in loaded.model.named_parameters()} == {"emb.weight", *(f"att.{n}.weight" for n in "qkvo")}


def test_inputs_whose_names_are_no_words_are_taken(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["serving:0", "class"], ["y:0"])]
    path = write(tmp_path / "n.onnx", nodes, {"serving:0": ("float32", [2]), "class": ("float32", [2])}, ["y:0"])
    module, _ = read_module(path)
    made = module(torch.ones(2), torch.ones(2))
    assert made["y:0"].tolist() == [2, 2]
    with pytest.raises(TypeError, match="the file takes"):
        module(torch.ones(2))


def test_a_copy_of_the_module_computes_with_its_own_weights(tmp_path: Path) -> None:
    module, _ = read_module(perceptron(tmp_path / "net.onnx"))
    other = copy.deepcopy(module)
    for weight in other.parameters():
        weight.data.zero_()
    with torch.no_grad():
        assert not other(torch.ones(1, 16))["logits"].any()
        assert module(torch.ones(1, 16))["logits"].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats(dtype: Any, tmp_path: Path) -> None:
    weight = normal(8, 4).astype(dtype)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    path = write(tmp_path / "h.onnx", nodes, {"x": (dtype, ["n", 8])}, ["y"], {"w": weight})
    loaded, program = opened(path)
    assert loaded.proof[0].max_rel <= loaded.proof[0].tolerance
    assert {str(t.dtype) for t in program.tensors.values()} == {f"torch.{np.dtype(dtype)}"}


def test_bfloat16_is_read_and_told_that_it_was_not_compared(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [8, 4], normal(8, 4).flatten().tolist())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "b.onnx")
    loaded = load(tmp_path / "b.onnx")
    assert not loaded.proof
    assert "not held against the file" in loaded.notes[0]
    assert next(loaded.model.parameters()).dtype is torch.bfloat16


def test_equal_rows_that_are_kept_once_are_each_layers_own_and_matrices_stay_tied(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Gather", ["table", "ids"], ["e"], name="/emb/Gather"),
        make("Add", ["e", "row"], ["a"], name="/a/Add"),
        make("Mul", ["a", "row"], ["b"], name="/b/Mul"),
        make("Transpose", ["table"], ["t"], perm=[1, 0]),
        make("MatMul", ["b", "t"], ["y"], name="/head/MatMul"),
    ]
    constants = {"table": normal(9, 4), "row": normal(4)}
    path = write(tmp_path / "t.onnx", nodes, {"ids": ("int64", ["n", 3])}, ["y"], constants)
    loaded, _ = opened(path)
    assert sorted(n for n, _ in loaded.model.named_parameters()) == ["a.bias", "b.scale", "emb.weight"]


def test_boxes_are_returned_in_place_of_those_that_stay(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("MatMul", ["x", "w"], ["boxes"], name="/head/boxes/MatMul"),
        make("ReduceMax", ["boxes"], ["best"], axes=[2], keepdims=0, name="/best"),
        make("Unsqueeze", ["best", "axis"], ["scores"], name="/scores"),
        make("NonMaxSuppression", ["boxes", "scores", "most"], ["kept"], name="/nms"),
        make("Cast", ["kept"], ["out"], to=TensorProto.FLOAT),
    ]
    constants = {"w": normal(8, 4), "axis": np.array([1]), "most": np.array([3])}
    path = write(tmp_path / "b.onnx", nodes, {"x": ("float32", ["n", 5, 8])}, ["out", "best"], constants, opset=13)
    loaded, program = opened(path)
    assert "/nms (NonMaxSuppression) and what stands behind it are left out" in loaded.notes[0]
    assert "boxes, scores" in loaded.notes[0]
    assert list(program.exported.module()(torch.zeros(2, 5, 8))) == ["best", "boxes", "scores"]
    assert loaded.proof[0].max_rel < 1e-5


def test_functions_of_the_file_are_written_out(tmp_path: Path) -> None:
    path = perceptron(tmp_path / "f.onnx")
    model = onnx.load(path)
    double = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    model.functions.append(double)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[-1].output[0] = "once"
    model.graph.node.append(helper.make_node("Twice", ["once"], ["logits"], domain="own"))
    onnx.save(model, path)
    assert opened(path)[0].proof[0].max_rel < 1e-5


# --- formulas that are one op ---------------------------------------------------------------------------------------


def formulas(path: Path, *, power: str = "Pow", half_first: bool = False, leak: bool = False) -> Path:
    """A layer norm and a GELU, op by op. leak: an output reads the variance"""
    make = helper.make_node
    square = make("Pow", ["d", "two"], ["d2"]) if power == "Pow" else make("Mul", ["d", "d"], ["d2"])
    tail = (
        [make("Mul", ["n", "half"], ["h"]), make("Mul", ["h", "g2"], ["y"])]
        if half_first
        else [make("Mul", ["n", "g2"], ["h"]), make("Mul", ["h", "half"], ["y"])]
    )
    nodes = [
        make("ReduceMean", ["x"], ["mean"], axes=[-1], name="/norm/ReduceMean"),
        make("Sub", ["x", "mean"], ["d"], name="/norm/Sub"),
        square,
        make("ReduceMean", ["d2"], ["var"], axes=[-1], name="/norm/ReduceMean_1"),
        make("Add", ["var", "eps"], ["more"]),
        make("Sqrt", ["more"], ["root"]),
        make("Div", ["d", "root"], ["unit"], name="/norm/Div"),
        make("Mul", ["unit", "w"], ["scaled"], name="/norm/Mul"),
        make("Add", ["scaled", "b"], ["n"], name="/norm/Add"),
        make("Div", ["n", "root2"], ["g0"], name="/act/Div"),
        make("Erf", ["g0"], ["g1"]),
        make("Add", ["g1", "one"], ["g2"]),
        *tail,
    ]
    numbers = {"two": 2, "eps": 1e-3, "root2": 2**0.5, "one": 1, "half": 0.5}
    constants = {"w": normal(8), "b": normal(8, seed=1), **{n: np.float32(v) for n, v in numbers.items()}}
    outputs = ["y", "var"] if leak else ["y"]
    return write(path, nodes, {"x": ("float32", ["n", 3, 8])}, outputs, constants, opset=17)


@pytest.mark.parametrize("power", ["Pow", "Mul"])
@pytest.mark.parametrize("half_first", [False, True])
def test_a_norm_and_a_gelu_that_are_written_out_are_one_op_each(power: str, half_first: bool, tmp_path: Path) -> None:
    loaded, program = opened(formulas(tmp_path / "f.onnx", power=power, half_first=half_first))
    ops = [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "sym" not in str(n.target)]
    assert ops == ["aten.layer_norm.default", "aten.gelu.default"]
    assert sorted(n for n, _ in loaded.model.named_parameters()) == ["norm.bias", "norm.weight"]
    assert loaded.proof[0].max_rel < 1e-5


def test_a_norm_that_something_else_looks_into_stays_as_it_is(tmp_path: Path) -> None:
    loaded, program = opened(formulas(tmp_path / "f.onnx", leak=True))
    assert "aten.layer_norm.default" not in {str(n.target) for n in program.graph.nodes}
    assert loaded.proof[0].max_rel < 1e-5
