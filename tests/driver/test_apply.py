"""A plan that somebody gives: the pipeline of the report carries it out again, and says so when it cannot."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import drawing
from support.laws import random_plan
from support.replaying import EVERY, QUIET, assert_same, assert_same_report, assert_same_weights, batches, feet, vit
from support.runs import opened_run

import fxprune
from fxprune import Artifact, CompressionPlan, FxpruneError, Kind, OptionError, PlanError, Program
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.driver.apply import apply_plan
from fxprune.driver.finish import finish
from fxprune.ir.plan import TokenPlan
from fxprune.request.options import OF_A_PLAN

X = "2x1x8x8"
KINDS = tuple(Kind)


def carried_out(name: str, plan: CompressionPlan, recover: str = "none", seed: int = 0) -> Artifact:
    """What ``fxprune apply`` makes of it; with recovery, what ``fxprune export`` makes."""
    make, shape = EVERY[name]
    x = batches(shape)[0][:2]
    if recover == "none":
        return fxprune.apply(make(), plan, x, seed=seed, **QUIET)
    run = opened_run(make(), x, batches(shape), QUIET["on_event"], seed=seed, limits=OF_A_PLAN)
    return finish(apply_plan(run, plan, recover))


def replayed(name: str, one: Artifact, plan: CompressionPlan, recover: str = "none", seed: int = 0) -> Artifact:
    make, shape = EVERY[name]
    data = None if recover == "none" else batches(shape)
    return fxprune.compile(
        make(), batches(shape)[0][:2], plan=plan, pipeline=one.report["pipeline"], data=data, seed=seed, **QUIET
    )


def assert_replays(name: str, plan: CompressionPlan, recover: str = "none", seed: int = 0) -> Artifact:
    """The law: the same text, the same plan to the last byte, the same weights, the same report."""
    one = carried_out(name, plan, recover, seed)
    two = replayed(name, one, CompressionPlan.from_json(plan.to_json()), recover, seed)
    assert two.report["pipeline"] == one.report["pipeline"]
    assert two.plan.to_json() == one.plan.to_json()
    assert_same_weights(one, two)
    assert_same_report(one, two)
    return one


@cache
def known(name: str) -> Program:
    make, shape = EVERY[name]
    return fxprune.inspect(make(), torch.randn(2, *shape), align=1, floor=0.0, **QUIET)


@cache
def made(kind: str) -> tuple[str, CompressionPlan]:
    """Plans of compile: (model, plan)."""
    name, options = {
        "tiles": ("vit", {"flops": 0.6, "blocks": "8x8{slice=0.8}", "importance": "magnitude"}),
        "2:4": ("feet", {"flops": 0.6, "sparse": "2:4", "seed": 2, "importance": "random"}),
        "widths": ("queries", {"flops": 0.8, "prune": "qk,v,heads", "importance": "l2"}),
        "tokens, tiles": (
            "vit",
            {"flops": 0.6, "tokens": "ppt{threshold=2}:r=3,2", "blocks": "4x4", "importance": "magnitude"},
        ),
    }[kind]
    make, shape = EVERY[name]
    return name, fxprune.compile(make(), torch.randn(2, *shape), **options, **QUIET).plan  # type: ignore[arg-type]


# ------------------------------------------------------------ the law


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("kind", "recover", "parts"),
    [
        ("tiles", "none", ("slice-axes,fold-indices,spell-out-tokens,propagate-axes,sparsify-blocks",)),
        (
            "2:4",
            "auto",
            ("recover{seed=1},slice-axes", "find-groups{align=1},permute-channels,propagate-axes,sparsify-blocks"),
        ),
        ("widths", "none", ("unfuse",)),
        (
            "tokens, tiles",
            "ridge",
            ("find-token-sites,read-plan", "recover{method=ridge,seed=1},merge-tokens", "sparsify-blocks"),
        ),
    ],
)
def test_what_compile_decided_replays_where_it_is_applied(kind: str, recover: str, parts: tuple[str, ...]) -> None:
    name, plan = made(kind)
    one = assert_replays(name, plan, recover, seed=1)
    text = one.report["pipeline"]
    assert f"read-plan{{digest={plan.digest}}}" in text
    for part in parts:
        assert part in text
    assert not one.plan.empty
    assert one.report["cost"]["ratio"]["flops"] <= 1


def test_no_cut_at_all_replays() -> None:
    one = assert_replays("feet", CompressionPlan())
    assert one.report["cost"]["ratio"]["flops"] == 1


CUT = st.tuples(st.sampled_from(["feet", "queries", "written"]), st.just(()))
MERGED = st.tuples(st.just("vit"), st.sampled_from([(3, 0), (2, 5), (0, 4), (0, 0), ()]))


@settings(max_examples=drawing.of(2, 10), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(CUT, MERGED),
    st.sampled_from([1.0, 0.3, 0.5, 0.75]),
    st.integers(0, 9),
    st.sampled_from(["tome", "ppt{threshold=2}", "random"]),
    st.sampled_from(["none", "ridge", "bias", "scale"]),
)
def test_any_plan_that_is_given_replays(
    drawn: tuple[str, tuple[int, ...]], share: float, seed: int, reducer: str, recover: str
) -> None:
    name, counts = drawn
    program = known(name)
    plan = random_plan(program, [Kind.HEAD, Kind.KV, Kind.FFN], share, seed)
    if counts:
        sites = program.need("tokens").usable
        removed = {site.name: r for site, r in reversed(list(zip(sites, counts, strict=True)))}
        plan = CompressionPlan(plan.choices, {"seed": seed}).with_tokens(TokenPlan(reducer, removed))
    assert_replays(name, plan, recover, seed)


def test_the_digest_is_of_what_is_decided() -> None:
    _, plan = made("tokens, tiles")
    assert plan.tokens is not None
    groups, tokens = random_plan(known("vit"), KINDS, 0.5, 4).elements, plan.tokens
    plan = CompressionPlan(groups, {"seed": 0}).with_tokens(tokens).with_blocks(plan.blocks)
    assert re.fullmatch("[0-9a-f]{16}", plan.digest)
    assert CompressionPlan.from_json(plan.to_json()).digest == plan.digest
    turned = TokenPlan(tokens.reducer, dict(reversed(tokens.removed.items())))
    again = CompressionPlan(groups, {"other": 1}).with_tokens(turned).with_blocks(plan.blocks)
    assert again.digest == plan.digest
    less = TokenPlan(tokens.reducer, {next(iter(tokens.removed)): 1})
    others = [
        plan.with_elements(dict(list(groups.items())[1:])),
        plan.with_tokens(less),
        plan.with_tokens(None),
        plan.with_blocks({}),
    ]
    assert len({plan.digest, *(o.digest for o in others)}) == 5


# ------------------------------------------------------------ by hand

READ = "propagate-axes,find-groups{align=1},read-plan,slice-axes"


def test_a_given_plan_is_recovered_by_a_pipeline_of_ones_own() -> None:
    plan = random_plan(known("feet"), KINDS, 0.5, 4)
    text = READ.replace("read-plan", "read-plan,recover{method=ridge}")
    one = fxprune.compile(feet(), "2x16", plan=plan, pipeline=text, data=batches((16,)), **QUIET)
    assert one.report["recovery"]["method"] == "ridge"
    assert f"read-plan{{digest={plan.digest}}},recover{{method=ridge}},slice-axes" in one.report["pipeline"]
    assert_same(one.plan, plan)
    bare = fxprune.apply(feet(), plan, "2x16", **QUIET)
    assert not torch.equal(one.module.state_dict()["2.weight"], bare.module.state_dict()["2.weight"])


def test_tiles_behind_a_given_plan_are_planned_by_the_pipeline() -> None:
    plan = random_plan(known("feet"), KINDS, 0.5, 4)
    tiles = ",find-blocks{pattern=8x8},score-groups{criterion=magnitude},search-blocks{budget=flops=0.3}"
    one = fxprune.compile(feet(), "2x16", plan=plan, pipeline=READ + tiles, **QUIET)
    two = fxprune.compile(feet(), "2x16", plan=plan, pipeline=one.report["pipeline"], **QUIET)
    assert one.plan.blocks
    assert_same(one.plan, two.plan)
    assert two.report["pipeline"] == one.report["pipeline"]
    assert_same_weights(one, two)
    with pytest.raises(OptionError, match="the plan holds tiles, and the pipeline plans others"):
        fxprune.compile(feet(), "2x16", plan=one.plan, pipeline=READ + tiles, **QUIET)


@pytest.mark.parametrize(
    ("text", "given", "says"),
    [
        (READ, False, r"reads a plan, and none is given(.|\n)*pass 3: read-plan(.|\n)*--plan small/plan.json"),
        (READ.replace("read-plan", "score-groups,search-plan{budget=flops=0.5}"), True, "it has no read-plan"),
        ("read-plan", True, "put find-blocks or find-groups before it"),
        (READ.replace("read-plan", "read-plan{digets=1}"), True, "did you mean 'digest'"),
        (READ.replace("read-plan,slice-axes", "slice-axes,read-plan"), True, "'read-plan' stands behind slice-axes"),
        (READ + ",find-groups{align=8},permute-channels", True, "no pass of the pipeline plans tiles"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_is_loaded(text: str, given: bool, says: str) -> None:
    plan = random_plan(known("feet"), KINDS, 0.5, 4) if given else None
    with pytest.raises(OptionError, match=says):
        fxprune.compile("no-such-model.pt", pipeline=text, plan=plan)


def test_a_budget_beside_a_given_plan_is_refused() -> None:
    plan = random_plan(known("feet"), KINDS, 0.5, 4)
    with pytest.raises(OptionError, match="budget is given twice, or not used"):
        fxprune.compile("no-such-model.pt", pipeline=READ, plan=plan, flops=0.5)
    with pytest.raises(OptionError, match="reads a plan, and none is given"):
        fxprune.plan("no-such-model.pt", pipeline=READ)


def test_tokens_of_a_plan_need_their_sites() -> None:
    _, plan = made("tokens, tiles")
    with pytest.raises(OptionError, match="put find-token-sites before it"):
        fxprune.compile(vit(), X, plan=plan, pipeline=READ, **QUIET)
    restored = READ.replace("read-plan", "find-token-sites{unmerge=true},read-plan")
    with pytest.raises(OptionError, match="differ about restoring tokens"):
        fxprune.compile(vit(), X, plan=plan, pipeline=restored, **QUIET)


# ------------------------------------------------------------ files, from the command line


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with m.pt2, first/ (compiled), and small/ (its plan applied)."""
    folder = tmp_path_factory.mktemp("applied")
    torch.export.save(torch.export.export(vit(), (torch.randn(2, 1, 8, 8),)), folder / "m.pt2")
    common = ["--seconds", "0", "-q"]
    assert (
        main(
            [
                "compile",
                str(folder / "m.pt2"),
                "--flops",
                "0.6",
                "--tokens",
                "tome:r=2",
                "--out",
                str(folder / "first"),
                *common,
            ]
        )
        == OK
    )
    assert (
        main(
            [
                "apply",
                str(folder / "m.pt2"),
                "--plan",
                str(folder / "first/plan.json"),
                "--out",
                str(folder / "small"),
                *common,
            ]
        )
        == OK
    )
    return folder


