"""capture: every tiny model exports with open sizes and computes the same; refusals say what to do."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.fingerprints import fingerprint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.transform.clean import Clean

SEQUENCES = (
    "tied",
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "deberta_v2",
    "gpt2",
    "opt",
    "llama",
    "qwen2",
    "mistral",
    "modernbert",
    "t5_encoder",
    "clip",
)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(program: Program, *args: Any, **kwargs: Any) -> list[Tensor]:
    return tensors(program.exported.module()(*args, **kwargs))


class Lambda(nn.Module):
    """A module that is one function, for the tests below."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(3, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# ---------------------------------------------------------------- the zoo


@zoo.part("capture")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_computes_the_same_at_another_size_before_and_after_clean(name: str) -> None:
    module, args, kwargs = zoo.build(name)
    before = fingerprint(module, args, kwargs)
    program = capture(module, args, kwargs, name=name)
    assert fingerprint(module, args, kwargs) == before, "the caller's module and inputs are as they were"
    cleaned = Pipeline((Clean(),)).run(program)
    assert not [note for note in cleaned.notes if "in place" in note]
    fixed = [note for note in cleaned.notes if "fixed at" in note]
    assert ["expected_seq_length" in note for note in fixed] == [True] * (name == "whisper_encoder")  # its own demand
    ops = {str(node.target) for node in cleaned.graph.nodes}
    assert not [op for op in ops if "dropout" in op or "_assert" in op]
    for batch, length in ((3, 13), (1, 5)):
        args, kwargs = zoo.other_inputs(args, kwargs, batch, length if name in SEQUENCES else None)
        with torch.no_grad():
            expected = tensors(pytree.tree_leaves(dict(module(*args, **kwargs)) if kwargs else module(*args, **kwargs)))
            for result in (run(program, *args, **kwargs), run(cleaned, *args, **kwargs)):
                assert all(t.isfinite().all() for t in result)
                assert [t.shape for t in result] == [t.shape for t in expected[: len(result)]]
                assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=False))


