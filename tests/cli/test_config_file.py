"""Options from a file: the names of the command line, the command line wins, mistakes have a line, no trust."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.cli.commands import build_parser
from fxprune.cli.config_file import NAME, with_file
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.errors import OptionError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(text: str, *argv: str, name: str = NAME) -> argparse.Namespace:
    """What the real parser makes of a command line beside a file."""
    Path(name).write_text(text, encoding="utf-8")
    words, _ = with_file(argv, argv[0])
    return build_parser()[0].parse_args(words)


def test_names_and_values_are_those_of_the_command_line() -> None:
    args = parsed(
        'flops = 0.5\nhead_scale = 2\nprune = ["heads", "ffn"]\nfreeze = ["a.*", "b.*"]\nunmerge = true\n'
        'allow-empty = false\nsamples = 7\nfloor = {"*.ffn" = 0.3, heads = 0.5}\nalign = 16\n',
        "compile",
        "model.pt",
    )
    assert (args.flops, args.head_scale, args.prune, args.samples) == ("0.5", 2.0, "heads,ffn", 7)
    assert (args.freeze, args.unmerge, args.allow_empty) == (["a.*", "b.*"], True, False)
    assert (args.floor, args.align) == (["*.ffn=0.3", "heads=0.5"], ["16"])


def test_the_command_line_counts_for_more_and_a_table_for_more_than_the_top() -> None:
    text = 'target = "eager"\nseed = 1\nsamples = 5\n[compile]\ntarget = "onnx"\nsamples = 6\n[plan]\nsamples = 9\n'
    args = parsed(text, "compile", "model.pt", "--samples", "8")
    assert (args.target, args.seed, args.samples) == ("onnx", 1, 8)
    assert parsed(text, "plan", "model.pt").samples == 9, "and a table of another command says nothing to plan"


@pytest.mark.parametrize("word", ["--params=0.3", "--bytes=0.3", "--plan=p.json"])
def test_another_budget_takes_the_place_of_the_files(word: str) -> None:
    assert parsed("flops = 0.5\n", "compile", "model.pt", word).flops is None


def test_a_named_file_is_read_instead_and_none_where_there_is_none() -> None:
    Path(NAME).write_text("seed = 1\n")
    assert parsed("seed = 2\n", "compile", "model.pt", "--config", "other.toml", name="other.toml").seed == 2
    Path(NAME).unlink()
    assert with_file(["compile", "m"], "compile") == (["compile", "m"], [])
    Path(NAME).write_text("not toml at all")
    assert with_file(["doctor"], "doctor") == (["doctor"], []), "commands without options of a model"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("flops = 0.5\nflop = 0.4\n", 2, "did you mean 'flops'"),
        ("\n[compile]\nseed = 1\n\nsaples = 3\n", 5, "did you mean 'samples'"),
        ("# x\n[compiel]\nseed = 1\n", 2, "did you mean 'compile'"),
        ("seed = 1\nsamples = 'many'\n", 2, "'many' is no value for 'samples'"),
        ("unmerge = 'yes'\n", 1, "true or false"),
        ("seed = true\n", 1, "text or a number"),
        ("flops = 0.5\nfreeze = [[1]]\n", 2, "text or a number"),
        ("config = 'x'\n", 1, "cannot stand in a file"),
        ("seed = 1\nseed = 2\n", 2, "not valid TOML"),
        ("seed = \n", 1, "not valid TOML"),
        ("help = true\n", 1, "file"),
        ("compile = 3\n", 1, "compile"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, line: int, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        parsed(text, "compile", "model.pt")
    assert f"{NAME}:{line}" in str(caught.value)


def test_files_that_are_none() -> None:
    for argv, message in (
        (["--config", "nowhere.toml"], "cannot be read"),
        (["--config"], "which file"),
        (["--config", "binary.toml"], "not a text file"),
        (["--config", "."], "report.json"),
    ):
        Path("binary.toml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(OptionError, match=message):
            with_file(["compile", "m", *argv], "compile")


@pytest.mark.parametrize("text", ["trust-pickle = true\n", "[compile]\ndata = 'python:evil:run'\n"])
def test_a_file_that_lies_around_may_not_run_code(text: str) -> None:
    with pytest.raises(OptionError, match="would run code") as caught:
        parsed(text, "compile", "model.pt")
    assert NAME in caught.value.where
    parsed(text, "compile", "model.pt", "--config", NAME)
    parsed(text, "compile", "model.pt", "--trust-pickle", "--data", "x.npz")


def chain(path: str) -> None:
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), path)


def test_a_run_is_repeated_by_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    chain("model.pt")
    Path(NAME).write_text(
        'flops = 0.5\ninput = "2x16"\n[compile]\nfloor = {ffn = 0.25}\nseed = 4\nimportance = "random"\n'
    )
    assert main(["compile", "model.pt", "--out", "one"]) == OK
    err = capsys.readouterr().err
    assert f"options of {NAME}: --flops=0.5 --input=2x16 --floor=ffn=0.25 --seed=4 --importance=random" in err
    Path(NAME).unlink()
    assert main(["compile", "model.pt", "--config", "one", "--out", "two", "-q"]) == OK
    one, two = (json.loads(Path(f, "report.json").read_text()) for f in ("one", "two"))
    assert one["options"] == {**two["options"], "out": "one"}
    assert (one["options"]["flops"], one["options"]["floor"], one["options"]["seed"]) == ("0.5", ["ffn=0.25"], 4)
    plans = [json.loads(Path(f, "plan.json").read_text())["choices"] for f in ("one", "two")]
    assert plans[0] == plans[1]
    one["options"]["data"] = "<DataLoader>"
    Path("python.json").write_text(json.dumps(one, indent=1))
    assert main(["compile", "model.pt", "--config", "python.json", "--out", "three"]) == USER_ERROR
    err = capsys.readouterr().err
    line = next(n for n, text in enumerate(Path("python.json").read_text().splitlines(), 1) if "DataLoader" in text)
    assert f"python.json:{line}" in err
    assert "give --data on the command line" in err


def test_a_report_may_not_run_code_either() -> None:
    Path("report.json").write_text(json.dumps({"options": {"trust-pickle": True}}))
    with pytest.raises(OptionError, match="would run code"):
        with_file(["compile", "m", "--config", "report.json"], "compile")


def test_python_310_reads_it_with_tomli() -> None:
    code = (
        "import sys\nif sys.version_info >= (3, 11):\n"
        "    import tomllib; sys.modules['tomli'] = tomllib; sys.version_info = (3, 10, 0)\n"
        "from fxprune.cli.config_file import with_file;"
        "print(with_file(['compile', 'm'], 'compile')[0])"
    )
    Path(NAME).write_text("seed = 3\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "['compile', '--seed=3', 'm']", run.stderr
