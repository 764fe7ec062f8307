"""ONNX: one exact file, its names and open sizes, and errors that name the op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.artifact.artifact import Artifact, build_report, load
from fxprune.backends.onnx import backend as onnx_backend
from fxprune.backends.onnx import file as onnx_file
from fxprune.backends.onnx.backend import OnnxBackend
from fxprune.backends.onnx.legalize import SpellOutAttention
from fxprune.errors import LoweringError, OptionError
from fxprune.intake.capture import capture
from fxprune.ir.cost import Cost
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.process.libraries import survive_torchvision
from fxprune.target.backend import Lowered, lower_and_verify
from fxprune.target.parity import Parity, eager


def lower(program: Program, directory: Path, **options: Any) -> tuple[Lowered, Parity, onnx.ModelProto]:
    lowered, parity = lower_and_verify(OnnxBackend(threads=1, **options), program, directory)
    return lowered, parity, onnx.load(str(lowered.payload))


def shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


class Encoder(nn.Module):
    """Ids and a padding mask in, a dict out: attention as Hugging Face writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.out = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        q, k, v = (f(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None].bool())
        y = self.o(y.transpose(1, 2).contiguous().view(*x.shape[:2], -1))
        return {"logits": self.out(y[:, 0]), "last_hidden_state": y}


def encoder() -> Program:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return capture(Encoder(), (), {"input_ids": torch.randint(0, 13, (2, 6)), "attention_mask": mask}, name="encoder")


