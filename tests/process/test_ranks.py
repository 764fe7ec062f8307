"""Two processes on one run: the same results, one voice, and nobody left waiting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.token_models import TokenViT, scrambled
from torch import nn

from fxprune import CompressionPlan
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.errors import FxpruneError, InternalError
from fxprune.process import ranks

TOGETHER = """
import json, os, sys, torch
from fxprune import cli
from fxprune.process import ranks
from fxprune.errors import FxpruneError
from fxprune.process.jobs import run_jobs

def work(i):
    ran.append(i)
    return {"n": torch.full((2,), 0.1 * i, dtype=torch.float64), "empty": torch.zeros(0)}

def failing(i):
    if i == 3:
        raise FxpruneError("the moon is full", where="job 3", why="tides", cure="wait")
    return {}

def message(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

ran, found = [], {}
assert ranks.start_ranks() and ranks.start_ranks()
me = ranks.rank()
found["who"] = [me, ranks.world(), ranks.speaks(), ranks.mine(5)]
found["sum"] = {k: [v.tolist(), str(v.dtype)] for k, v in ranks.add_up(
    {"a": torch.tensor([1.5, me]), "b": torch.tensor(2**53 + me), "c": torch.tensor(0.1).half()}).items()}
found["agreed"] = ranks.agree({"x": torch.tensor([me, 7])})["x"].tolist()
found["results"] = [r["n"].tolist() for r in run_jobs("work", 5, work)]
found["ran"] = ran
found["failed"] = message(lambda: run_jobs("failing", 5, failing))
found["again"] = len(run_jobs("work", 3, work))
found["bug"] = message(lambda: run_jobs("work", 3, lambda i: {} if me else 1 / 0))
found["code"] = cli.main(["plan", "model.pt2", "--data", "data.pt", "--samples", "80", "--flops",
                          "0.6", "--out", "two.json", "--json", "--threads", "1"])
found["after"] = [ranks.world(), ranks.speaks()]
os.environ["MASTER_PORT"] = os.environ["NEXT_PORT"]
found["tokens"] = cli.main(["plan", "vit.pt2", *sys.argv[1:], "--out", "tokens2.json", "-q", "--threads", "1"])
found["refused"] = cli.main(["inspect", "model.pt2"])
json.dump(found, open(f"rank{me}.json", "w"))
"""

LOST = """
import os, sys, torch
from datetime import timedelta
from fxprune.process import journal
from fxprune.process import ranks
from fxprune.process.jobs import identify, run_jobs, session
from torch import distributed
me = int(sys.argv[1])
journal.BYTES_PER_SECOND = float("inf")
distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=me, world_size=2,
                               timeout=timedelta(seconds=60))
assert ranks.start_ranks()  # joins the group that is there

def work(i):
    if i == 3:
        os._exit(9)
    return {"n": torch.tensor(i)}

with session(journal.Journal("small")):
    identify(lambda: "key")
    try:
        run_jobs("work", 6, work)
    except ranks.LostRank as error:
        print(error)
        raise
"""


TOKENS = [
    "--data",
    "images.pt",
    "--samples",
    "48",
    "--flops",
    "0.6",
    "--prune",
    "heads,ffn,tokens",
    "--tokens",
    "tome{improve=2,guard=false}",
    "--importance",
    "l2",
    "--align",
    "1",
]


def start(folder: Path, script: str, environment: dict[str, str], *argv: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        talk = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *words) for p, words in zip(processes, talk, strict=True)]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[tuple[int, str, str]]]:
    """The folder, what each rank found, and (exit code, stdout, stderr) of each."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 6),), dynamic_shapes=batch), folder / "model.pt2")
    torch.save({"x": torch.randn(80, 6)}, folder / "data.pt")
    images = torch.randn(48, 3, 1, 1) + 0.1 * torch.randn(48, 3, 32, 32)  # patches alike: merging them costs little
    vit = scrambled(TokenViT(depth=2))
    vit.position.data.mul_(0.05)  # type: ignore[operator, union-attr]
    torch.export.save(torch.export.export(vit, (images[:2],), dynamic_shapes=batch), folder / "vit.pt2")
    torch.save({"images": images}, folder / "images.pt")
    port, then = free_port(), free_port()
    said = finish(
        [
            start(
                folder,
                TOGETHER,
                {
                    "RANK": str(r),
                    "LOCAL_RANK": str(r),
                    "WORLD_SIZE": "2",
                    "NEXT_PORT": then,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
                *TOKENS,
            )
            for r in range(2)
        ]
    )
    assert [code for code, _, _ in said] == [0, 0], said
    return folder, [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)], said


