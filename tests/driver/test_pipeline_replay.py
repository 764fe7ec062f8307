"""The pipeline of every run, given back as text: the same plan, the same text, the same weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import drawing
from support.replaying import EVERY, MODELS, QUIET, assert_same, assert_same_weights, batches, feet, vit
from support.timing import FakeClock, fixed_and_work, made_up

import fxprune
from fxprune import CompressionPlan
from fxprune.cli.entry import OK, main
from fxprune.driver.stated import read_pipeline
from fxprune.errors import FxpruneError, NothingToPrune
from fxprune.target import clock
from fxprune.target.latency_table import TokenCurve, TokenPoint

# ------------------------------------------------------------ compile, and compile again by the text

RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "rounds": (
        "feet",
        {"flops": 0.4, "rounds": 3, "importance": "fisher", "align": 1, "data": True},
        (
            "budget=flops=0.736806",
            "start-round,recover{method=ridge},slice-axes",
            "find-groups{inherit=true}",
            "budget=flops=0.4},rank-within,search-plan{budget=flops=0.4},join-rounds,recover,slice-axes",
        ),
    ),
    "rounds within limits": (
        "feet",
        {
            "params": 3000,
            "rounds": 2,
            "importance": "random",
            "seed": 3,
            "align": 4,
            "floor": ["*.ffn=0.25"],
            "freeze": ["4*"],
        },
        ("budget=params=3000", "find-groups{freeze=[4*],inherit=true}"),
    ),
    "joint": (
        "vit",
        {
            "flops": 0.6,
            "prune": "heads,ffn,tokens",
            "tokens": "tome{schedule=optin,share=0.5,seen=16}",
            "importance": "l2",
            "data": True,
        },
        (
            "find-token-sites",
            "plan-tokens{counts=[",
            "search-plan{budget=flops=0.6,kinds=[head kv ffn]},recover",
            "recover,merge-tokens,propagate-axes,find-groups,slice-axes",
        ),
    ),
    "tokens alone": (
        "vit",
        {"flops": 0.8, "prune": "tokens", "tokens": "tome{schedule=constant}", "data": True},
        ("plan-tokens{counts=[4 4],budget=flops=0.8},recover,merge-tokens",),
    ),
    "tokens without a budget": ("vit", {"tokens": "tome:r=2", "prune": "tokens"}, ("plan-tokens{counts=[2 2]},merge",)),
    "tiles": (
        "vit",
        {"flops": 0.6, "blocks": "8x8{slice=0.8,allocation=lsp}", "data": True, "importance": "wanda"},
        (
            "search-plan{budget=flops=0.8}",
            "score-groups{criterion=wanda},search-blocks{budget=flops=0.6,"
            "allocation=lsp},recover-blocks,sparsify-blocks",
        ),
    ),
    "tokens beside tiles": (
        "vit",
        {"flops": 0.6, "tokens": "ppt{threshold=2}:r=3,2", "blocks": "4x4", "importance": "magnitude"},
        ("plan-tokens{reducer=ppt{threshold=2},counts=[3 2]},merge-tokens", "search-blocks{b"),
    ),
    "2:4 alone": (
        "feet",
        {"sparse": "2:4", "seed": 2},
        ("find-groups{align=1},permute-channels{seed=2},propagate-axes,find-blocks{pattern=2:4}",),
    ),
}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_replays(name: str) -> None:
    kind, options, parts = RUNS[name]
    make, shape = MODELS[kind]
    data = batches(shape) if options.get("data") else None
    inputs = torch.randn(2, *shape)
    one = fxprune.compile(make(), inputs, **{**options, "data": data}, **QUIET)
    text = one.report["pipeline"]
    for part in parts:
        assert part in text
    two = fxprune.compile(make(), inputs, data=data, seed=options.get("seed", 0), pipeline=text, **QUIET)
    assert not one.plan.empty
    assert_same(one.plan, two.plan)
    assert two.report["pipeline"] == text
    for key in ("budget", "importance", "cost", "search", "groups", "agreement"):
        assert one.report.get(key) == two.report.get(key), key
    if asked := options.get("flops", options.get("params")):
        assert one.report["budget"]["amount"] == asked
    for key in ("recovery", "sparsity"):
        assert (key in one.report) == (key in two.report)
    assert_same_weights(one, two)


@pytest.fixture
def _no_watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clock, "Clock", FakeClock)
    monkeypatch.setattr(FakeClock, "time", staticmethod(fixed_and_work(500.0)))


@pytest.mark.usefixtures("_no_watch")
def test_the_report_of_a_replay_says_of_time_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Budget, target and dense latency always; what was predicted by the same table; no time that nobody measured."""
    x = torch.randn(3, 16)
    one = fxprune.compile(feet(), x, latency_ms=0.8 * 4.864, align=1, **QUIET)
    first, text = one.report["latency"], one.report["pipeline"]
    assert first["achieved_ms"]
    assert f"budget=latency={0.8 * 4.864!r}ms" in text
    (tmp_path / "latency.json").write_bytes(one.extras["latency.json"])
    given = fxprune.compile(feet(), x, pipeline=text, latency_table=tmp_path / "latency.json", **QUIET)
    kept = fxprune.compile(feet(), x, pipeline=text, **QUIET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    none = fxprune.compile(feet(), x, pipeline=text, **QUIET)
    assert given.report["latency"] == {**first, "rounds": [], "achieved_ms": None, "achieved_ratio": None, "met": None}
    for key in ("budget", "target", "dense_ms", "device", "batch", "threads"):
        assert kept.report["latency"][key] == first[key]
    assert kept.report["latency"]["achieved_ms"] is None
    assert "latency" not in none.report
    for made, known in ((given, "is the table's"), (kept, "is the table's"), (none, "are not known (latency_table=")):
        assert (
            made.report["budget"]
            == one.report["budget"]
            == {"metric": "latency", "amount": 0.8 * 4.864, "relative": False}
        )
        assert any("nothing was measured to choose them" in note and known in note for note in made.report["notes"])
    with pytest.raises(FxpruneError, match="of another program"):
        fxprune.compile(vit(), X, pipeline=TOKEN, latency_table=tmp_path / "latency.json", **QUIET)


@pytest.mark.usefixtures("_no_watch")
@pytest.mark.parametrize("importance", ["l2", "trajectory"])
def test_measured_time_is_stated_as_the_counts_that_it_decided(importance: str) -> None:
    data, x = batches((16,)), torch.randn(3, 16)
    one = fxprune.compile(feet(), x, latency=0.7, importance=importance, data=data, align=1, **QUIET)
    text = one.report["pipeline"]
    assert "search-plan" not in text
    assert "keep-counts{counts=[0:ffn=" in text or "keep-counts{counts=[2:ffn=" in text
    read = FakeClock.read_so_far
    two = fxprune.compile(feet(), x, data=data, pipeline=text, **QUIET)
    assert FakeClock.read_so_far == read
    assert_same(one.plan, two.plan)
    assert two.report["pipeline"] == text
    assert two.report["budget"] == one.report["budget"]
    last = text.rindex("keep-counts")
    name, _, count = text[last:].partition("[")[2].partition("]")[0].split(" ")[0].partition("=")
    other = text[:last] + text[last:].replace(f"{name}={count}", f"{name}={int(count) - 1}", 1)
    three = fxprune.compile(feet(), x, data=data, pipeline=other, **QUIET)
    assert len(three.plan.choices[name].keep) == int(count) - 1


@pytest.mark.usefixtures("_no_watch")
def test_measured_time_with_tokens_states_the_round_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy once its table is measured: plans save less than the table says."""
    busy, known = [1.0], []

    def tokens(program: Any) -> float:
        kept = [n.meta["val"].shape[1] for n in program.graph.nodes if "linear" in str(n.target)]
        known.append(20.0 + sum(int(k) for k in kept if isinstance(k, int)))  # the dense program is read first
        return known[0] - busy[0] * (known[0] - known[-1])

    def listen(event: Any) -> None:
        if "measure the plan" in event.text:
            busy[0] = 0.6

    monkeypatch.setattr(FakeClock, "time", staticmethod(tokens))
    x = torch.randn(2, 1, 8, 8)
    one = fxprune.compile(vit(), x, latency=0.85, prune="tokens", tokens="tome{schedule=constant}", on_event=listen)
    rounds = one.report["latency"]["rounds"]
    assert len(rounds) > 1
    assert rounds[0]["achieved_ms"] > 1.05 * rounds[0]["target_ms"]
    text = one.report["pipeline"]
    assert text.count("plan-tokens") == 1
    two = fxprune.compile(vit(), x, pipeline=text, **QUIET)
    assert_same(one.plan, two.plan)
    assert two.report["pipeline"] == text
    assert two.report["budget"] == one.report["budget"] == {"metric": "latency", "amount": 0.85, "relative": True}
    assert two.report["latency"]["target"] == one.report["latency"]["target"]


class Stopped(FakeClock):
    """A clock that nobody may read."""

    def read(self, program: Any) -> Any:
        raise AssertionError("a given table is gone by; nothing is measured")


@pytest.mark.parametrize("importance", ["l2", "trajectory"])
def test_a_given_table_with_tokens_replays(importance: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Widths and tokens by one table, and again by what the pipeline states: without a clock, then without a table."""
    monkeypatch.setattr(clock, "Clock", Stopped)
    data, x = batches((1, 8, 8)), torch.randn(2, 1, 8, 8)
    asked: dict[str, Any] = {
        "prune": "heads,ffn,tokens",
        "tokens": "tome{schedule=constant,share=0.5}",
        "align": 1,
        "data": data,
        **QUIET,
    }
    program = fxprune.plan(vit(), x, flops=0.9, importance="l2", **asked)
    sites = program.need("tokens").usable
    whole = sites[0].tokens - sites[0].protected
    points = tuple(TokenPoint(r, 1.0 - 0.02 * sum(r), 1e-6) for r in ((whole // 2, 0), (0, whole // 2), (4, 2)))
    curve = TokenCurve(whole, sites[0].protected, tuple(s.name for s in sites), points)
    table = made_up(program, lambda kind, n, size: 1.0 - 0.3 * (1.0 - n / size))
    replace(table, tokens={"tome": curve}).write(tmp_path / "t.json")
    one = fxprune.plan(vit(), x, latency=0.8, latency_table=tmp_path / "t.json", importance=importance, **asked)
    plan = one.need("plan")
    assert plan.choices
    assert plan.tokens is not None
    assert not plan.tokens.empty
    assert plan.about["budget"] == "latency=0.8"
    text = plan.about["pipeline"]
    tail = text[text.index("plan-tokens") :]
    assert "keep-counts{counts=[" in tail
    assert "search-plan" not in tail
    two = fxprune.plan(vit(), x, pipeline=text, data=data, **QUIET).need("plan")
    assert_same(plan, two)
    assert two.about["pipeline"] == text
    assert read_pipeline(text).budget == fxprune.Budget("latency", 0.8)  # not that of the scores' own search
    assert read_pipeline(text.replace(",budget=latency=0.8", "")).budget is None
    three = fxprune.plan(vit(), x, pipeline=text, latency_table=tmp_path / "t.json", **QUIET).need("plan")
    assert three.about["budget"] == two.about["budget"] == "latency=0.8"


# ------------------------------------------------------------ any model, any options: plan, and plan again by the text

CRITERIA = st.sampled_from(["l1", "l2", "random", "taylor", "fisher", "activation"])
CUT = st.fixed_dictionaries(
    {
        "flops": st.floats(0.45, 0.95).map(lambda f: round(f, 3)),
        "importance": CRITERIA,
        "align": st.sampled_from([1, 4, 8]),
        "seed": st.integers(0, 3),
    },
    optional={"search": st.sampled_from(["auto", "lagrangian"]), "floor": st.sampled_from([0.0, 0.2])},
)
ROUNDS = st.builds(lambda cut, n: {**cut, "rounds": n}, CUT, st.integers(2, 3))
TOKENS = st.builds(
    lambda cut, how, kinds: {**cut, "tokens": how, "prune": kinds},
    CUT,
    st.sampled_from(
        [
            "tome:r=2",
            "prune{score=received-value}:r=3,1",
            "tome{schedule=constant,share=0.5}",
            "random{schedule=decreasing,share=0.3}",
            "ppt{schedule=constant,multiple=4,share=1}",
            "tome{schedule=optin,seen=16}",
        ]
    ),
    st.sampled_from(["heads,ffn,tokens", "ffn,tokens", "tokens"]),
)
TILED = st.builds(
    lambda flops, how, importance, seed: {"flops": flops, "blocks": how, "importance": importance, "seed": seed},
    st.sampled_from([0.6, 0.75, 0.9]),
    st.sampled_from(
        ["8x8", "4x8{allocation=uniform,floor=0.2}", "8x4{slice=0.9}", "8x8{allocation=lsp,power=false,ends=true}"]
    ),
    st.sampled_from(["magnitude", "wanda", "lsp"]),
    st.integers(0, 2),
)
PAIRED = st.builds(
    lambda how, cut: {**cut, "sparse": how},
    st.sampled_from(["2:4", "2:4{permute=false}"]),
    st.one_of(CUT, st.just({"importance": "obert"})),
)
ANY = st.one_of(
    st.tuples(st.sampled_from(["feet", "queries", "written"]), st.one_of(CUT, ROUNDS, TILED, PAIRED)),
    st.tuples(st.just("vit"), st.one_of(ROUNDS, TOKENS, TILED)),
)


@settings(max_examples=drawing.of(3, 10), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ANY)
def test_any_plan_replays(drawn: tuple[str, dict[str, Any]]) -> None:
    name, options = drawn
    make, shape = EVERY[name]
    data, x = batches(shape), torch.randn(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = fxprune.plan(make(), x, data=data, **options, **QUIET).need("plan")
        except (fxprune.BudgetInfeasible, NothingToPrune):
            assume(False)
        text = one.about["pipeline"]
        two = fxprune.plan(make(), x, data=data, pipeline=text, seed=options.get("seed", 0), **QUIET).need("plan")
    assert_same(one, two)
    assert two.about["pipeline"] == text


# ------------------------------------------------------------ edited by hand

X = "2x1x8x8"
HEAD = "propagate-axes,find-groups{align=1},"
TOKEN = HEAD + "find-token-sites,plan-tokens{counts=[4 2]},merge-tokens,propagate-axes,find-groups{align=1},slice-axes"
ROUND = (
    HEAD + "score-groups,search-plan{budget=flops=0.8},start-round,slice-axes,propagate-axes,"
    "find-groups{inherit=true},score-groups,search-plan{budget=flops=0.6},join-rounds,slice-axes"
)
TILE = (
    HEAD + "slice-axes,fold-indices,spell-out-tokens,propagate-axes,find-blocks{pattern=8x8},"
    "score-groups{criterion=magnitude},search-blocks{budget=flops=0.7},sparsify-blocks"
)
COUNT = HEAD + "score-groups,keep-counts{counts=[blocks.0.mlp.0:ffn=8]},slice-axes"


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (TOKEN, "[4 2]", "[1 5]"),
        (TOKEN, "counts", "reducer=random,counts"),
        (ROUND, "flops=0.8", "flops=0.95"),
        (ROUND, "flops=0.6", "flops=0.5"),
        (ROUND, "find-groups{inherit=true}", "find-groups{floor=0.9}"),
        (ROUND, "find-groups{inherit=true}", "find-groups{freeze=[blocks.1.*],inherit=true}"),
        (TILE, "flops=0.7", "flops=0.6"),
        (TILE, "8x8", "4x4"),
        (TILE, "8x8", "8x8,ends=true"),
    ],
)
def test_a_changed_option_changes_the_result(text: str, old: str, new: str) -> None:
    assert text.count(old) == 1
    one, two = (
        fxprune.plan(vit(), X, pipeline=t.partition(",merge-tokens")[0], **QUIET).need("plan")
        for t in (text, text.replace(old, new))
    )
    assert one.choices != two.choices


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (TOKEN, "[4 2]", "[4]", r"'plan-tokens' needs one count per attention(.|\n)*1 counts, 2"),
        (TOKEN, "[4 2]", "[9 0]", "'plan-tokens' removes more tokens than can go"),
        (TOKEN, "[4 2]", "[4 x]", "pass 4: plan-tokens(.|\n)*"),
        (TOKEN, "counts", "reducer=tomme,counts", "did you mean"),
        (TOKEN, "[4 2]", "[4 2],budget=flops=0.5", "the counts exceed the budget that is stated(.|\n)*plan-tokens"),
        (TOKEN, "[4 2]", "[4 2],budget=speed=0.5", "unknown budget"),
        (ROUND, "flops=0.6", "latency=0.6", "'search-plan' cannot search by time"),
        (COUNT, "=8]", "=8],budget=flops=0.5", "the counts exceed the budget"),
        (TOKEN, "[4 2]", "[4 -2]", "cannot be negative"),
        (TOKEN, "find-token-sites,", "", "put find-token-sites before"),
        (TOKEN, "plan-tokens{counts=[4 2]}", HEAD + "score-groups,search-plan{budget=flops=0.5}", "'merge-tokens' has"),
        (TOKEN, "propagate-axes,find-groups{align=1},slice", "find-groups{align=8},slice", "find-groups{align=1}"),
        (TOKEN, ",slice-axes", ",score-groups,slice-axes", "'score-groups' stands between"),
        (ROUND, "start-round,", "", "slices twice"),
        (ROUND, "join-rounds,", "", "not joined"),
        (ROUND, "inherit=true", "inherit=true,align=4", "inherited or stated, not both"),
        (ROUND, "search-plan{budget=flops=0.8},start-round", "start-round,search-plan{budget=flops=0.8}", "needs plan"),
        (ROUND, ",start-round,slice-axes", "", "'join-rounds' has no round"),
        (
            ROUND,
            "join-rounds,slice-axes",
            "join-rounds,slice-axes,join-rounds",
            "'join-rounds' stands behind slice-axes",
        ),
        (TILE, "search-blocks{budget=flops=0.7},", "", "no pass of the pipeline plans tiles"),
        (TILE, "search-blocks{budget=flops=0.7}", "search-blocks", "tiles need a budget"),
        (TILE, "find-blocks{pattern=8x8},", "", "'search-blocks' needs groups(.|\n)*find-blocks"),
        (TILE, "slice-axes", "find-blocks,slice-axes", "'find-blocks' stands before slice-axes"),
        (TILE, "sparsify-blocks", "sparsify-blocks,find-blocks", "'find-blocks' stands behind sparsify-blocks"),
        (TILE, "search-blocks{budget=flops=0.7}", "search-blocks{budget=flops=0.01}", "out of reach for tiles"),
        (COUNT, "=8", "=99", "'keep-counts' states a count"),
        (COUNT, "mlp.0", "mlp.9", "did you mean"),
        (COUNT, "=8", "=many", "is not a count"),
        (COUNT, "=8", "=8 blocks.0.mlp.0:ffn=9", "'keep-counts' names a group twice"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_pass(text: str, old: str, new: str, message: str) -> None:
    assert text.count(old) == 1
    with pytest.raises(FxpruneError, match=message):
        fxprune.compile(vit(), X, pipeline=text.replace(old, new), **QUIET)


def test_a_budget_from_outside_goes_to_the_search_that_needs_one() -> None:
    both = HEAD + (
        "score-groups,search-plan,slice-axes,find-blocks{pattern=2:4},score-groups{criterion=magnitude},search-blocks"
    )
    stated = read_pipeline(both, fxprune.Budget("flops", 0.7))
    assert [str(p) for p in (stated.before[-1], stated.tiles[-1])] == ["search-plan{budget=flops=0.7}", "search-blocks"]
    alone = read_pipeline(TILE.replace("{budget=flops=0.7}", ""), fxprune.Budget("flops", 0.7))
    assert alone.budget == fxprune.Budget("flops", 0.7)


# ------------------------------------------------------------ from the command line, by the text and by the options

COMMANDS = {
    "rounds": "--flops 0.6 --rounds 2",
    "tokens": "--tokens ppt{threshold=2}:r=3,2 --flops 0.7",
    "tiles": "--flops 0.7 --blocks 8x8",
}


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_replays_by_pipeline_and_by_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(vit(), (torch.randn(2, 1, 8, 8),)), "m.pt2")
    assert (
        main(
            [
                "compile",
                "m.pt2",
                *COMMANDS[name].split(),
                "--importance",
                "magnitude" if name == "tiles" else "l2",
                "--out",
                "small",
            ]
        )
        == OK
    )
    report = json.loads(Path("small/report.json").read_text(encoding="utf-8"))
    assert main(["plan", "m.pt2", "--pipeline", report["pipeline"], "--out", "a.json"]) == OK
    assert main(["plan", "m.pt2", "--config", "small/report.json", "--out", "b.json"]) == OK
    first = CompressionPlan.read("small/plan.json")
    assert_same(first, CompressionPlan.read("a.json"))
    assert_same(first, CompressionPlan.read("b.json"))