def test_names_sizes_and_numbers(tmp_path: Path) -> None:
    lowered, parity, model = lower(encoder(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert lowered.files == (lowered.payload,)
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in model.graph.output] == ["logits", "last_hidden_state"]
    assert shape(model.graph.input[0]) == ["batch", "sequence"]
    assert shape(model.graph.output[0]) == ["batch", 3]
    assert {s["batch"] for s in parity.tried} == {1, 2, 3}
    assert len({s["sequence"] for s in parity.tried}) == 2
    assert not parity.skipped
    assert parity.max_rel < 1e-5
    assert model.opset_import[0].version == 18


def test_nothing_of_this_machine_is_in_the_file_and_it_is_the_same_twice(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        lower(encoder(), tmp_path / name)
    data = (tmp_path / "a" / "model.onnx").read_bytes()
    assert data == (tmp_path / "b" / "model.onnx").read_bytes()
    assert b".py" not in data
    assert str(Path(__file__).parent).encode() not in data
    assert b"fxprune" in data


def test_weights_beyond_the_limit_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_backend, "INLINE_LIMIT", 1000)
    lowered, parity, _ = lower(encoder(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert parity.ok
    assert lowered.payload == tmp_path / "model.onnx" == lowered.files[-1]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_file, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lower(encoder(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_opsets_outside_the_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="opset 23"):
        OnnxBackend(opset=23)
    assert lower(encoder(), tmp_path, opset=20)[2].opset_import[0].version == 20


def test_the_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lower(encoder(), tmp_path)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


# ---------------------------------------------------------------- signatures


class Odd(nn.Module):
    """An unused input, inputs that are no tensors, one result under two names, an input returned, three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, unused: Tensor, nothing: None = None, twice: bool = True) -> dict[str, Any]:
        y = self.linear(x)
        return {
            "a": y,
            "b": y,
            "x": x,
            "rest": (y + 1, None),
            "best": y.argmax(-1),
            "positive": y > 0,
            "small": y.half(),
        }


def test_odd_signatures_keep_their_order_names_and_dtypes(tmp_path: Path) -> None:
    program = capture(Odd(), (torch.randn(2, 4), torch.randn(2, 3)), {"nothing": None, "twice": True})
    lowered, parity, model = lower(program, tmp_path)
    assert [i.name for i in model.graph.input] == ["x", "unused"]
    assert parity.ok
    assert [o.name for o in model.graph.output] == ["a", "b", "x_out", "rest_0", "best", "positive", "small"]
    flat = program.flatten((torch.randn(5, 4), torch.randn(5, 3)), {"nothing": None, "twice": True})
    got, want = lowered.run(flat), eager(program.exported)(flat)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_a_constant_output_and_a_scalar_input(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
            return x * gain, self.table

    assert lower(capture(Model(), (torch.randn(2, 3), torch.tensor(2.0))), tmp_path)[1].ok


# ---------------------------------------------------------------- attention


def attention(**options: Any) -> Callable[..., Program]:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(1, 2).flatten(2)

    return lambda *tensors: capture(Model(), tensors)


def cut(tensor: Tensor, dim: int, length: int) -> Tensor:
    return tensor.narrow(dim, 0, length).contiguous()


Q, K, V = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
HIDDEN = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({}, (Q, K, V)),
        ({"scale": 0.3}, (Q, K, V)),
        ({"is_causal": True}, (Q, K, V)),
        ({}, (Q, K, V, HIDDEN[None, None])),
        ({}, (Q, K, V, torch.randn(2, 1, 5, 5))),
        ({"is_causal": True}, (cut(Q, 2, 3), K, V)),
        ({"enable_gqa": True}, (Q, cut(K, 1, 2), cut(V, 1, 2))),
        ({"enable_gqa": True, "is_causal": True}, (Q, cut(K, 1, 1), cut(V, 1, 1))),
    ],
    ids=["plain", "scale", "causal", "hidden-row", "bias", "causal-short", "gqa", "mqa-causal"],
)
def test_attention_is_spelt_out_exactly(options: dict[str, Any], tensors: tuple[Tensor, ...], tmp_path: Path) -> None:
    program = attention(**options)(*tensors)
    spelt = Pipeline((SpellOutAttention(),)).run(program)
    assert not any("scaled_dot" in str(n.target) for n in spelt.graph.nodes)
    assert any("scaled_dot" in str(n.target) for n in program.graph.nodes)  # the caller's program stays
    got, want = (eager(p.exported)(list(tensors))[0] for p in (spelt, program))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert lower(program, tmp_path)[1].max_rel < 1e-5


def test_attention_with_dropout_is_left_as_it_is() -> None:
    program = attention(dropout_p=0.5)(Q, K, V)
    assert Pipeline((SpellOutAttention(),)).run(program) is program


# ---------------------------------------------------------------- what cannot be lowered


@torch.library.custom_op("fxprune_test::oddly", mutates_args=())
def oddly(x: Tensor) -> Tensor:
    return x.sin()


@oddly.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxprune_test.oddly(self.linear(x)) + 1  # the guilty line


class Inverted(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * (1.0 - mask) + (2 - mask)


def test_a_float_minus_an_integer_mask(tmp_path: Path) -> None:
    """``1.0 - attention_mask``, as every other language model writes it."""
    program = capture(Inverted(), (torch.randn(2, 3), torch.tensor([[0, 1, 1], [1, 0, 1]])))
    assert lower(program, tmp_path)[1].ok


class Counts(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": x * 2, "steps": 3, "nothing": None}


def test_an_output_that_is_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="the model returns 3 among its outputs"):
        lower(capture(Counts(), (torch.randn(2, 3),)), tmp_path)


def test_an_op_without_a_translation_is_named_with_its_source_line(tmp_path: Path) -> None:
    with pytest.raises(LoweringError) as caught:
        lower(capture(Unknown(), (torch.randn(2, 4),)), tmp_path)
    error = caught.value
    assert error.what == "fxprune_test.oddly.default has no translation to ONNX"
    assert "node oddly" in error.where
    assert "test_onnx.py:" in error.where
    assert "the guilty line" in error.where
    assert 'target="eager"' in error.cure
    assert "\x1b" not in str(error)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"bfloat16(.|\n)*model\.float\(\)"):
        lower(capture(nn.Linear(4, 4).bfloat16(), (torch.randn(2, 4).bfloat16(),)), tmp_path)


def test_half_precision(tmp_path: Path) -> None:
    _, parity, _ = lower(capture(nn.Linear(4, 4).half(), (torch.randn(2, 4).half(),)), tmp_path)
    assert parity.ok
    assert parity.tolerance == 2e-2


# ---------------------------------------------------------------- in an artefact, and on real architectures


def test_an_artefact_for_onnx_holds_both_programs(tmp_path: Path) -> None:
    program, zero = encoder(), Cost(1, 1, 1)
    report = build_report(program, name="encoder", target="onnx", dense=zero, compressed=zero, plan=CompressionPlan())
    path = Artifact(program, CompressionPlan(), report, OnnxBackend(threads=1)).save(tmp_path / "out")
    again = Artifact.read(path)
    assert set(again.report["files"]) == {"model.onnx", "model.pt2", "plan.json", "report.html"}
    assert again.report["payload"] == "model.onnx"
    assert again.report["parity"]["ok"]
    assert again.target == "onnx"
    flat = [torch.randint(0, 13, (3, 4)), torch.ones(3, 4, dtype=torch.long)]
    got = again.backend.load(again.backend.payload(path))(flat)
    want = load(path)(input_ids=flat[0], attention_mask=flat[1])
    torch.testing.assert_close(got, [t.detach() for t in want.values()], rtol=1e-4, atol=1e-6)


def hugging_face(cls: str, config: str, **sizes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    survive_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = getattr(transformers, config)(vocab_size=32, **sizes)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0  # padding on the left: rows that see nothing under a causal mask
    return getattr(transformers, cls)(settings), {"input_ids": torch.randint(3, 32, (2, 12)), "attention_mask": mask}


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.drawn(1)
@pytest.mark.parametrize(
    ("cls", "config", "sizes"),
    [
        ("BertForSequenceClassification", "BertConfig", SMALL),
        ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2, "use_cache": False}),
        ("T5EncoderModel", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    ],
)
def test_hugging_face_with_padding(cls: str, config: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = hugging_face(cls, config, **sizes)
    _, parity, onnx_model = lower(capture(model, (), inputs), tmp_path)
    assert parity.ok
    assert len(parity.tried) == 4
    assert not parity.skipped
    assert [i.name for i in onnx_model.graph.input] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ],
)
def test_timm(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    survive_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options)
    lowered, parity, onnx_model = lower(capture(model, (torch.randn(2, 3, 32, 32),)), tmp_path)
    assert parity.ok
    assert shape(onnx_model.graph.output[0]) == ["batch", 7]
    weights = sum(4 * p.numel() for p in model.parameters())
    assert lowered.payload.stat().st_size < 1.1 * weights + 50_000


def test_an_optimiser_that_fails_costs_its_savings_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails half-way through, on a graph that it has changed already."""
    import onnx_ir

    def fold(node: onnx_ir.Node) -> None:
        raise ZeroDivisionError("no such scale")

    def optimize(self: torch.onnx.ONNXProgram) -> None:
        first = next(iter(self.model.graph))
        first.replace_input_with(0, first.outputs[0])
        fold(first)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", optimize)
    lowered, parity, _ = lower(encoder(), tmp_path)
    (note,) = lowered.notes
    assert "optimiser failed at node" in note
    assert "no such scale" in note
    assert parity.max_rel <= parity.tolerance
