"""Token counts in tables of latencies, from end to end on a machine made up of rows, norms and reducing ops."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.timing import FakeClock
from support.token_models import TokenViT, analysed, planned, scrambled

import fxprune
from fxprune.cli.demo import Digits, DigitsViT
from fxprune.driver.measure_latency import lowerable, measure_table, measure_tokens, schedules
from fxprune.errors import BudgetInfeasible, LoadError, NothingToPrune
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import Choice, CompressionPlan, TokenPlan
from fxprune.ir.program import FACTS, Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.search.latency_model import LatencyModel, times_of
from fxprune.passes.transform.merge_tokens import MergeTokens, without_tokens
from fxprune.registry import backend
from fxprune.request.latency import FILE
from fxprune.request.tokens import TokenGoal
from fxprune.target import clock
from fxprune.target.latency_table import LatencyTable, Setting, TokenPoint

Machine = Callable[[Program], float]


def machine(fixed: float = 20.0, op: float = 2.0, norm: float = 0.2, product: float = 1e-3) -> Machine:
    """Milliseconds: a start, products by their rows and weights, norms by their rows, and so much per reducing op."""

    def time(program: Program) -> float:
        total, lengths = fixed, set()
        for node in program.graph.nodes:
            value, name = node.meta.get("val"), str(node.target)
            if isinstance(value, torch.Tensor) and value.dim() == 3 and ("linear" in name or "layer_norm" in name):
                rows = int(value.shape[1])
                lengths.add(rows)
                total += rows * (product * node.args[1].meta["val"].numel() if "linear" in name else norm)
        return total + op * (len(lengths) - 1)

    return time


@pytest.fixture(scope="module")
def kept_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tables of the plain machine are kept, for all tests here."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(autouse=True)
def _no_watch(monkeypatch: pytest.MonkeyPatch, kept_tables: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept_tables))
    monkeypatch.setattr(clock, "Clock", FakeClock)
    monkeypatch.setattr(FakeClock, "time", staticmethod(machine()))
    monkeypatch.setattr(FakeClock, "read_so_far", 0)


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Machine], None]:
    """Work on another machine, with tables of its own."""

    def use(time: Machine) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(FakeClock, "time", staticmethod(time))

    return use


def options(data: Digits, **more: Any) -> dict[str, Any]:
    images = [data.train_images[:16], data.train_images[16:32]]
    return {
        "data": images,
        "importance": "l2",
        "recover": "none",
        "prune": "heads,ffn,tokens",
        "align": 1,
        "tokens": "tome{schedule=constant}",
        "on_event": lambda event: None,
        **more,
    }


def planning(data: Digits, **more: Any) -> dict[str, Any]:
    """Options of a plan alone."""
    return {k: v for k, v in options(data, **more).items() if k != "recover"}


@pytest.fixture(scope="module")
def program() -> Program:
    return analysed(scrambled(TokenViT()))


def measured(program: Program, time: Machine, wish: str = "tome") -> LatencyTable:
    class Here(FakeClock):
        pass

    Here.time = staticmethod(time)
    with Here(backend("eager"), lowerable(program)) as clock:
        table = measure_table(program, clock, Setting("eager", "made up"), ["head", "ffn"])
        return measure_tokens(program, table, clock, TokenGoal(wish))


@pytest.fixture(scope="module")
def table(program: Program) -> LatencyTable:
    return measured(program, machine())


# ---------------------------------------------------------------- the table
@pytest.mark.parametrize("text", ["tome", "prune", "random"])
def test_few_schedules_are_measured_and_all_of_them_can_be_had(program: Program, text: str) -> None:
    made = TokenGoal(text).method
    found = schedules(program.need("tokens"), made)
    assert 3 <= len(found) <= 5
    for removed in found:
        left = 17
        for r in removed:
            assert 0 <= r <= made.cap(left, 1)
            left -= r
        assert left < 17
    assert len({sum(r > 0 for r in removed) for removed in found}) > 1  # few ops, and one at every site


def test_rows_are_measured_once_per_reducer_and_come_back(
    program: Program, table: LatencyTable, tmp_path: Path
) -> None:
    table.write(tmp_path / "t.json")
    assert LatencyTable.read(tmp_path / "t.json") == table
    curve = table.tokens["tome"]
    assert (curve.tokens, curve.protected, len(curve.sites)) == (16, 1, 3)
    with FakeClock(backend("eager"), lowerable(program)) as clock:
        assert measure_tokens(program, table, clock, TokenGoal("tome{schedule=constant}")) is table
        assert FakeClock.read_so_far == 0
        more = measure_tokens(program, table, clock, TokenGoal("random"))
    assert set(more.tokens) == {"tome", "random"}
    assert FakeClock.read_so_far == len(more.tokens["random"].points)


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"removed": [1, 2]}, "does not fit"),
        ({"removed": [9, 4, 3]}, "does not fit"),
        ({"removed": [-1, 0, 2]}, "does not fit"),
        ({"ratio": float("inf")}, "no time"),
        ({"removed": 3}, ""),
    ],
)
def test_token_rows_that_make_no_sense(table: LatencyTable, tmp_path: Path, point: dict[str, Any], says: str) -> None:
    raw = json.loads(table.to_json())
    raw["tokens"]["tome"]["points"][0] |= point
    (tmp_path / "t.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(LoadError, match="no table of latencies") as error:
        LatencyTable.read(tmp_path / "t.json")
    assert says in error.value.why


def test_an_old_table_is_one_of_widths_alone(program: Program, table: LatencyTable, tmp_path: Path) -> None:
    raw = json.loads(table.to_json())
    del raw["tokens"]
    (tmp_path / "old.json").write_text(json.dumps({**raw, "fxprune_latency": 1}), encoding="utf-8")
    old = LatencyTable.read(tmp_path / "old.json")
    assert old == replace(table, tokens={})
    old.check(program)
    assert json.loads(old.to_json())["fxprune_latency"] == 2
    with pytest.raises(LoadError, match="no token counts for 'tome'") as error:
        old.check_tokens(program, TokenPlan("tome", {}))
    assert "widths alone" in error.value.why
    with pytest.raises(LoadError, match="no token counts for 'tome, unmerged'") as error:
        table.check_tokens(program, TokenPlan("tome", {}, unmerge=True))
    assert "it knows tome" in error.value.why


def test_a_table_of_widths_is_refused_where_tokens_are_asked_for(
    trained: DigitsViT, digit_data: Digits, tmp_path: Path
) -> None:
    x, widths = digit_data.test_images[:2], options(digit_data, prune="heads,ffn", tokens=None)
    fxprune.compile(trained, x, latency=0.8, out=tmp_path / "a", **widths)
    count = FakeClock.read_so_far
    with pytest.raises(LoadError, match="no token counts for 'tome'"):
        fxprune.plan(trained, x, latency=0.8, latency_table=tmp_path / "a" / FILE, **planning(digit_data))
    assert FakeClock.read_so_far == count


def test_rows_of_other_sites_are_refused(program: Program, table: LatencyTable) -> None:
    other = analysed(scrambled(TokenViT(size=3)), size=24)
    with pytest.raises(LoadError, match="of another program"):
        table.check_tokens(other, TokenPlan("tome", {}))
    table.check_tokens(program, TokenPlan("tome", {}))


# ---------------------------------------------------------------- the prediction
def test_plans_that_were_not_measured_are_foretold(program: Program, table: LatencyTable) -> None:
    """Widths and schedules of all sorts together: within 3 % on a machine that is not quite of the model's form."""
    time, groups = machine(), [g for g in program.need("groups") if g.prunable and str(g.kind) in ("head", "ffn")]
    for counts, share in (([3, 3, 3], 0.35), ([5, 0, 0], 0.7), ([0, 4, 2], 0.35), ([1, 0, 6], 0.35)):
        both = planned(program, "tome", counts)
        choices = {g.name: Choice(str(g.kind), g.size, tuple(range(max(1, round(share * g.size))))) for g in groups}
        plan = CompressionPlan(choices).with_tokens(both.need("plan").tokens)
        merged = Pipeline((MergeTokens(),), start=FACTS).run(program.but(plan=plan))
        merged = Pipeline((PropagateAxes(), FindGroups(align=1))).run(merged)
        true = time(lowerable(merged, without_tokens(plan)))
        kept = {g.axis: len(choices[g.name].keep) for g in groups}
        told = LatencyModel(program, table, plan.tokens)(kept).latency_ns / 1e6
        assert told == pytest.approx(true, rel=0.03), (counts, share)