@pytest.mark.parametrize("name", ["bert", "gpt2", "clip"])
def test_a_saved_program_loads_with_torch_alone(name: str, tmp_path: Path) -> None:
    module, args, kwargs = zoo.build(name)
    program = Clean().run(capture(module, args, kwargs))
    torch.export.save(program.exported, tmp_path / "model.pt2")
    torch.save((kwargs, run(program, *args, **kwargs)), tmp_path / "expected.pt")
    script = """
import sys
for package in ("transformers", "timm", "torchvision"):
    sys.modules[package] = None  # an import of it raises
import torch
from torch.utils import _pytree as pytree
kwargs, expected = torch.load("expected.pt")
result = torch.export.load("model.pt2").module()(**kwargs)
assert type(result) is dict, type(result)
assert all(map(torch.equal, [t for t in pytree.tree_leaves(result)], expected))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_as_before() -> None:
    module, args, kwargs = zoo.build("depthwise")
    module.train()
    module.norm1.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    program = capture(module, args, kwargs)
    assert module.training
    assert module.norm2.training
    assert not module.norm1.training
    assert not module._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.is_grad_enabled()
    weight = program.exported.state_dict["up.weight"]
    assert weight.data_ptr() == module.up.weight.data_ptr(), "weights are shared, not copied"
    assert weight.requires_grad


def test_weights_of_a_captured_program_train() -> None:
    module, args, kwargs = zoo.build("rotary")
    program = Clean().run(capture(module, args, kwargs))
    assert not [n for n in program.graph.nodes if "grad_enabled" in str(n.target)]
    run(program, *args)[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters() if p is not module.k.bias)


# ---------------------------------------------------------------- sizes


def test_an_example_batch_of_one_stays_open() -> None:
    module, (x,), _ = zoo.build("vit")
    program = capture(module, (x[:1],))
    assert program.notes == ()
    assert run(program, torch.randn(5, *x.shape[1:]))[0].shape == (5, 10)


def test_a_fixed_batch_is_told() -> None:
    program = capture(Lambda(lambda x: x.view(2, 6)), (torch.randn(2, 2, 3),))
    assert program.notes[0].startswith("batch size fixed at 2: ")
    assert "x.view(2, 6)" in program.notes[0], "the line that fixes it"
    assert len(program.notes) == 3, "the sizes of a sample are fixed by it as well"


def test_a_fixed_sequence_is_told_and_leaves_the_batch_open() -> None:
    program = capture(Lambda(lambda ids: ids.float().view(ids.shape[0], 7) * 2), (torch.randint(0, 9, (2, 7)),))
    assert [note.split(":")[0] for note in program.notes] == ["sequence length fixed at 7"]
    assert run(program, torch.randint(0, 9, (4, 7)))[0].shape == (4, 7)


def test_two_inputs_share_their_batch_where_the_code_needs_it() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    program = capture(layer, (torch.randn(2, 5, 16), torch.randn(2, 6, 16)))
    x, y = torch.randn(4, 5, 16), torch.randn(4, 6, 16)
    assert program.notes == ()
    assert torch.allclose(run(program, x, y)[0], layer.eval()(x, y), atol=1e-5)


@pytest.mark.parametrize(("name", "batches"), [("bert", 1), ("roberta", 1), ("clip", 2)])
def test_a_mask_has_the_batch_of_its_tokens_while_texts_and_images_differ(name: str, batches: int) -> None:
    module, args, kwargs = zoo.build(name)
    program = capture(module, args, kwargs)
    inputs = [node.meta["val"] for node in program.placeholders() if node.name in program.user_inputs]
    assert len({str(t.shape[0]) for t in inputs}) == batches
    assert program.notes == ()


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    x = torch.randn(2, 3)
    program = capture(Lambda(lambda a, b: a - 2 * b), (x, x))
    assert torch.equal(run(program, torch.ones(3, 3), torch.ones(3, 3))[0], -torch.ones(3, 3))


# ---------------------------------------------------------------- outputs


@dataclasses.dataclass
class Answer:
    score: Tensor
    extra: Tensor | None = None


Pair = namedtuple("Pair", "first second")


class Memory:
    """No container: stands for a KV cache."""


def test_outputs_become_plain_containers() -> None:
    def forward(x: Tensor) -> Any:
        return Answer(x + 1), Pair(x, [x * 2, None]), {"size": x.shape[0], "memory": Memory(), "none": None}

    program = capture(Lambda(forward), (torch.randn(2, 3),))
    answer, pair, rest = program.exported.module()(torch.zeros(5, 3))
    assert type(answer) is dict
    assert list(answer) == ["score"]
    assert type(pair) is tuple
    assert type(pair[1]) is list
    assert pair[1][1] is None
    assert rest == {"size": 5, "none": None}
    assert program.notes == ("output[2].memory left out: a Memory is neither a tensor nor a plain container",)


def test_an_exported_program_is_taken_as_it_is() -> None:
    exported = torch.export.export(Lambda(lambda x: (x + 1,)).eval(), (torch.randn(2, 3),))
    assert capture(exported).exported is exported


def test_a_foreign_output_of_an_exported_program_becomes_plain() -> None:
    cls = dataclasses.make_dataclass("Foreign", [("a", Tensor), ("b", Any)])
    torch.export.register_dataclass(cls, serialized_type_name="test.Foreign")
    exported = torch.export.export(Lambda(lambda x: cls(x + 1, (x, 3))).eval(), (torch.randn(2, 3),))
    program = capture(exported)
    x = torch.randn(2, 3)
    result = program.exported.module()(x)
    assert type(result) is dict
    assert list(result) == ["a", "b"]
    assert torch.equal(result["a"], x + 1)
    assert torch.equal(result["b"][0], x)
    assert result["b"][1] == 3
    assert type(exported.module()(x)) is cls, "the caller's program is untouched"


# ---------------------------------------------------------------- refusals


def refuse(model: Any, *args: Any) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        capture(model, args, name="toy")
    return caught.value


def test_control_flow_on_values_names_the_line() -> None:
    def forward(x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x

    error = refuse(Lambda(forward), torch.randn(2, 3))
    assert "depends on a tensor's values" in error.what
    assert "test_capture.py:" in error.where
    assert "if x.sum() > 0" in error.where
    assert "torch.where" in error.cure


def test_a_missing_package_is_named() -> None:
    def forward(x: Tensor) -> Tensor:
        import nowhere_to_be_found.at_all  # type: ignore[import-not-found]

        return nowhere_to_be_found.at_all(x)

    error = refuse(Lambda(forward), torch.randn(2, 3))
    assert error.what == "the model needs the package 'nowhere_to_be_found'"
    assert error.cure == "pip install nowhere_to_be_found"


def test_wrong_input_shapes_are_the_models_own_error() -> None:
    error = refuse(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3))
    assert error.what == "the model fails on the example inputs"
    assert "cannot be multiplied" in error.why
    assert "example_inputs=" in error.cure


def fails(error: Exception) -> Tensor:
    raise error


def test_an_assertion_without_words_is_not_told_twice() -> None:
    error = refuse(Lambda(lambda x: fails(AssertionError())), torch.randn(2, 3))
    assert error.why == "AssertionError"


def test_ops_of_a_torchvision_for_another_torch() -> None:
    error = refuse(Lambda(lambda x: fails(RuntimeError("Couldn't load custom C++ ops."))), torch.randn(2, 3))
    assert "install the torchvision built for torch" in error.cure


def test_numpy_inside_the_model() -> None:
    error = refuse(Lambda(lambda x: torch.from_numpy(x.numpy() + 1)), torch.randn(2, 3))
    assert error.what == "the model leaves torch for numpy"
    assert "test_capture.py:" in error.where


def test_an_op_without_a_fake_implementation_is_named() -> None:
    with torch.library._scoped_library("fxprune_test_capture", "FRAGMENT") as library:
        library.define("opaque(Tensor x) -> Tensor")
        library.impl("opaque", lambda x: x + 1, "CPU")
        error = refuse(Lambda(lambda x: torch.ops.fxprune_test_capture.opaque(x)), torch.randn(2, 3))
    assert "opaque" in str(error)
    assert "register_fake" in str(error)


@pytest.mark.parametrize(
    ("model", "args", "what"),
    [
        (torch.nn.functional.relu, (torch.randn(2, 3),), "a function cannot be captured"),
        (Memory(), (torch.randn(2, 3),), "a Memory cannot be captured"),
        (nn.Linear(3, 3), (), "there is no tensor among the example inputs"),
        (nn.Linear(3, 3), (Memory(),), "an input is neither a tensor nor a plain container"),
    ],
)
def test_what_is_no_model_or_no_input(model: Any, args: tuple[Any, ...], what: str) -> None:
    error = refuse(model, *args)
    assert error.what == what
    assert error.cure


@pytest.mark.parametrize("batch", [2, 3, 4, 7])
def test_the_module_is_compared_at_two_different_batches(batch: int) -> None:
    program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.randn(batch, 4),))
    sizes = [tried["batch"] for tried in program.proof[0].tried]
    assert len(set(sizes)) == 2
