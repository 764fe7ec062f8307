"""The long pages: all there, each says what it promises, and `fxprune help` prints them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fxprune.cli.commands import COMMANDS
from fxprune.cli.entry import OK, USER_ERROR, main
from fxprune.cli.help import TOPICS, contents, page
from fxprune.cli.parser import EPILOG
from fxprune.registry import names

FOLDER = Path(__file__).resolve().parents[2] / "fxprune" / "cli" / "help"


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_a_page_that_a_terminal_shows(topic: str) -> None:
    text = page(topic)
    assert len(text.splitlines()) >= 8
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii() or topic == "changelog"


def test_every_page_is_listed() -> None:
    pages = {p.stem.replace("_", "-") for p in FOLDER.glob("*.py")} - {"--init--"}
    assert pages | {"changelog"} == set(TOPICS)
    assert all(f"  {name}" in contents() for name in TOPICS)


def test_the_command_prints_pages_commands_and_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == OK
    assert capsys.readouterr().out == contents()
    assert main(["help", "budgets"]) == OK
    assert capsys.readouterr().out == page("budgets")
    assert main(["help", "plan"]) == OK
    assert capsys.readouterr().out.startswith("usage: fxprune plan")
    assert main(["help", "glossary", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["text"] == page("glossary")
    assert main(["help", "bugdets"]) == USER_ERROR
    assert "did you mean 'budgets'" in capsys.readouterr().err


def test_every_one_of_the_known_pains_has_an_answer() -> None:
    entries = re.findall(r"^(\d+)\. (.+)\n((?:   .*\n)+)", page("troubleshooting"), re.MULTILINE)
    assert [int(number) for number, _, _ in entries] == list(range(1, 26))
    for _, symptom, answer in entries:
        assert symptom.endswith((".", "?"))
        assert len(answer.split()) >= 8, symptom


def test_the_pages_know_every_criterion_reducer_search_and_target() -> None:
    methods, targets = page("methods"), page("targets")
    for kind in ("criterion", "reducer", "search"):
        for name in names(kind):
            assert re.search(rf"\b{re.escape(name)}\b", methods), name
    for name in names("backend"):
        assert re.search(rf"^  {re.escape(name)} ", targets, re.MULTILINE), name


def test_the_page_of_exit_codes_is_the_epilog_of_every_command() -> None:
    codes = re.findall(r"^  (\d+) +(.+)$", EPILOG, re.MULTILINE)
    assert codes == re.findall(r"^(\d+) +(.+)$", page("exit-codes"), re.MULTILINE)


def test_options_that_the_pages_name_exist() -> None:
    from fxprune.cli.commands import build_parser

    known = {o for p in build_parser()[1].values() for o in p._option_string_actions} | {"--nproc-per-node"}
    for topic in TOPICS:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page(topic)):
            assert option in known, f"{topic}: {option}"
    assert {"help", "doctor"} <= set(COMMANDS)