def test_without_tokens_the_model_is_the_one_of_widths(program: Program, table: LatencyTable) -> None:
    plain, none = LatencyModel(program, table), LatencyModel(program, table, TokenPlan("tome", {}))
    assert none().latency_ns == plain().latency_ns == round(table.dense_ms * 1e6)
    assert none.describe_tokens() is None
    some = LatencyModel(program, table, planned(program, "tome", [4, 2, 2]).need("plan").tokens)
    assert some.dense().latency_ns == plain().latency_ns
    assert some().flops < plain().flops
    saved = table.dense_ms - some().latency_ns / 1e6
    corrected = LatencyModel(program, table.correct(0.5), planned(program, "tome", [4, 2, 2]).need("plan").tokens)
    assert table.dense_ms - corrected().latency_ns / 1e6 == pytest.approx(0.5 * saved, rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_more_tokens_never_take_less_time(program: Program, table: LatencyTable, noise: float) -> None:
    """Law: with the same ops, whatever was read."""
    curve, wobble = table.tokens["tome"], itertools.cycle((noise, -noise, 0.0))
    shaken = tuple(TokenPoint(p.removed, max(0.1, p.ratio + next(wobble)), 0.01) for p in curve.points)
    model = LatencyModel(program, replace(table, tokens={"tome": replace(curve, points=shaken)}))
    times = times_of(program, model, TokenPlan("tome", {}))
    taken = [times([r, 0, 0]) for r in range(1, 16)]
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(taken))
    assert min(times.op) >= 0
    assert 0 <= times.follow <= 1
    costs = times.costs()
    assert costs.total([0, 0, 0]) == pytest.approx(times.dense_ns)
    assert costs.total([3, 0, 2]) == pytest.approx(times([3, 0, 2]))


