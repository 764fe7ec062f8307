"""``fxprune explain``: what it says of a group is what the plan did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.digits import tiny_vit
from support.reports import read

import fxprune
from fxprune.artifact.explain import explain, worth
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.report.scores import decode

FFN, HEAD = "blocks.0.mlp.0:ffn", "blocks.1.attn.qkv:head"


@pytest.fixture(scope="module")
def made(trained_weights: dict[str, torch.Tensor], digit_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_vit()
    model.load_state_dict(trained_weights)
    out = tmp_path_factory.mktemp("explain") / "small"
    fxprune.compile(
        model.eval(),
        torch.randn(2, 1, 8, 8),
        flops=0.4,
        data=digit_data.train_images[:64],
        samples=64,
        importance="fisher",
        prune="heads,ffn",
        recover="ridge",
        out=out,
        on_event=lambda _: None,
    )
    return out


def test_elements_ranks_and_cost(made: Path) -> None:
    report, plan = read(made)
    told = explain(made, FFN)
    entry = next(g for g in report["groups"] if g["group"] == FFN)
    keep = plan.choices[FFN].keep
    assert told["kept"] == len(keep) < told["size"] == 96
    assert sorted(e["element"] for e in told["elements"] if e["kept"]) == list(keep)
    assert told["removed"] == sorted(set(range(96)) - set(keep))
    assert [e["rank"] for e in told["elements"]] == list(range(1, 97))
    assert [e["kept"] for e in told["elements"]] == [True] * len(keep) + [False] * (96 - len(keep))
    scores = decode(entry["scores"], 96)
    assert all(scores[e["element"]] == e["score"] for e in told["elements"])
    assert max(told["elements"], key=lambda e: e["score"])["rank_by_score"] == 1
    assert told["macs"] == 2 * 17 * 32  # a row of one weight and a column of the other, for every token
    assert told["params"] == 2 * 32 + 1


def test_the_threshold_is_that_of_the_search(made: Path) -> None:
    """What went here is worth no more per MAC than the least that stays elsewhere, but for what no longer fitted."""
    report, _ = read(made)
    told = explain(made, FFN)
    entry = next(g for g in report["groups"] if g["group"] == FFN)
    best = sorted(decode(entry["scores"], 96), reverse=True)
    step, kept = entry["granularity"], entry["kept"]
    assert told["edge"]["removed"] == pytest.approx(sum(best[kept : kept + step]) / (step * entry["macs"]))
    assert told["edge"]["kept"] == pytest.approx(sum(best[kept - step : kept]) / (step * entry["macs"]))
    assert told["edge"]["removed"] <= told["edge"]["kept"]
    other = told["edge"]["elsewhere"]
    assert (
        other["kept"]
        == worth(
            next(g for g in report["groups"] if g["group"] == other["group"]),
            next(g for g in report["groups"] if g["group"] == other["group"])["kept"],
        )[0]
    )


def test_words(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(made), FFN, "--json", "--top", "3"]) == OK
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told == json.loads(json.dumps(explain(made, FFN)))
    step = told["granularity"]
    assert 8 % step == 0
    assert told["kept"] % step == 0
    for wanted in (
        f"{96 - told['kept']} of 96 went",
        "kMACs",
        f"counts are multiples of {step}, and at least 16",
        "fisher",
        "stays elsewhere",
        "recovery: blocks.0.mlp.2.weight had a weighted error of",
        "structured OBS",
    ):
        assert wanted in " ".join(err.split()), wanted
    assert err.count("stays\n") + err.count("stays ") >= 3
    assert [s["parameter"] for s in told["recovery"]]


def test_what_was_not_cut_and_what_is_frozen(made: Path) -> None:
    report, plan = read(made)
    frozen = report["frozen"][0]
    assert explain(made, frozen["group"])["because"] == [f"nothing went: the group is frozen ({frozen['why']})"]
    other = next(g for g in report["groups"] if not g["searched"])
    assert any("were not asked for" in line for line in explain(made, other["group"])["because"])
    head = explain(made, HEAD)
    assert head["kept"] == len(plan.choices[HEAD].keep) if HEAD in plan.choices else head["size"]


def test_typos_name_the_nearest(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(made), "blocks.0.mlp.1:ffn"]) == USER_ERROR
    err = capsys.readouterr().err
    assert "has no group 'blocks.0.mlp.1:ffn'" in err
    assert f"did you mean '{FFN}'?" in err
    assert main(["explain", str(made), FFN, "--top", "-1"]) == USER_ERROR
    assert main(["explain", str(made.parent / "none"), FFN]) == USER_ERROR


def test_norms_have_no_threshold_across_groups(made: Path, tmp_path: Path, trained: Any) -> None:
    fxprune.compile(trained, torch.randn(2, 1, 8, 8), flops=0.6, out=tmp_path / "l2", on_event=lambda _: None)
    told = explain(tmp_path / "l2", FFN)
    assert told["edge"]["elsewhere"] is None
    assert any("no common unit" in line for line in told["because"])
    assert any("changed no weight" in line for line in told["because"])
    plan = fxprune.apply(
        trained, tmp_path / "l2" / "plan.json", torch.randn(2, 1, 8, 8), out=tmp_path / "again", on_event=lambda _: None
    )
    assert plan.path is not None
    assert any("the plan was given" in line for line in explain(plan.path, FFN)["because"])