def report_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "report.json").read_text(encoding="utf-8"))
    return found


def weights(path: Path) -> dict[str, str]:
    return {
        n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in fxprune.load(path).state_dict().items()
    }


def test_the_command_line_replays_an_applied_plan_by_text_and_by_options(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = report_of(release / "small")
    text = report["pipeline"]
    page = (release / "small/report.html").read_text(encoding="utf-8")
    assert text in page
    assert "--plan with the plan.json that lies here" in page
    assert "--plan" not in (release / "first/report.html").read_text(encoding="utf-8")
    again = [str(release / "m.pt2"), "--seconds", "0", "-q"]
    assert (
        main(["compile", *again, "--pipeline", text, "--plan", str(release / "small/plan.json"), "--out", "by-text"])
        == OK
    )
    assert main(["compile", *again, "--config", "by-text", "--out", "by-its-options"]) == OK
    assert main(["apply", *again, "--config", str(release / "small/report.json"), "--out", "by-options"]) == OK
    for name in ("by-text", "by-its-options", "by-options"):
        assert weights(Path(name)) == weights(release / "small"), name
        assert report_of(Path(name))["pipeline"] == text, name
        assert Path(name, "plan.json").read_bytes() == (release / "small/plan.json").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        (r'"size": 32', '"size": 33', '"size": 33', "made for another architecture"),
        (r'"blocks\.1\.mlp', '"blocks.9.mlp', '"blocks.9', "did you mean 'blocks.1"),
        (r'("keep": \[[\d, ]+), \d+\]', r"\1, 99]", ", 99]", "kept index is out of range"),
        (r'("removed": )2', r"\g<1>70", "70", "removes more tokens than can go"),
        (r'"blocks\.0(.*:token": .*"removed": 2)', r'"blocks.7\1', '"blocks.7', "where this model has no attention"),
        (r'("removed": )2', r"\g<1>1", "", "another plan than the pipeline's"),
        (r'("keep": \[)\d+, ', r"\1", "", "its digest is"),
        (r'"choices"', '"chioces"', '"chioces"', "means nothing"),
    ],
)
def test_a_damaged_plan_is_an_error_at_its_line(
    release: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    line: str,
    says: str,
) -> None:
    """Where the plan could be another model's; where it could be somebody's own, the file is named, and the digests."""
    monkeypatch.chdir(tmp_path)
    text = (release / "small/plan.json").read_text(encoding="utf-8")
    text, count = re.subn(old, new, text, count=1)
    assert count
    Path("plan.json").write_text(text, encoding="utf-8")
    stated = report_of(release / "small")["pipeline"]
    assert (
        main(["compile", str(release / "m.pt2"), "--pipeline", stated, "--plan", "plan.json", "--out", "small"])
        == USER_ERROR
    )
    told = capsys.readouterr().err
    assert says in told
    where = [n for n, one in enumerate(text.splitlines(), 1) if line and line in one]
    assert re.search(rf"at    plan\.json:{where[-1]}\b" if where else r"at    plan\.json\b", told)
    assert not Path("small").exists()