def test_a_machine_on_which_tokens_save_little_is_believed(program: Program) -> None:
    """Half of the time of products is reading weights, which does not go with rows."""

    def time(one: Program) -> float:
        rows = machine(norm=0.0, op=1.0)(one)
        weights = sum(t.numel() for t in one.exported.state_dict.values() if t.dim() == 2)
        return rows + 17e-3 * weights

    found = measured(program, time, "random")
    times = times_of(program, LatencyModel(program, found), TokenPlan("random", {}))
    assert 0.3 < times.follow < 0.7
    for removed in ([2, 2, 2], [6, 0, 0]):
        small = Pipeline((MergeTokens(),), start=FACTS).run(planned(program, "random", removed))
        assert times(removed) / 1e6 == pytest.approx(time(lowerable(small)), rel=0.03)


# ---------------------------------------------------------------- decisions
def test_one_ledger_of_time_is_met_and_told(trained: DigitsViT, digit_data: Digits, tmp_path: Path) -> None:
    made = fxprune.compile(
        trained,
        digit_data.test_images[:2],
        latency=0.7,
        out=tmp_path / "a",
        **options(digit_data, tokens="tome{schedule=constant,share=0.5}"),
    )
    told = json.loads((tmp_path / "a" / "report.json").read_text(encoding="utf-8"))["latency"]
    first = told["rounds"][0]
    assert first["predicted_ms"] == pytest.approx(first["achieved_ms"], rel=0.03)
    assert told["achieved_ratio"] == pytest.approx(0.7, rel=0.05)
    assert made.plan.tokens is not None
    assert not made.plan.tokens.empty
    assert made.plan.elements
    assert set(told["tokens"]["ops_ms"]) == set(made.plan.tokens.removed)
    table = LatencyTable.read(tmp_path / "a" / FILE)
    assert table.hash == made.plan.about["latency_table"]
    # with tokens gone, what no plan cut takes less as well
    assert all(e["predicted_ms"] < e["dense_ms"] for e in told["layers"])
    saved = sum(e["dense_ms"] - e["predicted_ms"] for e in told["layers"])
    beside = sum(told["tokens"]["ops_ms"].values()) + told["tokens"]["between_ms"]
    assert saved - beside == pytest.approx(told["dense_ms"] - told["predicted_ms"], rel=0.02)


