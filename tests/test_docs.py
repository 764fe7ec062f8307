"""Examples are true: doctests of every module, and the README's code."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from fxprune.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
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


def test_commands_of_the_readme_parse() -> None:
    shell = [*blocks("bash"), *blocks("sh"), *blocks("console")]
    lines = [line.removeprefix("$ ") for block in shell for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    commands = [c for c in commands if c.startswith("fxprune ")]
    assert commands
    for command in commands:
        top, named = build_parser()
        args, rest = top.parse_known_args(shlex.split(command)[1:])
        named[args.command].check_leftovers(rest)
