"""Examples are true: doctests of every module, and the README's code."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from fxprune import Budget, CompressionPlan
from fxprune.cli.commands import build_parser
from fxprune.cli.config_file import with_file
from fxprune.driver.stated import read_pipeline
from fxprune.ir import spec

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def modules() -> list[str]:
    """Names from the files: pkgutil does not see packages that an editable install maps."""
    paths = [p.relative_to(ROOT) for top in ("fxprune", "passes", "backends") for p in (ROOT / top).rglob("*.py")]
    names = [p.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__") for p in paths]
    return sorted(n if n.partition(".")[0] == "fxprune" else f"fxprune.{n}" for n in names if "__main__" not in n)


MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


def test_doctests_are_found_at_all() -> None:
    finder = doctest.DocTestFinder()
    assert sum(len(t.examples) for m in MODULES for t in finder.find(importlib.import_module(m))) >= 5


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


def commands_of(text: str) -> list[str]:
    """The ``fxprune ..`` lines of a text, joined where they go on, comments and what follows ``&&`` taken apart."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    parts = [part.strip().removeprefix("$ ") for line in lines for part in line.partition("  #")[0].split("&&")]
    commands = [re.sub(r"^torchrun .*-m (?=fxprune)", "", part) for part in parts]
    return [command for command in commands if re.match(r"fxprune [a-z]", command)]


def shell(text: str) -> list[str]:
    """The commands of a Markdown file's shell blocks."""
    found = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [command for block in found for command in commands_of(block)]


def pages() -> dict[str, list[str]]:
    """Commands of the README and of every help page, by where they stand."""
    from fxprune.cli.help import TOPICS, page

    def shown(text: str) -> str:
        """Lines two spaces in; prose is not indented, or more."""
        return "\n".join(re.findall(r"^  (\S.*)$", re.sub(r"\\\n\s*", "", text), re.MULTILINE))

    return {
        "README": shell(README.read_text(encoding="utf-8")),
        **{name: commands_of(shown(page(name))) for name in TOPICS if name != "changelog"},
    }


COMMANDS = sorted({command for commands in pages().values() for command in commands})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_parse(command: str) -> None:
    top, named = build_parser()
    args, rest = top.parse_known_args(shlex.split(command)[1:])
    named[args.command].check_leftovers(rest)
    for option in ("importance", "recover", "tokens", "blocks"):
        text = getattr(args, option, None)
        if text and option != "blocks":
            spec.parse(text, f"--{option}")
    if getattr(args, "pipeline", None):
        budget = None if args.flops is None else Budget.parse("flops", args.flops)
        read_pipeline(args.pipeline, budget, plan=CompressionPlan() if args.plan else None)


def test_there_are_commands_in_the_pages() -> None:
    counts = {name: len(commands) for name, commands in pages().items()}
    assert counts["README"] >= 15
    assert all(counts[name] for name in ("methods", "targets", "options", "pipelines", "plans")), counts


def test_the_toml_of_the_page_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.cli.help import page

    monkeypatch.chdir(tmp_path)
    block = re.search(r"^  flops = .*\n(?:(?:  .*)?\n)+", page("options"), re.MULTILINE)
    assert block
    Path("fxprune.toml").write_text(block[0])
    top, _ = build_parser()
    words, said = with_file(["compile", "model.pt"], "compile")
    args = top.parse_args(words)
    assert said
    assert (args.flops, args.target, args.floor) == ("0.5", "onnx", ["blocks.*.mlp=0.3"])