def test_the_share_is_decided_by_what_ops_take(
    trained: DigitsViT, digit_data: Digits, another: Callable[[Machine], None]
) -> None:
    """Where an op takes more time than it saves, tokens stay, though in MACs they would go."""
    x = digit_data.test_images[:2]
    cheap = fxprune.plan(trained, x, latency=0.75, **planning(digit_data)).need("plan").tokens
    another(machine(op=150.0))
    dear = fxprune.plan(trained, x, latency=0.75, **planning(digit_data)).need("plan")
    assert cheap is not None
    assert not cheap.empty
    assert dear.tokens is None
    assert dear.elements
    with pytest.raises(BudgetInfeasible, match="tokens alone") as error:
        fxprune.plan(trained, x, latency=0.75, **planning(digit_data, prune="tokens"))
    assert "of the dense latency stay" in error.value.why


def test_ops_that_take_long_go_to_fewer_sites(
    trained: DigitsViT, digit_data: Digits, another: Callable[[Machine], None]
) -> None:
    """One op saves more than two do: the constant schedule over all sites does not reach the budget."""
    another(machine(op=60.0))
    made = fxprune.plan(trained, digit_data.test_images[:2], latency=0.85, **planning(digit_data, prune="tokens"))
    tokens = made.need("plan").tokens
    assert tokens is not None
    assert len(tokens.removed) == 1


def test_a_miss_is_corrected_and_the_table_replays_it(
    trained: DigitsViT, digit_data: Digits, tmp_path: Path, another: Callable[[Machine], None]
) -> None:
    """A plan of both saves a third less than the table says."""
    honest, widths = machine(), {int(t.numel()) for t in trained.state_dict().values() if t.dim() == 2}

    def bent(program: Program) -> float:
        cut = {int(t.numel()) for t in program.exported.state_dict.values() if t.dim() == 2} - widths
        rows = {int(n.meta["val"].shape[1]) for n in program.graph.nodes if "layer_norm" in str(n.target)}
        known.append(honest(program))  # the clock reads the dense program first
        return known[0] - (known[0] - honest(program)) * (0.66 if cut and len(rows) > 1 else 1.0)

    known: list[float] = []
    another(bent)
    x, asked = digit_data.test_images[:2], options(digit_data, tokens="random{schedule=constant,share=0.5}")
    first = fxprune.compile(trained, x, latency=0.75, out=tmp_path / "a", **asked)
    rounds = first.report["latency"]["rounds"]
    assert 2 <= len(rounds) <= 3
    assert rounds[0]["achieved_ms"] > 1.05 * rounds[0]["target_ms"]
    assert rounds[1]["correction"] == pytest.approx(0.66, rel=0.05)
    assert first.report["latency"]["met"]
    count = FakeClock.read_so_far
    again = fxprune.compile(trained, x, latency=0.75, latency_table=tmp_path / "a" / FILE, **asked)
    assert FakeClock.read_so_far == count
    assert again.plan.choices == first.plan.choices
    assert again.report["latency"]["rounds"] == []
    assert again.report["latency"]["predicted_ms"] == pytest.approx(first.report["latency"]["predicted_ms"])


def test_other_budgets_say_what_to_expect_with_tokens(trained: DigitsViT, digit_data: Digits) -> None:
    x = digit_data.test_images[:2]
    made = fxprune.compile(
        trained, x, flops=0.6, expect_latency=True, **options(digit_data, tokens="tome{schedule=constant,share=0.5}")
    )
    told = made.report["latency"]
    assert told["target"] is None
    assert told["achieved_ms"] is None
    assert told["predicted_ms"] == pytest.approx(machine()(made.program), rel=0.04)
    assert set(told["tokens"]["ops_ms"]) == set(made.plan.tokens.removed)  # type: ignore[union-attr]


def test_a_model_without_tokens_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16)).eval()
    with pytest.raises(NothingToPrune, match="tokens cannot be reduced"):
        fxprune.compile(
            model, torch.randn(2, 16), latency=0.5, prune="ffn,tokens", importance="l2", on_event=lambda event: None
        )
    assert FakeClock.read_so_far == 0
