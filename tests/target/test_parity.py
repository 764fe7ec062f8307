"""Parity: every way in which two outputs can differ is seen, and said."""

from __future__ import annotations

from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.cli.entry import main
from fxprune.errors import VerifyError
from fxprune.intake.capture import capture
from fxprune.ir.agreement import compare, random_ops, seeded, tolerance_of
from fxprune.ir.program import Program
from fxprune.ir.signature import output_names, sample_inputs, sizes_to_try
from fxprune.report.target_lines import constant_lines
from fxprune.target.parity import check_parity, eager

NAN, INF = float("nan"), float("inf")


def differ(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> tuple[float, float]:
    return compare(got, want, tolerance, what="model.x", where="output 'y'", label="batch=3")


def test_small_differences_pass_and_are_measured() -> None:
    want = torch.tensor([[1.0, -4.0], [NAN, INF]])
    assert differ(want + 1e-4, want) == (pytest.approx(1e-4, rel=1e-2), pytest.approx(2.5e-5, rel=1e-2))
    assert differ(want, want) == (0.0, 0.0)
    assert differ(torch.empty(0, 3), torch.empty(0, 3)) == (0.0, 0.0)
    assert differ(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        (
            torch.tensor([1.0, 2.1]),
            torch.tensor([1.0, 2.0]),
            r"relative error 5.00e-02 .* index \[1\] \(got 2.1, expected 2\)",
        ),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "NaN or infinity at 1 places"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), "NaN or infinity"),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF]), "NaN or infinity"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, INF]), "NaN or infinity"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 torch.int64 values differ"),
        (torch.tensor([True]), torch.tensor([False]), "1 of 1 torch.bool"),
        (torch.tensor([1], dtype=torch.int32), torch.tensor([1]), "dtype torch.int32"),
        (torch.ones(2, 1), torch.ones(1, 2), "another shape"),
        (torch.tensor([NAN]), torch.tensor([NAN]), "returns only NaN"),
        (torch.tensor([1e-3]), torch.tensor([0.0]), "relative error 1.00e-03"),
    ],
)
def test_every_difference_is_named(got: Tensor, want: Tensor, said: str) -> None:
    with pytest.raises(VerifyError, match=said) as caught:
        differ(got, want)
    assert "batch=3" in str(caught.value)
    assert "output 'y'" in str(caught.value)


class Nested(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, flag: bool = True) -> dict[str, object]:
        return {"logits": x * 2, "states": (x, x + 1), "x": x - 1, "none": None, "mask": mask & flag}


def nested() -> Program:
    return capture(Nested(), (torch.randn(2, 3), torch.tensor([[True, False, True]] * 2)))


def test_outputs_are_named_by_their_keys_and_never_like_an_input() -> None:
    program = nested()
    names = output_names(program.exported)
    assert names == ["logits", "states_0", "states_1", "x_out", "mask_out"]
    assert len(eager(program.exported)(sample_inputs(program))) == len(names)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x + 2), ["output_0", "output_1"]),
        (lambda x: [x + 1, {"a": x}], ["output_0", "output_1_a"]),
    ],
)
def test_outputs_without_keys_are_counted(result, names) -> None:  # type: ignore[no-untyped-def]
    class Model(nn.Module):
        def forward(self, x: Tensor) -> object:
            return result(x)

    assert output_names(capture(Model(), (torch.randn(2, 3),)).exported) == names


def test_sampled_inputs_are_like_the_examples() -> None:
    ids = torch.tensor([[3, 7, 7, 9]] * 2)

    class Model(nn.Module):
        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return ids[..., None].float() + x[:, None]

    program = capture(Model(), (ids, torch.randn(2, 1000) * 3 + 5))
    batch, other = sizes_to_try(program)[-1], sample_inputs(program, sizes_to_try(program)[-1], seed=1)
    assert set(other[0].flatten().tolist()) <= {3, 7, 9}
    assert other[0].dtype == torch.int64
    assert other[0].shape[0] == other[1].shape[0] == 3
    assert other[0].shape[1] != 4
    assert batch
    assert abs(float(other[1].mean()) - 5) < 0.5
    assert abs(float(other[1].std()) - 3) < 0.5
    again = sample_inputs(program, batch, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(other, again, strict=True))