def test_jobs_are_shared_and_every_rank_has_all_results(two: Any) -> None:
    _, found, _ = two
    assert [f["who"] for f in found] == [[0, 2, True, [0, 2, 4]], [1, 2, False, [1, 3]]]
    assert [f["ran"][:3] for f in found] == [[0, 2, 4], [1, 3, 1]]
    for f in found:
        assert f["results"] == [[0.1 * i] * 2 for i in range(5)]
        assert f["again"] == 3


def test_sums_are_wide_and_the_first_rank_decides(two: Any) -> None:
    for f in two[1]:
        assert f["sum"]["a"] == [[3.0, 1.0], "torch.float32"]
        assert f["sum"]["b"] == [2**54 + 1, "torch.int64"]  # more digits than a float64 has
        assert f["sum"]["c"][1] == "torch.float16"
        assert f["agreed"] == [0, 7]


def test_an_error_of_one_rank_is_raised_by_all_with_its_words(two: Any) -> None:
    for f in two[1]:
        assert f["failed"] == ["FxpruneError", "the moon is full\n  at    job 3\n  why   tides\n  cure  wait"]
    assert two[1][0]["bug"][0] == "ZeroDivisionError"
    assert two[1][1]["bug"][0] == "InternalError"
    assert "ZeroDivisionError: division by zero (rank 0)" in two[1][1]["bug"][1]


def test_two_ranks_make_the_plan_of_one_and_only_the_first_speaks(
    two: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found, said = two
    monkeypatch.chdir(folder)
    assert [f["code"] for f in found] == [OK, OK]
    assert (
        main(["plan", "model.pt2", "--data", "data.pt", "--samples", "80", "--flops", "0.6", "--out", "one.json", "-q"])
        == OK
    )
    assert (folder / "two.json").read_bytes() == (folder / "one.json").read_bytes()
    assert json.loads(said[0][1])["plan_file"] == "two.json"
    assert "GMACs" in said[0][2]
    assert said[1][1:] == ("", "")
    assert not list(folder.glob(".*.progress"))
    capsys.readouterr()


def test_two_ranks_schedule_tokens_like_one(
    two: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found, _ = two
    monkeypatch.chdir(folder)
    assert [f["tokens"] for f in found] == [OK, OK]
    assert main(["plan", "vit.pt2", *TOKENS, "--out", "tokens1.json", "-q"]) == OK
    assert (folder / "tokens2.json").read_bytes() == (folder / "tokens1.json").read_bytes()
    tokens = CompressionPlan.read("tokens1.json").tokens
    assert tokens is not None
    assert tokens.removed
    capsys.readouterr()


def test_commands_that_are_not_shared_say_so_once(two: Any) -> None:
    _, found, said = two
    assert [f["code"] for f in found] == [OK, OK]
    assert [f["after"] for f in found] == [[1, True], [1, False]]
    assert [f["refused"] for f in found] == [USER_ERROR, USER_ERROR]
    assert said[0][2].count("not shared over processes") == 1


def test_a_rank_that_dies_ends_the_others_and_what_was_finished_stays(tmp_path: Path) -> None:
    said = finish([start(tmp_path, LOST, {}, str(r)) for r in range(2)])
    assert said[1][0] == 9
    assert said[0][0] == 1
    assert "another rank ended" in said[0][1]
    assert (tmp_path / ".small.progress" / "work.6.000000.part").exists()


# ------------------------------------------------------------ alone


def test_one_process_is_rank_0_of_1_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world(), ranks.mine(3), ranks.speaks()) == (0, 1, [0, 1, 2], True)
    assert not ranks.start_ranks()
    x = torch.randn(3)
    assert ranks.add_up({"x": x})["x"] is x
    assert ranks.agree({"x": x})["x"] is x
    assert ranks.exchange("step", {"x": x}, {"n": 1}) == [({"x": x}, {"n": 1})]
    with ranks.together():
        assert ranks.world() == 1
    with pytest.raises(ValueError, match="mine"):
        ranks.exchange("step", failure=ValueError("mine"))


def test_a_rank_in_the_environment_without_torchrun_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    assert ranks.find_launched_rank() is None
    assert ranks.speaks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.find_launched_rank() is None


@pytest.mark.parametrize(
    "error",
    [
        FxpruneError("a", where="b", why="c", cure="d"),
        ranks.LostRank("a", why="c"),
        InternalError("a", pipeline="b"),
        ValueError("a"),
    ],
)
def test_errors_keep_their_words_on_the_way(error: Exception) -> None:
    told = json.loads(json.dumps(ranks._describe_failure(error)))
    again = ranks._retold(told, 1)
    assert isinstance(again, FxpruneError if isinstance(error, FxpruneError) else InternalError)
    if not isinstance(error, ValueError):
        assert str(again) == str(error)
