"""The target without its tools, float16 ranges, profiles, and the ops that are spelt out for converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from torch import Tensor, nn

from fxprune import registry
from fxprune.backends.tensorrt import toolchain
from fxprune.backends.tensorrt.backend import TensorRTBackend
from fxprune.backends.tensorrt.legalize import PoolByMean, SpellOutGathers, SpellOutMaxima
from fxprune.backends.tensorrt.profiles import profiles, ranges
from fxprune.data.batch import Batch, Calibration
from fxprune.errors import LoweringError, MissingDevice, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline, Transform
from fxprune.ir.program import Program
from fxprune.target.backend import lower_and_verify
from fxprune.target.parity import check_parity, eager

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


class Perceptron(nn.Module):
    """Two layers; the gain between them decides whether float16 holds."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.one, self.two, self.gain = nn.Linear(8, 16), nn.Linear(16, 4), gain

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu() * self.gain) / self.gain  # the line that grows


def perceptron(gain: float = 1.0) -> Program:
    torch.manual_seed(0)
    return capture(Perceptron(gain).eval(), (torch.randn(2, 8),))


# ---------------------------------------------------------------- without the tools


@pytest.mark.drawn(2)
@needs_no_gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance", "runtime"),
    [
        ("fp32", 1e-4, "onnxruntime"),
        ("tf32", 5e-3, "onnxruntime"),
        ("fp16", 2e-2, "onnxruntime"),
        ("bf16", 5e-2, "PyTorch (onnxruntime has no bfloat16"),
    ],
)
def test_what_can_be_written_is_and_what_is_missing_is_said(
    dtype: str, tolerance: float, runtime: str, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    lowered, parity = lower_and_verify(registry.target(f"trt{{dtype={dtype}}}"), perceptron(), tmp_path)
    assert lowered.payload == tmp_path / "model.onnx"
    model = onnx.load(lowered.payload)
    assert model.opset_import[0].version <= 20
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT  # as captured
    kinds = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    assert {i.data_type for i in model.graph.initializer if "weight" in i.name} == {
        kinds.get(dtype, onnx.TensorProto.FLOAT)
    }
    assert parity.ok
    assert parity.tolerance == tolerance
    assert lowered.runtime.startswith(runtime)
    assert any("NVIDIA GPU" in m for m in lowered.missing)
    assert ("--noTF32" in lowered.about["trtexec"]) == (dtype == "fp32")
    assert "--maxShapes=x:32x8" in lowered.about["trtexec"]


@needs_no_gpu
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.util, "find_spec", lambda name: None)
    found, missing = toolchain.find("dynamo", elsewhere=True)
    assert found is None
    assert "torch-tensorrt: pip install 'fxprune[tensorrt]'" in missing
    assert any("NVIDIA GPU" in m for m in missing)


@needs_no_gpu
def test_a_folder_of_its_name_is_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toolchain.util.find_spec
    monkeypatch.setattr(toolchain.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else real(name))
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if (spec := real("tensorrt")) is None or spec.origin is not None:
        pytest.skip("TensorRT is installed")
    assert any("tensorrt" in m for m in toolchain.find("onnx", elsewhere=True)[1])


@needs_no_gpu
def test_an_engine_is_not_run_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(MissingDevice, match="cannot be run here") as caught:
        TensorRTBackend().load(tmp_path / "model.engine")
    assert caught.value.exit_code == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_on_a_gpu_the_engine_computes_the_program(dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_tensorrt")
    lowered, parity = lower_and_verify(registry.target(f"trt{{dtype={dtype}}}"), perceptron(), tmp_path)
    assert lowered.payload.name == "model.engine"
    assert not lowered.missing
    assert parity.ok
    assert lowered.runtime.startswith("TensorRT")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trt{dtype=fp8}", "'fp8' is not known"),
        ("trt{via=parser}", "'parser' is not known"),
        ("trt{hardware=volta}", "'volta' is not known"),
        ("trt{workspace=lots}", "not an amount of memory"),
        ("trt{optimization_level=6}", "no optimization level 6"),
        ("trt{shapes=batch:4:2:8}", "not a range of sizes"),
        ("trt{capability=ada}", "names no compute capability"),
        ("trt{opset=23}", "opset 23 is not supported"),
        ("trt{dtyp=fp16}", "no option 'dtyp'"),
        ("trt{sparse_weights=perhaps}", "not of the right type"),
    ],
)
def test_options_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        registry.target(text)


