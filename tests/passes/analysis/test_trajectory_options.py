"""Ablations of the trajectory criterion: logits alone, few rows, the reference code's lambda per element."""

from __future__ import annotations

import pytest
import torch
from test_trajectory import DEPTH, analysed, data, group, model, scores
from torch import Tensor

from fxprune.errors import OptionError
from fxprune.ir.group import Kind
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.importance.features import Tap, feature_rows
from fxprune.passes.analysis.importance.terms import PowersOfTen
from fxprune.passes.analysis.importance.trajectory import Trajectory
from fxprune.passes.analysis.refine_scores import RefineScores
from fxprune.passes.analysis.score_groups import ScoreGroups


@pytest.fixture(scope="module")
def program() -> Program:
    return analysed(model(), data().batches[0].args[0])


@pytest.mark.parametrize("mode", ["hybrid", "exact", "probe"])
def test_without_taps_the_output_decides_alone(program: Program, mode: str) -> None:
    criterion = Trajectory(mode=mode, taps="none")
    features, output = criterion.parts(program, data(), 0)
    assert all(not v.any() for v in features.values())
    got = scores(program, criterion, data())
    assert all(torch.equal(got[n], output[n]) for n in got)
    with_features = Trajectory(mode=mode).parts(program, data(), 0)[1]
    assert all(torch.allclose(output[n], with_features[n], rtol=1e-6) for n in output)
    notes = ScoreGroups(criterion, data()).run(program).notes
    assert not any("(features)" in note for note in notes)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing to measure"):
        Trajectory(taps="none", weight=0.0)
    with pytest.raises(OptionError, match="rows"):
        Trajectory(rows=-1)


def test_some_rows_are_the_same_for_every_value_and_all_of_them_are_all(program: Program) -> None:
    tap, value = Tap("f", "f", False, True, 2), torch.randn(3, 7, 4)
    some = feature_rows(value, tap, None, False, 9)
    assert some.shape == (9, 4)
    flat = value.reshape(-1, 4)
    at = [next(i for i in range(21) if torch.equal(flat[i], row)) for row in some]
    assert at == sorted(set(at))
    assert torch.equal(feature_rows(value + 1, tap, None, False, 9), some + 1)
    assert torch.equal(feature_rows(value, tap, None, False, 21), flat)
    whole, all_rows, few = (scores(program, Trajectory(mode="exact", rows=n), data()) for n in (0, 20, 12))
    assert all(torch.equal(whole[n], all_rows[n]) for n in whole)
    assert any(not torch.allclose(whole[n], few[n]) for n in whole)
    same = Trajectory(mode="exact", rows=12)
    assert all(torch.equal(v, few[n]) for n, v in scores(program, same, data()).items())


def test_few_rows_leave_what_nobody_reads_at_zero() -> None:
    net = model()
    with torch.no_grad():
        net.fc2[1].weight[:, 4] = 0
    dead = analysed(net, data().batches[0].args[0])
    for mode in ("exact", "probe"):
        assert float(scores(dead, Trajectory(mode=mode, rows=6), data())[group(dead, 1)][4]) == 0


def one(values: list[float]) -> dict[str, Tensor]:
    return {"g": torch.tensor(values, dtype=torch.float64)}


def test_a_power_of_ten_per_element_is_the_sawtooth_of_the_reference() -> None:
    """methods 1.3: MD = 10, L = 10; what is added to it for these KL"""
    found = PowersOfTen(10.0)(one([10.0] * 5), one([0.001, 0.002, 0.005, 0.0099, 0.0101]))["g"] - 10
    assert found.tolist() == pytest.approx([1.0, 0.2, 0.5, 0.99, 0.101])


def test_the_mean_of_the_earlier_powers_stands_in() -> None:
    added = PowersOfTen(10.0)
    first = added(one([1.0, 10.0, 10.0]), one([2.0, 0.001, 0.02]))["g"]
    assert first.tolist() == pytest.approx([1 + 2.0, 10 + 1.0, 10 + 0.2])  # nothing before; 1000; 10
    later = added(one([1.0, 0.0, 5.0]), one([3.0, 2.0, 0.0]))["g"]
    assert later.tolist() == pytest.approx([1 + 3 * 505.0, 2 * 505.0, 5.0])
    ratio = PowersOfTen(10.0)(one([1.0] * 40), one([10.0 ** -(i / 13) for i in range(40)]))["g"] - 1
    assert all(0.01 <= float(v) <= 0.1 + 1e-9 or i < 13 for i, v in enumerate(ratio))  # MD is 10 to 100 times KL


def test_the_criterion_and_its_refinement_use_it(program: Program) -> None:
    criterion = Trajectory(lambda_mode="per_unit_pow10")
    assert criterion.weight_of(program) == 0.1
    scored = ScoreGroups(criterion, data()).run(program)
    features, output = Trajectory(lambda_mode="per_unit_pow10").parts(program, data(), 0)
    want = PowersOfTen(10.0)(features, output)
    assert all(torch.equal(s.values, want[n]) for n, s in scored.need("scores").items())
    names = [group(program, i) for i in range(DEPTH)]
    choices = {n: Choice(str(Kind.FFN), 10, tuple(range(5))) for n in names}
    after = RefineScores(criterion, data()).run(scored.but(plan=CompressionPlan(choices))).need("scores")
    assert any(not torch.equal(after[n].values, want[n]) for n in names)
    assert all(bool(torch.isfinite(s.values).all()) for s in after.values())
