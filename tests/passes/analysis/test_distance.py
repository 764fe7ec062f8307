"""How far outputs move: the distillation loss of the trajectory criterion."""

from __future__ import annotations

import pytest
import torch

from fxprune.passes.analysis.importance import distance
from fxprune.passes.analysis.importance.distance import output_change
from fxprune.passes.analysis.importance.objective import Target


def test_distillation_vectors_of_the_specification() -> None:
    """methods 11.2"""
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
    for temperature, want in ((1.0, 0.143841), (4.0, 0.150397)):
        got = output_change([Target(student, True, None)], [Target(teacher, True, None)], temperature)
        assert float(got) == pytest.approx(want, abs=1e-6)
        assert float(output_change([Target(teacher, True, None)], [Target(teacher, True, None)], temperature)) == 0


def test_distillation_looks_at_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 5, 7, generator=generator) for _ in range(2))
    student[1] = teacher[1]
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [2]])

    def change() -> torch.Tensor:
        return output_change([Target(student, True, mask)], [Target(teacher, True, mask)], 4.0)

    whole = change()
    assert whole[1] == 0
    assert (whole[[0, 2]] > 0).all()
    for entries in (1, 14, 50):  # one row, two, all but one
        monkeypatch.setattr(distance, "IN_CACHE", entries)
        assert torch.equal(change(), whole)
