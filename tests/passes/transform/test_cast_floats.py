"""Half precision written into the graph: close to float32, wide where sums and norms are, nothing lost at the edges."""

from __future__ import annotations

import pytest
import torch
from support import zoo
from torch import Tensor, nn

from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.transform.cast_floats import CastFloats, narrow
from fxprune.passes.transform.clean import Clean
from fxprune.passes.transform.inline import Inline
from fxprune.target.parity import check_parity, eager


def cast(program: Program, dtype: str = "float16", spatial: bool = True) -> Program:
    return Pipeline((CastFloats(dtype, spatial),)).run(program)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("vit", "float16", 2e-2),
        ("vit", "bfloat16", 5e-2),
        ("llama", "float16", 2e-2),
        ("resnet18", "bfloat16", 5e-2),
        ("group_norm", "float16", 2e-2),
    ],
)
def test_a_cast_model_computes_the_same_within_its_precision(name: str, dtype: str, tolerance: float) -> None:
    module, args, kwargs = zoo.build(name, 0)
    program = Pipeline((Clean(), Inline())).run(capture(module, args, kwargs, name=name))
    half = cast(program, dtype)
    parity = check_parity(program, eager(half.exported), tolerance={torch.float32: tolerance})
    assert parity.max_rel > 0  # it was computed in something else
    stored = [t for n, t in half.tensors.items() if t.dim() >= 2 and "norm" not in n and t.dtype is torch.float32]
    big = [t for t in half.tensors.values() if t.dim() >= 2]
    assert len(stored) <= len(big) // 2
    for node in half.graph.nodes:
        if node.op == "call_function" and "norm" in str(node.target) and "batch_norm" not in str(node.target):
            assert node.meta["val"].dtype is torch.float32, node


def small(forward: nn.Module, *inputs: Tensor) -> Program:
    return capture(forward.eval(), inputs)


class Masked(nn.Module):
    """Attention as language models write it: a mask of the least float32, and rows that see nothing."""

    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        hidden = (1.0 - mask[:, None, :].float()) * torch.finfo(torch.float32).min
        scores = (q @ q.transpose(1, 2)).masked_fill(mask[:, None, :] == 0, -1e9)
        return torch.softmax(scores + hidden, -1) @ q


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masks_stay_finite(dtype: str) -> None:
    q, mask = torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    program = small(Masked(), q, mask)
    half = eager(cast(program, dtype).exported)
    assert check_parity(program, half, tolerance={torch.float32: 5e-2}).ok
    nothing = half([q, torch.zeros_like(mask)])[0]
    assert bool(nothing.isfinite().all())


class Squares(nn.Module):
    """A root mean square norm as it is written out: 300 squared is more than float16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def test_squares_and_means_are_wide() -> None:
    program = small(Squares(), 1e3 * torch.randn(4, 8))
    half = cast(program)
    assert check_parity(program, eager(half.exported), tolerance={torch.float32: 5e-3}).ok
    kinds = {
        n.target.__name__.partition(".")[0]: n.meta["val"].dtype for n in half.graph.nodes if n.op == "call_function"
    }
    assert kinds["linear"] is torch.float16
    assert kinds["pow"] is kinds["mean"] is kinds["rsqrt"] is torch.float32


class Edges(nn.Module):
    """Doubles, integers, several outputs, and a table that is read in both precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        y = x @ self.table
        return y, y.argmax(-1), self.table.sum(0), x.double() * 2, index + 1, x


def test_the_interface_stays_as_it_was() -> None:
    program = small(Edges(), torch.randn(3, 6), torch.arange(3))
    half = cast(program)
    flat = [torch.randn(4, 6), torch.arange(4)]
    for got, want in zip(eager(half.exported)(flat), eager(program.exported)(flat), strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert half.tensors["table"].dtype is torch.float32  # the sum reads it as well
    assert half.user_inputs == program.user_inputs


def test_the_given_program_stays_and_twice_is_once() -> None:
    program = small(Squares(), torch.randn(4, 8))
    before = [n.format_node() for n in program.graph.nodes]
    half = cast(program)
    assert [n.format_node() for n in program.graph.nodes] == before
    assert program.tensors["linear.weight"].dtype is torch.float32
    assert half.tensors["linear.weight"].dtype is torch.float16
    flat = [torch.randn(3, 8)]
    torch.testing.assert_close(eager(cast(half).exported)(flat), eager(half.exported)(flat), rtol=0, atol=0)


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_program_without_floats_is_returned_as_it_is() -> None:
    program = small(Integers(), torch.arange(4))
    assert cast(program) is program


def test_convolutions_stay_wide_on_request() -> None:
    program = small(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)), torch.randn(2, 3, 8, 8)
    )
    half = cast(program, "bfloat16", spatial=False)
    kinds = {
        n.target.__name__.partition(".")[0]: n.meta["val"].dtype for n in half.graph.nodes if n.op == "call_function"
    }
    assert kinds["conv2d"] is kinds["max_pool2d"] is torch.float32
    assert kinds["linear"] is torch.bfloat16
    assert half.tensors["0.weight"].dtype is torch.float32


def test_a_mask_in_a_buffer_stays_finite() -> None:
    got = narrow(torch.tensor([1e9, -1e9, float("-inf"), 1.0]), torch.float16)
    assert got.tolist() == [float("inf"), -32752.0, float("-inf"), 1.0]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(0, 1)) * 1e6 / 1e7


def test_factors_beyond_the_range_keep_their_meaning() -> None:
    program = small(Scaled(), torch.randn(4, 4))
    half = eager(cast(program).exported)
    assert check_parity(program, half, tolerance={torch.float32: 5e-3}).ok
    torch.testing.assert_close(half([1e2 * torch.eye(4)])[0].diag(), torch.full((4,), 1e3))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot be cast to 'float8'"):
        CastFloats("float8")
