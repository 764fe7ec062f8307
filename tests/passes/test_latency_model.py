"""The latency model: measured savings add up, products share their time, budgets are held, and what is out of reach."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.laws import analysed
from support.timing import made_up

from fxprune.errors import BudgetInfeasible, OptionError
from fxprune.ir.cost import Budget, CostModel
from fxprune.ir.importance import ImportanceScores
from fxprune.ir.program import Program
from fxprune.passes.search.latency_model import NS_PER_MS, LatencyModel, effect, find_multiple, layers, rising
from fxprune.passes.search.search_plan import SearchPlan
from fxprune.target.latency_table import Curve, Point, classes

SHARES = {"head": 0.3, "ffn": 0.5}


def even(kind: str, count: int, size: int) -> float:
    """Heads take 30 % of the time and neurons 50 %, each element the same."""
    return 1.0 - SHARES.get(kind, 0.0) * (1 - count / size)


def scored(program: Program, seed: int = 0) -> Program:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        g.name: ImportanceScores(g.name, torch.rand(g.size, generator=generator), "fisher", "nats", True)
        for g in program.need("groups")
    }
    return program.but(scores=scores)


def kept(program: Program, share: float, kinds: tuple[str, ...] = ("head", "ffn")) -> dict[object, int]:
    return {g.axis: max(1, round(share * g.size)) for g in program.need("groups") if str(g.kind) in kinds}


@pytest.fixture(scope="module")
def vit() -> Program:
    return scored(analysed("vit"))


def test_the_dense_program_takes_what_was_measured_and_savings_add_up(vit: Program) -> None:
    model = LatencyModel(vit, made_up(vit, even, dense_ms=40.0))
    assert model().latency_ns == 40.0 * NS_PER_MS
    assert model().flops == CostModel(vit)().flops
    for kind, share in SHARES.items():
        half = {g.axis: g.size // 3 for g in vit.need("groups") if str(g.kind) == kind}
        assert model(half).latency_ns / NS_PER_MS == pytest.approx(40.0 * (1 - share * 2 / 3), rel=1e-3)
    one = next(g for g in vit.need("groups") if str(g.kind) == "ffn")
    assert model({one.axis: one.size // 2}).latency_ns / NS_PER_MS == pytest.approx(40.0 * (1 - 0.5 / 2 / 2), rel=1e-3)


def test_a_correction_multiplies_what_is_saved(vit: Program) -> None:
    table, counts = made_up(vit, even, dense_ms=40.0), kept(vit, 1 / 3)
    saved = 40.0 - LatencyModel(vit, table)(counts).latency_ns / NS_PER_MS
    assert LatencyModel(vit, table.correct(0.8))(counts).latency_ns / NS_PER_MS == pytest.approx(40.0 - 0.8 * saved)
    assert LatencyModel(vit, table.correct(0.8))().latency_ns == 40.0 * NS_PER_MS


def test_channels_that_multiply_share_their_time() -> None:
    """All channels of a chain halved: its inner products fall to a quarter, which sums of savings would overshoot."""
    resnet = scored(analysed("resnet18"))
    macs = CostModel(resnet)
    dense, found = macs().flops, classes(resnet)
    table = made_up(resnet, even)
    curves = {
        name: replace(
            curve,
            points=tuple(
                Point(p.count, macs({g.axis: p.count for g in found[name]}).flops / dense) for p in curve.points
            ),
        )
        for name, curve in table.curves.items()
    }
    model = LatencyModel(resnet, replace(table, curves=curves))
    half = {g.axis: g.size // 2 for g in resnet.need("groups") if g.prunable}
    true, told = macs(half).flops / dense, model(half).latency_ns / model().latency_ns
    summed = 1 - sum(1 - macs({g.axis: g.size // 2}).flops / dense for g in resnet.need("groups") if g.prunable)
    assert summed < true - 0.05
    assert abs(told - true) < (true - summed) / 2


def test_the_layers_are_told_one_by_one(vit: Program) -> None:
    model, counts = LatencyModel(vit, made_up(vit, even, dense_ms=40.0)), kept(vit, 1 / 3)
    told = [entry for entry in layers(model, vit.need("groups"), counts) if entry["kind"] in SHARES]
    assert {e["kind"] for e in told} == {"head", "ffn"}
    saved = sum(float(str(e["dense_ms"])) - float(str(e["predicted_ms"])) for e in told)
    assert saved == pytest.approx(40.0 - model(counts).latency_ns / NS_PER_MS, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 199), st.floats(0.0, 1.5)), min_size=1, max_size=8, unique_by=lambda p: p[0]
    ).filter(lambda ps: any(n for n, _ in ps)),
    st.floats(0.0, 0.2),
)
def test_more_elements_never_take_less_time(points: list[tuple[int, float]], error: float) -> None:
    """Law."""
    one = effect(Curve("ffn", 200, 3, tuple(Point(n, r, error) for n, r in sorted(points))))
    times = [one(n) for n in range(201)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(times))
    assert times[-1] == pytest.approx(200.0)
    assert one.share >= 0.0


def test_noise_is_smoothed_only_where_the_errors_allow_it() -> None:
    noisy = [Point(n, 0.5 + 0.5 * n / 400 + wobble) for n, wobble in ((50, 0.0), (100, 0.02), (200, -0.02), (300, 0.0))]
    exact = effect(Curve("ffn", 400, 1, tuple(noisy)))
    smooth = effect(Curve("ffn", 400, 1, tuple(replace(p, error=0.02) for p in noisy)))

    def bend(one: object) -> float:
        steps = [one(n + 50) - one(n) for n in range(50, 400, 50)]  # type: ignore[operator]
        return max(steps) - min(steps)

    assert bend(smooth) < 5
    assert bend(exact) > 15
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_a_class_that_saves_nothing_is_free_to_keep(vit: Program) -> None:
    table = made_up(vit, lambda kind, n, size: 1.0 if kind == "head" else even(kind, n, size))
    model = LatencyModel(vit, table)
    assert model(kept(vit, 0.4, ("head",))).latency_ns == model().latency_ns
    plan = SearchPlan(Budget("latency", 0.7), kinds=("head", "ffn"), table=table).run(vit).need("plan")
    assert {c.kind for c in plan.choices.values()} == {"ffn"}


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
def test_the_search_holds_the_budget_and_a_tighter_one_never_costs_more(vit: Program, ratio: float) -> None:
    table = made_up(vit, even)
    model = LatencyModel(vit, table)

    def cost(amount: float) -> tuple[int, object]:
        plan = SearchPlan(Budget("latency", amount), kinds=("head", "ffn"), table=table).run(vit).need("plan")
        counts = {g.axis: len(plan.choices[g.name].keep) for g in vit.need("groups") if g.name in plan.choices}
        assert plan.about["method"] == "dynamic"
        assert plan.about["latency_table"] == table.hash
        assert plan.about["predicted"]["latency_ns"] == model(counts).latency_ns
        return model(counts).latency_ns, plan.choices

    spent, choices = cost(ratio)
    assert spent <= ratio * model().latency_ns
    assert spent > (ratio - 0.12) * model().latency_ns
    assert cost(ratio - 0.05)[0] <= spent
    assert cost(ratio)[1] == choices


def test_dear_elements_go_first(vit: Program) -> None:
    """With equal scores everywhere, what is cut is what saves the most time each, whatever its MACs are."""
    flat = {g.name: ImportanceScores(g.name, torch.ones(g.size), "fisher", "nats", True) for g in vit.need("groups")}
    program = vit.but(scores=flat)

    def cut(shares: dict[str, float]) -> set[str]:
        table = made_up(vit, lambda kind, n, size: 1.0 - shares.get(kind, 0.0) * (1 - n / size))
        found = SearchPlan(Budget("latency", 0.9), kinds=("head", "ffn"), table=table).run(program).need("plan")
        return {c.kind for c in found.choices.values()}

    assert cut({"head": 0.5, "ffn": 0.1}) == {"head"}
    assert cut({"head": 0.001, "ffn": 0.9}) == {"ffn"}


def test_milliseconds_and_what_is_out_of_reach(vit: Program) -> None:
    table = made_up(vit, even, dense_ms=50.0)
    plan = SearchPlan(Budget.of_latency("30", ms=True), kinds=("head", "ffn"), table=table).run(vit).need("plan")
    assert plan.about["budget"] == "latency=30ms"
    assert plan.about["predicted"]["latency_ns"] <= 30 * NS_PER_MS
    with pytest.raises(BudgetInfeasible, match=r"latency=5ms is out of reach") as error:
        SearchPlan(Budget.of_latency(5, ms=True), kinds=("head", "ffn"), table=table).run(vit)
    assert "..1.00 of the dense latency" in error.value.why
    assert "..50 ms), asked 0.100 (5 ms)" in error.value.why
    assert "a made-up device" in error.value.where
    assert "a budget of at least" in error.value.cure
    with pytest.raises(OptionError, match="needs a table"):
        SearchPlan(Budget("latency", 0.5)).run(vit)


@pytest.mark.parametrize(
    ("value", "ms", "says"),
    [
        ("fast", False, "no latency"),
        (0, False, "no latency"),
        ("nan", True, "no latency"),
        (12, False, "latency_ms=12"),
        (-1, True, "no latency"),
    ],
)
def test_latencies_that_make_no_sense(value: object, ms: bool, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Budget.of_latency(value, ms)  # type: ignore[arg-type]


def stairs(step: int) -> Curve:
    """Time in steps of ``step`` elements, 512 in all, half of the whole."""
    counts = [64, 136, 144, 160, 192, 256, 384]
    points = tuple(Point(n, 0.5 + 0.5 * (-(-n // step) * step) / 512, 1e-4, 128 < n <= 192) for n in counts)
    return Curve("ffn", 512, 4, points)


@pytest.mark.parametrize("step", [1, 8, 16, 32, 64])
def test_the_alignment_is_the_step_of_the_target(vit: Program, step: int) -> None:
    table = replace(made_up(vit, even), curves={"ffn[512] x": stairs(step)})
    best, why = find_multiple(table)
    assert best == max(8, step)
    assert ("paid for and not had" in why) == (step > 8)
    assert find_multiple(made_up(vit, even))[0] == 0