def test_options_are_read_and_written_back() -> None:
    made: Any = registry.target("trt{dtype=fp16, workspace=4GiB, sparse_weights=true, timing-cache=off}")
    assert made.options == {"dtype": "fp16", "workspace": "4GiB", "timing_cache": "off", "sparse_weights": True}
    assert registry.target(made.text) == made


# ---------------------------------------------------------------- shapes


def test_profiles_follow_what_was_captured() -> None:
    module, args, kwargs = zoo.build("bert", 0)
    program = capture(module, args, kwargs)
    sizes = ranges(program, {})
    assert sizes == {"batch": (1, 2, 32), "sequence": (1, 9, 32)}  # 32 positions; nothing bounds the batch
    one = profiles(program, ranges(program, {"batch": (1, 8, 64), "sequence": (4, 16, 32)}))[0]
    assert one.shapes == ((1, 4), (8, 16), (64, 32))
    assert one.dtype is torch.int64
    with pytest.raises(OptionError, match="not captured for sequence from 1 to 64"):
        ranges(program, {"sequence": (1, 16, 64)})
    with pytest.raises(OptionError, match="no open size 'length'"):
        ranges(program, {"length": (1, 2, 3)})


# ---------------------------------------------------------------- float16


@needs_no_gpu
def test_an_overflow_names_the_node_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="float16 overflows") as caught:
        lower_and_verify(registry.target("trt{dtype=fp16}"), perceptron(3e5), tmp_path)
    assert "node mul" in caught.value.where
    assert "the line that grows" in caught.value.where
    assert "65504" in caught.value.why
    assert "bf16" in caught.value.cure
    assert not list(tmp_path.iterdir())
    assert lower_and_verify(registry.target("trt{dtype=bf16}"), perceptron(3e5), tmp_path)[1].ok


@needs_no_gpu
def test_calibration_data_decides_where_it_is_given(tmp_path: Path) -> None:
    """The example is harmless; one of the samples is not."""
    program = perceptron(300.0)
    backend = registry.target("trt{dtype=fp16}")
    assert lower_and_verify(backend, program, tmp_path)[1].ok
    loud = Calibration((Batch((torch.randn(2, 8),), {}), Batch((1e3 * torch.randn(2, 8),), {})), "test")
    with pytest.raises(LoweringError, match="float16 overflows") as caught:
        lower_and_verify(backend.with_data(loud), program, tmp_path / "loud")
    assert "on 4 samples" in caught.value.why


@needs_no_gpu
def test_little_room_is_a_note(tmp_path: Path) -> None:
    lowered, _ = lower_and_verify(registry.target("trt{dtype=fp16}"), perceptron(3e4), tmp_path)
    assert lowered.about["float16"]["headroom"] < 2
    assert any("float16 is tight: node" in note for note in lowered.notes)


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Perceptron().eval()
    with torch.no_grad():
        model.two.weight[0, 0] = 1e5
    with pytest.raises(LoweringError, match="cannot hold a weight") as caught:
        lower_and_verify(registry.target("trt{dtype=fp16}"), capture(model, (torch.randn(2, 8),)), tmp_path)
    assert caught.value.where == "two.weight"


# ---------------------------------------------------------------- ops spelt out


class Gathers(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(self.dim, index)


class Extremes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (*x.max(-1), x.min(1, keepdim=True).values, x.max(0).indices)


class Pools(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)


@pytest.mark.parametrize(
    ("law", "model", "inputs"),
    [
        (SpellOutGathers(), Gathers(1), (torch.randn(3, 7, 4), torch.randint(0, 7, (3, 5, 4)))),
        (SpellOutGathers(), Gathers(-1), (torch.randn(3, 7, 9), torch.randint(0, 9, (3, 5, 2)))),
        (SpellOutMaxima(), Extremes(), (torch.randn(3, 5, 6),)),
        (PoolByMean(), Pools(), (torch.randn(2, 3, 5, 5),)),
    ],
    ids=["gather-middle", "gather-short", "extremes", "pool"],
)
def test_what_is_spelt_out_computes_the_same(law: Transform, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    program = capture(model, inputs)
    spelt = Pipeline((law,)).run(program)
    gone = {SpellOutGathers: "gather", SpellOutMaxima: "max.dim", PoolByMean: "adaptive"}[type(law)]
    assert any(gone in str(n.target) for n in program.graph.nodes)
    assert not any(gone in str(n.target) for n in spelt.graph.nodes)
    parity = check_parity(program, eager(spelt.exported))
    assert len(parity.tried) > 1
    assert parity.max_rel < 1e-6
