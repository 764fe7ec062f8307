"""Every option is written once: the doors, the command line, files and reports say what the table says."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxprune
from fxprune import OptionError
from fxprune.artifact.gates import Limits as GateLimits
from fxprune.cli.arguments import call_of
from fxprune.cli.commands import COMMANDS, build_parser
from fxprune.cli.config_file import NAME, with_file
from fxprune.cli.entry import USER_ERROR, main
from fxprune.cli.help import page
from fxprune.dynamo import Options
from fxprune.errors import SPELLING, FxpruneError, on_the_command_line, spell
from fxprune.registry import names
from fxprune.request import options as table
from fxprune.request.invocation import Invocation
from fxprune.request.options import (
    GROUPS,
    Judging,
    Option,
    Timing,
    collect_asked,
    every_option,
    flags,
    options_of,
    plain,
)
from fxprune.request.options.table import REQUIRED, option
from fxprune.workflows.bench import bench
from fxprune.workflows.export import export
from fxprune.workflows.lower import lower
from fxprune.workflows.sweep import measure_sensitivity, sweep
from fxprune.workflows.verify import verify

DOORS: dict[str, Callable[..., Any]] = {
    "compile": fxprune.compile,
    "plan": fxprune.plan,
    "apply": fxprune.apply,
    "inspect": fxprune.inspect,
    "sweep": sweep,
    "sensitivity": measure_sensitivity,
    "export": export,
    "lower": lower,
    "bench": bench,
    "verify": verify,
}
TOGETHER: dict[tuple[str, str], tuple[str, ...]] = {  # what one parameter of a workflow holds of several options
    ("sweep", "ratios"): ("flops", "params", "bytes"),
    ("sweep", "judging"): ("judge", "held_out", "max_drop", "bisect"),
    ("sweep", "timing"): ("batches", "seconds"),
    ("export", "limits"): tuple(f.name for f in dataclasses.fields(GateLimits)),
}
FIRST = ("model", "example_inputs", "plan")  # given by their places here and there


def parameters(door: str) -> dict[str, Any]:
    """Name -> default of what a Python door takes, but for the listener."""
    found = inspect.signature(DOORS[door]).parameters.values()
    switched = {("verify", "latency")}  # not skip_latency
    return {p.name: p.default for p in found if p.name != "on_event" and (door, p.name) not in switched}


def of_python(door: str) -> dict[str, Option]:
    return {one.name: one for one in options_of(door).values() if one.in_python and not one.refused}


@pytest.mark.parametrize("door", DOORS)
def test_a_python_door_takes_what_the_table_says(door: str) -> None:
    told, taken = of_python(door), parameters(door)
    for parameter in [name for name in taken if (door, name) in TOGETHER]:
        del taken[parameter]
        for name in TOGETHER[door, parameter]:
            told.pop(name)
    assert set(taken) == set(told)
    for name, default in taken.items():
        wanted = inspect.Parameter.empty if told[name].default is REQUIRED else told[name].default
        if name not in FIRST:
            assert default == wanted, name


@pytest.mark.parametrize("door", DOORS)
def test_doors_name_their_options_in_one_order(door: str) -> None:
    here = [name for name in parameters(door) if name not in FIRST]
    assert [n for n in parameters("compile") if n in here] == [n for n in here if n in parameters("compile")]


def test_the_groups_of_a_sweep_and_of_a_delivery_have_their_options() -> None:
    for group, name in ((Judging, "judging"), (Timing, "timing")):
        mine = {one.field: one for one in options_of("sweep").values() if one.group is group}
        fields = {f.name: f.default for f in dataclasses.fields(group)}
        fields.pop("samples", None)  # of the judge's data: in Python alone
        assert {field: one.default for field, one in mine.items()} == fields
        assert {one.name for one in mine.values()} == set(TOGETHER["sweep", name])
    told = of_python("export")
    assert {f.name: f.default for f in dataclasses.fields(GateLimits)} == {
        name: told[name].default for name in TOGETHER["export", "limits"]
    }


def test_doors_are_commands_or_dynamo_and_every_option_has_one_name_there() -> None:
    named = {door for one in every_option() for door in (*one.doors, *one.at)} - {"*"}
    assert named <= {*COMMANDS, "dynamo"}
    for door in named:
        taken = [one for group in GROUPS for one in dataclasses.fields(group) if one.metadata]
        assert taken
        known = list(options_of(door).values())
        assert len({one.name for one in known}) == len(known)
        assert all(one.help for one in known)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_every_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = "".join(capsys.readouterr().out.split())  # lines break at spaces, and at hyphens
    for one in options_of(command).values():
        assert (one.metavar if one.place else one.dashed) in said
        assert "".join((one.refused or one.text(names("backend"))).split()) in said, one.flag
    assert "{default}" not in said
    assert "{targets}" not in said


def sample(one: Option) -> tuple[str, Any]:
    """A text for an option, and the value that it is."""
    if one.parse is int:
        return "3", 3
    if one.parse is float:
        return "0.25", 0.25
    if one.flag in ("batch", "batches", "shares") and one.default != 1:
        return "1,1", one.parse("1,1")
    return ("2", one.parse("2")) if not one.repeated else ("2", ("2",))


@pytest.mark.parametrize("command", [name for name in COMMANDS if "config" in options_of(name)])
def test_every_option_can_stand_in_a_file(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = {one.flag: one for one in options_of(command).values() if not (one.place or one.refused)}
    known = {flag: one for flag, one in known.items() if flag not in ("config",)}
    lines, wanted = [], {}
    for flag, one in known.items():
        text, value = ("true", True) if one.switch else sample(one)
        lines.append(f"{flag.replace('-', '_')} = {text if one.switch else repr(text)}")
        wanted[one.name] = value
    Path("all.toml").write_text(f"[{command}]\n" + "\n".join(lines))
    words, _ = with_file([command, "subject", "--config", "all.toml"], command)
    found = call_of(build_parser()[0].parse_args(words))
    for name, value in wanted.items():
        if name in found:
            assert found[name] == value, name


def values(door: str) -> Iterator[tuple[str, Any]]:
    for name, one in of_python(door).items():
        yield name, None if one.default is REQUIRED else one.default


def test_a_report_holds_every_option_by_its_name_on_the_command_line() -> None:
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 8)
    made = fxprune.compile(model, x, flops=0.5, floor="ffn=0.25", head_scale=2)
    assert set(made.report["options"]) == {"command", *(one.flag for one in of_python("compile").values())}
    told = made.report["options"]
    assert (told["command"], told["flops"], told["floor"], told["head-scale"]) == ("compile", 0.5, "ffn=0.25", 2)
    assert told["model"] == "<Sequential>"
    usual = dict(values("compile"))
    assert plain(collect_asked("compile", usual)) == plain(Invocation.of("compile", {}).options)


@pytest.mark.parametrize("flag", [one.flag for one in options_of("compile").values() if one.in_passes])
def test_what_passes_state_is_not_given_beside_them(flag: str) -> None:
    """Usual values, as text or as they are, say nothing; another value is refused by name."""
    one = options_of("compile")[flag]
    for usual in (one.default, str(one.default), [one.default], None):
        assert one.is_usual(usual)
        Invocation.of("compile", {one.name: usual, "pipeline": "propagate-axes"})._check_beside_pipeline()
    other = True if one.switch else "other"
    with pytest.raises(OptionError, match=f"{SPELLING[flag]} say the same thing"):
        Invocation.of("compile", {one.name: other, "pipeline": "propagate-axes"})._check_beside_pipeline()


def test_one_field_is_an_option_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Toy:
        TITLES: ClassVar[dict[str, str]] = {"": "toys"}
        spin_rate: int = option(5, "N", "turns a second (default: {default})", "compile plan dynamo", parse=int)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "GROUPS", (*GROUPS, Toy))
    caches = (options_of, flags, every_option)
    for one in caches:
        one.cache_clear()
    try:
        parser = build_parser()[1]["compile"]
        assert "toys:\n  --spin-rate N         turns a second (default: 5)" in parser.format_help()
        Path(NAME).write_text("spin_rate = 7\n")
        words, _ = with_file(["compile", "m.pt"], "compile")
        args = build_parser()[0].parse_args(words)
        assert call_of(args)["spin_rate"] == 7
        assert with_file(["inspect", "m.pt"], "inspect") == (["inspect", "m.pt"], []), "for another command"
        assert collect_asked("compile", {"spin_rate": 7}) == {"command": "compile", "spin-rate": 7}
        assert "--spin-rate      compile, plan, torch.compile" in page("options")
        assert "spin_rate    turns a second (default: 5)" in page("dynamo")
        Options.of({"flops": 0.5, "spin_rate": 3})
    finally:
        monkeypatch.undo()
        for one in caches:
            one.cache_clear()
    with pytest.raises(OptionError, match="no option 'spin_rate'"):
        Options.of({"flops": 0.5, "spin_rate": 3})


def test_dynamo_has_the_options_of_the_table_and_says_why_it_lacks_others() -> None:
    made = Options.of({"flops": 0.5, "search": "dynamic", "memory": "1GiB", "floor": ["heads=0.5"], "align": "*.ffn=4"})
    assert made.request.goal is not None
    assert made.request.goal.search == "dynamic"
    assert (made.asked.decision.memory, made.request.limits.floor) == ("1GiB", ["heads=0.5"])
    for name, why in (("latency", "writes none"), ("tokens", "also tokens and tiles"), ("pipeline", "of one graph")):
        with pytest.raises(OptionError, match=f"(?s)no option '{name}'.*{why}"):
            Options.of({"flops": 0.5, name: "0.5"})
    with pytest.raises(OptionError, match="nothing is measured here"):
        Options.of({"flops": 0.5, "align": "auto"})


def test_a_sweep_says_why_it_lacks_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    refused = [one for one in options_of("sweep").values() if one.refused]
    assert {one.flag for one in refused} == {"latency", "latency-ms", "pipeline", "blocks", "sparse"}
    for one in refused:
        assert main(["sweep", "m.pt", "--data", "d.pt", one.dashed, "0.5"]) == USER_ERROR
        err = " ".join(capsys.readouterr().err.split())
        assert f"fxprune sweep takes no {one.dashed}" in err
        assert one.refused in err


def raised(what: Callable[[], Any]) -> str:
    with pytest.raises(FxpruneError) as caught:
        what()
    return str(caught.value)


def test_messages_name_options_as_the_door_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(2, 8),)), path)
    for given, here, there in (
        ({"flops": 0.5, "floor": 7}, "floor=7", "--floor 7"),
        ({"flops": 0.5, "head_scale": "x"}, "head_scale=", "--head-scale"),
        ({"flops": 0.5, "recover": "ridge"}, "give data=", "give --data"),
        ({"flops": 0.5, "members": "obs", "importance": "l1"}, "leave members= away", "leave --members away"),
        ({"flops": 0.5, "rearrange": 1, "align": 1}, 'use importance="fisher"', "use --importance fisher"),
        ({"flops": 0.5, "params": 0.5}, "flops=0.5, params=0.5", "--flops 0.5, --params 0.5"),
        ({"flops": 0.5, "out": str(path)}, "choose another out=", "choose another --out"),
        ({}, "for example flops=0.5", "for example --flops 0.5"),
    ):
        told = raised(lambda given=given: fxprune.compile(path, **given))
        assert here in told
        assert "--" not in told
        out = [] if "out" in given else ["--out", str(tmp_path / "out")]
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        assert main(["compile", str(path), *words, *out]) == USER_ERROR
        err = capsys.readouterr().err
        assert there in err
        assert here not in err
        assert "`--" not in err


ROOT = Path(fxprune.__file__).resolve().parents[1]
SPOKEN = [  # the command line's own words, and pages that show commands, stay as they are
    path
    for folder in ("fxprune", "passes", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not {"cli", "report", "options"} & set(path.relative_to(ROOT).parts)
]


def texts(tree: ast.AST, word: str = "") -> Iterator[tuple[int, str, str]]:
    """(line, keyword it is given to, text with {} for what is filled in) of every text that is no docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        here = (node.arg or "") if isinstance(node, ast.keyword) else word
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, here, node.value
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, here, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        else:
            yield from texts(node, here)


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_mark_the_options_that_they_name(path: Path) -> None:
    """Between backticks, so that Python callers are told Python's names; a ``where`` is code as a whole."""
    for line, word, text in texts(ast.parse(path.read_text(encoding="utf-8"))):
        if word == "where" or (text.startswith("--") and word not in ("cure", "why")):
            continue
        bare = re.sub(r"`[^`]*`", "", text).partition("fxprune ")[0]
        named = [f for f in re.findall(r"(?<![\w-])--([a-z][a-z-]*|\{\})", bare) if f in {*flags(), "{}"}]
        assert not named, f"{path}:{line}: {text}"


def test_commands_in_messages_stay_commands_and_switches_are_true() -> None:
    assert (
        spell("let `fxprune compile MODEL --latency 0.6` write it")
        == "let `fxprune compile MODEL --latency 0.6` write it"
    )
    assert spell("`--allow-empty`, `--batch 4`, `--nothing 3`") == "allow_empty=True, batch=4, --nothing 3"
    assert spell("--input 1x3x8x8, --trust-pickle", bare=True) == "example_inputs=1x3x8x8, trust_pickle=True"
    with on_the_command_line():
        assert spell("`--target 'trt{via=onnx}'` works") == "--target 'trt{via=onnx}' works"
    assert spell("`--target 'trt{via=onnx}'` works") == "target='trt{via=onnx}' works"