def test_a_size_the_program_itself_refuses_is_skipped_with_the_reason() -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 2, 3).sum(1)

    batch = torch.export.Dim("batch")
    exported = torch.export.export(Even(), (torch.randn(4, 3),), dynamic_shapes=({0: 2 * batch},))
    program = Program(exported)
    parity = check_parity(program, eager(exported))
    assert parity.tried
    assert parity.ok

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[:2]])

    exported = torch.export.export(Fixed(), (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    parity = check_parity(Program(exported), eager(exported))
    assert [s for s, _ in parity.skipped] in ([], [{"batch": 1}])
    assert parity.to_dict()["ok"] is True


def test_the_wrong_number_of_outputs_and_a_crash() -> None:
    program = nested()
    with pytest.raises(VerifyError, match="another number of outputs"):
        check_parity(program, lambda flat: [])

    def crash(flat: object) -> list[object]:
        raise RuntimeError("no kernel\nmore")

    with pytest.raises(VerifyError, match=r"engine does not run(.|\n)*RuntimeError: no kernel$"):
        check_parity(program, crash, what="engine")


def test_the_tolerance_is_that_of_the_coarsest_dtype() -> None:
    program = nested()
    assert tolerance_of(program) == 1e-4
    half = capture(nn.Linear(3, 3).half(), (torch.randn(2, 3).half(),))
    assert tolerance_of(half) == 2e-2


class Noisy(nn.Module):
    """Draws new noise at every call, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.up(x).relu(), 0.5, training=False)
        return self.down(hidden) + torch.rand_like(x)


def test_random_ops_draw_alike_in_both_runs() -> None:
    program = capture(Noisy(), (torch.randn(2, 8),))
    assert random_ops(program) == ["rand_like"]  # a dropout at rest draws nothing
    assert check_parity(program, eager(program.exported)).max_abs == 0


def test_a_target_that_draws_other_numbers_is_explained() -> None:
    program = capture(Noisy(), (torch.randn(2, 8),))

    def other(flat: Sequence[Any]) -> list[Any]:
        torch.manual_seed(1234)
        return eager(program.exported)(flat)

    with pytest.raises(VerifyError, match=r"draws random numbers in evaluation \(rand_like\)"):
        check_parity(program, other)


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    with seeded(7):
        torch.rand(5)
    assert torch.equal(torch.rand(3), want)


class Blind(nn.Module):
    """A head of zeros, features, and how many features there are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x), "features": x * 2, "mean": x.mean(), "seen": torch.ones(()) * 3}


def test_an_output_that_never_changes_is_named() -> None:
    made = capture(Blind().eval(), (torch.randn(2, 4),))
    found = check_parity(made, eager(made.exported))
    assert found.ok
    assert found.constant == ("logits", "seen")
    assert found.to_dict()["constant"] == ["logits", "seen"]
    (line, other) = constant_lines(found.to_dict())
    assert line == "output 'logits' was the same for every input tried: that it agrees shows little"
    assert "'seen'" in other
    assert constant_lines(None) == constant_lines({"constant": []}) == []


def test_artefacts_say_that_of_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4), Blind()).eval()
    torch.save(model[:3], tmp_path / "model.pt")
    torch.export.save(torch.export.export(model, (torch.randn(2, 4),)), tmp_path / "blind.pt2")
    for name, said in (("model.pt", False), ("blind.pt2", True)):
        out = tmp_path / f"small-{name}"
        assert (
            main(
                [
                    "compile",
                    str(tmp_path / name),
                    "--input",
                    "2x4",
                    "--flops",
                    "0.6",
                    "--align",
                    "1",
                    "--seconds",
                    "0",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        words = "output 'logits' was the same for every input tried"
        assert (words in " ".join(capsys.readouterr().err.split())) == said
        assert (words in unescape((out / "report.html").read_text(encoding="utf-8"))) == said
