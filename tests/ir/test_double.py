"""fp64 as the judge: rounding is told from another computation."""

from __future__ import annotations

import pytest
import torch
from support import zoo
from torch import Tensor, nn

from fxprune.errors import VerifyError
from fxprune.intake.capture import capture
from fxprune.ir.agreement import compare, relative_error
from fxprune.ir.double import exactly, in_double, run_nodes, within_rounding
from fxprune.ir.program import Program
from fxprune.target.parity import check_parity, eager


def flat_of(program: Program) -> list[object]:
    return program.flatten(*program.example_inputs)


@pytest.mark.parametrize("name", ["vit", "llama", "resnet18", "deberta_v2", "t5_encoder"])
def test_a_program_in_double_computes_the_same_more_exactly(name: str) -> None:
    module, args, kwargs = zoo.build(name)
    program = capture(module, args, kwargs)
    exact = exactly(program, flat_of(program))
    assert exact is not None
    floats = [t for t in exact if isinstance(t, Tensor) and t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float64}
    assert 0 < relative_error(run_nodes(program, flat_of(program)), exact) < 1e-5
    assert {t.dtype for t in program.tensors.values() if t.is_floating_point()} == {torch.float32}, "a copy"


def test_casts_in_the_code_of_a_model_do_not_bring_rounding_back() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.float16) / 3).float()

    program = capture(Casting(), (torch.randn(2, 5),))
    (exact,) = run_nodes(in_double(program), [t.double() for t in program.example_inputs[0]])
    assert torch.equal(exact, program.example_inputs[0][0].double() / 3)


def test_as_near_as_the_program_itself_is_near_enough() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    own, near, far = exact.float() * 1.01, exact.float() * 0.97, exact.float() * 0.9
    assert within_rounding([near], [own], [exact], 1e-4)
    assert not within_rounding([far], [own], [exact], 1e-4)
    assert not within_rounding([near], [own], None, 1e-4)
    assert not within_rounding([near], [exact.float()], [exact], 1e-4), "the program itself keeps the tolerance"


def test_counts_are_equal_or_as_often_wrong_as_the_programs_own() -> None:
    exact, own, near = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), torch.tensor([1, 5, 3])
    assert within_rounding([near], [own], [exact], 1e-4)
    assert not within_rounding([near], [exact], [exact], 1e-4)


class Cancelling(nn.Module):
    """What is left of large numbers that cancel is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        large = self.mix(x) * 1e6
        return (large + x) - large


def test_a_file_that_rounds_otherwise_than_a_program_of_no_precision_passes() -> None:
    program = capture(Cancelling().eval(), (torch.randn(2, 32),))
    plain = eager(program.exported)

    def other_order(flat: list[object]) -> list[Tensor]:
        (x,) = flat
        assert isinstance(x, Tensor)
        return [x.clone()]  # what the sum is without rounding

    assert relative_error(other_order(flat_of(program)), plain(flat_of(program))) > 1e-3
    parity = check_parity(program, other_order)
    assert parity.ok
    assert parity.rounded > 1e-3
    with pytest.raises(VerifyError, match="does not compute"):
        check_parity(program, lambda flat: [t * 1.5 for t in other_order(flat)])


def test_subnormal_magnitudes_count_as_the_least_that_have_all_digits() -> None:
    want = torch.tensor([3e-7, -2e-7], dtype=torch.float16)
    got = torch.tensor([2.4e-7, -2e-7], dtype=torch.float16)
    _, relative = compare(got, want, 2e-2, what="the file", where="output")
    assert relative < 2e-2
    with pytest.raises(VerifyError, match="relative error"):
        compare(got * 100, want * 100, 2e-3, what="the file", where="output")
