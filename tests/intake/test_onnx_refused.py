"""ONNX files that are refused, each with what, where, why and cure; and where the data beside a file may lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support.onnx_files import Array, normal, perceptron, write

from fxprune.errors import CaptureError, FxpruneError
from fxprune.intake.load import load
from fxprune.intake.onnx import parity, table
from fxprune.intake.onnx.module import read_module


def refused(path: Path) -> FxpruneError:
    with pytest.raises(FxpruneError) as caught:
        load(path)
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.where
    assert caught.value.cure
    return caught.value


# --- data beside the file -------------------------------------------------------------------------------------------


def with_data(folder: Path) -> Path:
    path = perceptron(folder / "net.onnx", width=512)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="net.data", size_threshold=64)
    return path


def placed(path: Path, **said: str) -> Path:
    """The file with another word about where the data of its first tensor lie."""
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = said.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


def test_data_beside_the_file_are_read(tmp_path: Path) -> None:
    loaded = load(with_data(tmp_path))
    assert loaded.proof[0].max_rel < 1e-5


@pytest.mark.parametrize("location", ["../net.data", "/etc/hostname", "", "a/../../net.data", "..\\net.data"])
def test_data_outside_the_folder_are_not_read(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = with_data(tmp_path / "in")
    (tmp_path / "net.data").write_bytes((tmp_path / "in" / "net.data").read_bytes())
    error = refused(placed(path, location=location))
    assert error.what == "the file names data outside its folder"
    assert "initialiser onnx::MatMul_1" in error.where


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = with_data(tmp_path / "in")
    (tmp_path / "in" / "net.data").rename(tmp_path / "out.data")
    (tmp_path / "in" / "net.data").symlink_to(tmp_path / "out.data")
    assert "outside its folder" in refused(path).what


@pytest.mark.parametrize("said", [{"offset": "999999"}, {"length": "3"}, {"offset": "-4"}, {"length": "x"}])
def test_data_that_do_not_fit_their_file_are_refused(said: dict[str, str], tmp_path: Path) -> None:
    assert "onnx::MatMul_1" in refused(placed(with_data(tmp_path), **said)).where


def test_missing_data_are_named(tmp_path: Path) -> None:
    path = with_data(tmp_path)
    (tmp_path / "net.data").unlink()
    error = refused(path)
    assert error.what == "the file with the model's data is missing"
    assert "net.data" in error.why


# --- what is refused ------------------------------------------------------------------------------------------------


def holding(path: Path, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> Path:
    node = helper.make_node(op, inputs, ["y"], name=f"/odd/{op}", domain=domain, **attributes)
    domains = [domain] if domain else []
    return write(
        path, [node], {"x": ("float32", ["n", 4])}, ["y"], {"w": normal(4, 4), "z": normal(1)}, domains=domains
    )


BRANCH = helper.make_graph([], "g", [], [])


@pytest.mark.parametrize(
    ("op", "says", "attributes"),
    [
        ("If", "control flow", {"then_branch": BRANCH, "else_branch": BRANCH}),
        ("Loop", "control flow", {"body": BRANCH}),
        ("LSTM", "recurrent", {}),
        ("GRU", "recurrent", {}),
        ("QLinearConv", "quantised", {}),
        ("DequantizeLinear", "quantised", {}),
        ("MatMulInteger", "quantised", {}),
        ("NonZero", "depends on values", {}),
        ("RandomUniformLike", "random", {}),
        ("SequenceConstruct", "sequences", {}),
        ("Bogus", "no translation", {}),
    ],
)
def test_ops_that_cannot_be_are_refused_with_their_node(
    op: str, says: str, attributes: dict[str, Any], tmp_path: Path
) -> None:
    error = refused(holding(tmp_path / "m.onnx", op, ["x", "w"], **attributes))
    assert says in error.what
    assert f"node /odd/{op} ({op})" in error.where


def test_ops_of_others_are_named_with_their_domain(tmp_path: Path) -> None:
    error = refused(holding(tmp_path / "m.onnx", "Secret", ["x"], domain="acme"))
    assert "acme::Secret" in error.what
    assert "of the file's own" in error.why


def test_a_form_of_an_op_that_is_not_covered_is_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("MaxPool", ["x"], ["y", "places"], name="/pool", kernel_shape=[2, 2])]
    path = write(tmp_path / "p.onnx", nodes, {"x": ("float32", ["n", 2, 4, 4])}, ["y", "places"])
    error = refused(path)
    assert "MaxPool is not translated as it stands here" in error.what
    assert "node /pool" in error.where


def test_shapes_that_depend_on_values_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("ConstantOfShape", ["sizes"], ["y"], name="/made"),
    ]
    path = write(tmp_path / "v.onnx", nodes, {"x": ("float32", [2])}, ["y"])
    assert "sizes that depend on values" in refused(path).what


def test_a_quantised_dtype_is_refused(tmp_path: Path) -> None:
    path = holding(tmp_path / "q.onnx", "Identity", ["x"])
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("q", TensorProto.FLOAT8E4M3FN, [1], [1.0]))
    onnx.save(model, path)
    assert "before quantisation" in refused(path).cure


@pytest.mark.parametrize("opset", [9, 30])
def test_other_opsets_are_refused_with_the_converter(opset: int, tmp_path: Path) -> None:
    path = perceptron(tmp_path / "net.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = opset
    path.write_bytes(model.SerializeToString())
    error = refused(path)
    assert f"it is {opset}" in error.why
    assert "convert_version" in error.cure


def test_damaged_files_are_refused_whatever_is_wrong(tmp_path: Path) -> None:
    whole = perceptron(tmp_path / "net.onnx").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "bad.onnx"
    for cut in (1, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        refused(path)
    errors = []
    for _ in range(60):
        broken = bytearray(whole)
        broken[int(generator.integers(len(broken)))] = int(generator.integers(256))
        path.write_bytes(broken)
        try:
            load(path)
        except FxpruneError as error:  # anything else is a defect
            errors.append(error)
    assert errors
    assert all(error.what and error.where for error in errors)


def test_a_graph_that_is_not_whole_names_what_is_missing(tmp_path: Path) -> None:
    error = refused(holding(tmp_path / "m.onnx", "Add", ["x", "gone"]))
    assert "'gone'" in error.why


def test_texts_as_inputs_are_refused(tmp_path: Path) -> None:
    path = holding(tmp_path / "m.onnx", "Identity", ["x"])
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    onnx.save(model, path)
    assert "texts" in refused(path).what


def test_a_wrong_translation_is_an_error_that_names_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = perceptron(tmp_path / "net.onnx")
    monkeypatch.setitem(table.TRANSLATIONS, "Relu", table.Translation(lambda op, x: x.abs()))
    with pytest.raises(CaptureError) as caught:
        load(path)
    assert "node /net/act/Relu (Relu)" in caught.value.where
    assert "output logits" in caught.value.where


def test_tiny_outputs_of_a_sigmoid_are_held_against_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Sub", ["h", "far"], ["low"]),
        helper.make_node("Sigmoid", ["low"], ["y"]),
    ]
    constants = {"w": normal(8, 4) * np.float32(0.1), "far": np.float32(16)}
    path = write(tmp_path / "s.onnx", nodes, {"x": ("float32", ["n", 8])}, ["y"], constants)
    assert load(path).proof[0].max_rel <= 1e-4
    monkeypatch.setattr(parity, "_BOUNDED", frozenset())
    monkeypatch.setattr(parity, "_is_rounding", lambda *_: False)
    with pytest.raises(CaptureError):
        load(path)


def test_a_missing_onnxruntime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = perceptron(tmp_path / "net.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "pip install onnxruntime" in refused(path).cure


def test_numbers_in_typed_fields_are_read(tmp_path: Path) -> None:
    values: Array = normal(3, 4)
    path = write(
        tmp_path / "c.onnx",
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"x": ("float32", [3, 4])},
        ["y"],
        {"w": values},
    )
    model = onnx.load(path)
    packed = TensorProto(dims=[3, 4], data_type=TensorProto.FLOAT, name="w", float_data=values.flatten().tolist())
    model.graph.initializer[0].CopyFrom(packed)
    onnx.save(model, path)
    module, _ = read_module(path)
    assert torch.equal(module(torch.zeros(3, 4))["y"], torch.from_numpy(numpy_helper.to_array(packed)))