def test_a_delivery_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fxprune export`` with recovery: its text with its plan and its calibration data, and its options."""
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(feet(), (torch.randn(2, 16),)), "m.pt2")
    Path("p.json").write_text(random_plan(known("feet"), KINDS, 0.5, 4).to_json(), encoding="utf-8")
    np.savez("data.npz", x=torch.cat(batches((16,))).numpy())
    asked = [
        "--plan",
        "p.json",
        "--target",
        "eager",
        "--verify",
        "data.npz",
        "--data",
        "data.npz",
        "--data-samples",
        "12",
        "--recover",
        "ridge",
        "--seconds",
        "0.05",
        "--seed",
        "3",
    ]
    assert main(["export", "m.pt2", *asked, "--out", "release", "-q"]) == OK
    text = report_of(Path("release/eager"))["pipeline"]
    assert "recover{method=ridge,seed=3}" in text
    assert (
        main(
            [
                "compile",
                "m.pt2",
                "--pipeline",
                text,
                "--plan",
                "release/eager/plan.json",
                "--data",
                "data.npz",
                "--samples",
                "12",
                "--seed",
                "3",
                "--seconds",
                "0",
                "--out",
                "again",
                "-q",
            ]
        )
        == OK
    )
    assert weights(Path("again")) == weights(Path("release/eager"))
    assert report_of(Path("again"))["pipeline"] == text


def test_a_plan_of_another_model_is_told_by_its_group() -> None:
    plan = random_plan(known("queries"), KINDS, 0.5, 4)
    with pytest.raises(PlanError, match="does not have"):
        fxprune.compile(feet(), "2x16", plan=plan, pipeline=READ, **QUIET)
    with pytest.raises(FxpruneError, match="cannot be read"):
        fxprune.compile(feet(), "2x16", plan="nowhere.json", pipeline=READ, **QUIET)
