"""Comparing what tools/bench/tokens.py measured: image by image, draw by draw, over all reducers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.record import read
from bench.tokens.cells import DRAWN, RATIOS, REDUCERS, sweep
from bench.tokens.compare import (
    average,
    compare,
    difference,
    mean_of,
    of_ledger,
    of_row,
    over_reducers,
    overall,
    pack_bits,
    pairs,
    points,
)
from fxprune.cli.help import page

RESULTS = Path(__file__).resolve().parents[2] / "tools" / "bench" / "results"


def counted(right: dict[Any, Tensor], bits: Tensor, seeds: tuple[int, ...] = (0,)) -> list[Any]:
    """Records of a few cells: which images they have right, by (row, schedule, ratio, seed), else ``bits``."""
    cells = [
        c
        for seed in seeds
        for s in ("constant", "optin")
        for c in sweep([r for r in ("tome", "random") if r in DRAWN or seed == 0], [s], [0.9, 0.5], seed)
    ]
    return [
        {
            **c.record(32, "w"),
            "accuracy": 1.0,
            "agreement": 1.0,
            "kl": 1.0,
            "images": len(bits),
            "right": pack_bits(right.get((c.row, c.schedule, c.ratio, c.seed), bits)),
        }
        for c in cells
    ]


def test_schedules_are_counted_over_all_reducers() -> None:
    bits = torch.arange(100) % 2 == 0
    fewer, one_less = bits.clone(), bits.clone()
    fewer[:40], one_less[0] = False, False
    found = counted(
        {
            ("tome", "optin", 0.9, 0): one_less,
            ("random", "optin", 0.5, 0): fewer,
            ("random", "constant", 0.9, 0): one_less,
        },
        bits,
    )
    reached, told = overall(found, "optin")
    assert not reached
    assert told == (
        "optin in 4 cells, 100 images: 1 as constant, 1 above, 2 below; by -6.67 points in the mean where they differ; "
        "below by more than a standard error: random at 0.5 (-20.00, standard error 4.02); by more than two: 1"
    )
    reached, told = overall([], "optin")
    assert not reached, "nothing was measured"
    assert told.startswith("optin in 0 cells, 0 images: 0 as constant")
    assert overall(counted({("tome", "optin", 0.9, 0): one_less}, bits), "optin")[0], "one image is chance"


def test_draws_are_averaged_and_compared_seed_by_seed() -> None:
    bits = torch.arange(100) % 2 == 0
    fewer, more = bits.clone(), bits.clone()
    fewer[:40], more[1:21] = False, True
    found = counted({("random", "optin", 0.5, 0): fewer, ("random", "optin", 0.5, 1): more}, bits, (0, 1, 2))
    found = [r for r in found if (r["schedule"], r["seed"]) != ("constant", 2)]
    ones, twos = pairs(found, "random", "optin", "constant", 0.5)
    assert [r["seed"] for r in ones] == [r["seed"] for r in twos] == [0, 1], "seed 2 has no other side"
    assert compare(found, "optin")["random", 0.5].mean() == pytest.approx((-0.2 + 0.1) / 2)
    rows = compare(found, "optin")["random", 0.5]
    of_images = rows.mean(axis=0).std(ddof=1) / 10
    assert points(rows)[1] == pytest.approx(100 * (of_images**2 + 0.3**2 / 4) ** 0.5), "both are chance"
    assert points(rows[:1])[1] == pytest.approx(100 * rows[0].std(ddof=1) / 10)
    assert over_reducers(found, "optin")[0.5][0] == pytest.approx(-2.5), "of two reducers, one of which is equal"
    assert over_reducers(found, "optin")[0.5][2] == 2
    found[0]["kl"] = 4.0
    whole = of_row(found, found[0]["row"], "constant", 0.9)
    assert whole is not None
    assert whole["kl"] == 4.0, "what does not draw is measured once"
    assert mean_of([{"accuracy": 1.0, "kl": 1.0, "seed": 0}, {"accuracy": 2.0, "kl": 2.0, "seed": 1}]) == {
        "accuracy": 1.5,
        "kl": 1.5,
        "seed": 0,
        "draws": 2,
    }
    assert mean_of([]) is None


def test_draws_are_one_line_of_the_picture() -> None:
    bits = torch.arange(8) % 2 == 0
    found = average(counted({}, bits, (0, 1, 2)))
    assert sorted((r["row"], r["schedule"], r["ratio"], r.get("draws")) for r in found) == sorted(
        (row, schedule, ratio, 3 if row == "random" else None)
        for row in ("tome", "random")
        for schedule in ("constant", "optin")
        for ratio in (0.9, 0.5)
    )


def counts(told: str) -> tuple[str, ...]:
    found = re.match(
        r"\w+ in 48 cells, 3744 images: (\d+) as constant, (\d+) above, (\d+) below; by (\S+) points", told
    )
    assert found is not None, told
    return found.groups()


def test_the_page_says_what_is_counted() -> None:
    measured = read(RESULTS / "tokens.json")["measured"]
    text = page("tokens")
    said = " ".join(text.split())
    _, told = overall(measured, "optin")
    equal, above, below, mean = counts(told)
    assert (
        f"is in {equal} of 48 cells, above it in {above} and below it in {below}, by {mean} points in the mean of "
        "those that differ; below by more than a standard error in none"
    ) in said
    assert "below by more than a standard error: none" in told
    _, told = overall(measured, "auto")
    equal, above, below, mean = counts(told)
    assert f"`auto` (one draw): {equal}, {above} and {below}, by {mean} points" in said
    assert re.findall(r"([\w-]+ at \S+) \(-", told) == ["random at 0.7"]
    table = text[text.index("    over reducers") :].split("\n\n")[0].splitlines()
    assert [float(r) for r in table[0].split()[2:]] == list(RATIOS)
    for line in table[1:]:
        name, *cells = line.split()
        assert cells == [f"{by:+.2f}" for by, _, reducers in over_reducers(measured, name).values()], name
    errors = [error for name in ("optin", "auto") for _, error, _ in over_reducers(measured, name).values()]
    low, high = map(float, re.search(r"Standard errors are (\S+) to (\S+):", said).groups())  # type: ignore[union-attr]
    assert (round(min(errors), 2), round(max(errors), 2)) == (low, high)
    assert not any(
        of_row(measured, row, "optin", ratio)["kl"] > of_row(measured, row, "constant", ratio)["kl"]
        for row in REDUCERS
        for ratio in RATIOS
    )
    joint, alone = (of_ledger(measured, row, "auto", 0.5) for row in ("joint", "tokens"))
    assert joint is not None
    assert alone is not None
    by, error = difference(joint, alone)
    assert f"both are above tokens alone by {by:.2f} points, standard error {error:.2f}:" in said
    assert {len(pairs(measured, row, "optin", "constant", ratio)[0]) for row in REDUCERS for ratio in RATIOS} == {1, 5}


def test_differences_are_paired() -> None:
    one = torch.arange(2000) % 4 > 0
    two = one.clone()
    two[:8] = False
    apart, error = difference({"right": pack_bits(one), "images": 2000}, {"right": pack_bits(two), "images": 2000})
    assert apart == pytest.approx(0.3)
    assert error == pytest.approx(100 * (6 / 2000 * (1 - 6 / 2000) / 1999) ** 0.5)
    more = {"right": pack_bits(one[:1000]), "images": 1000}
    apart, _ = difference(
        {"right": pack_bits(one), "images": 2000, "further": more},
        {"right": pack_bits(two), "images": 2000, "further": more},
    )
    assert apart == pytest.approx(0.2), "further images count"
    apart, _ = difference(
        {"right": pack_bits(one), "images": 2000, "further": more}, {"right": pack_bits(two), "images": 2000}
    )
    assert apart == pytest.approx(0.3), "but those that one of them was not judged on do not"
    apart, _ = difference(
        {"right": pack_bits(one[:1000]), "images": 1000, "further": more},
        {"right": pack_bits(two), "images": 2000, "further": more},
    )
    assert apart == pytest.approx(0.6), "and no image is compared with another one"
