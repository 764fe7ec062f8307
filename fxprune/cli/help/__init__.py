"""The long pages: ``fxprune help TOPIC``. One module per topic; its docstring is the page, and its examples are run."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from ... import registry
from ...errors import OptionError, nearest
from ...request.options import options_of

TOPICS = {
    "methods": "criteria, searches, recovery, token reducers: what each does and when to take it",
    "tokens": "fewer image tokens: reducers, schedules, what they cost, measured",
    "tiles": "zeros inside weights, what they are worth, measured",
    "targets": "what is written, what each target needs, and what is checked",
    "onnx": "an ONNX file as the model: what is read, what is proven, what is refused",
    "home": "a pruned Hugging Face folder is one again: from_pretrained, generate, training",
    "budgets": "FLOPs, parameters, bytes; what is counted; floors and multiples",
    "options": "prune, freeze, floors, options in braces, fxprune.toml",
    "pipelines": "the passes as text: read them, change them, run them again",
    "plans": "plan.json: read it, edit it, apply it",
    "dynamo": 'prune where you compile: torch.compile(model, backend="fxprune")',
    "plugins": "add a criterion, an op rule, a token reducer, a search, a backend or a pass",
    "results": "every figure that was measured, and the script that makes it again",
    "troubleshooting": "what goes wrong with pruning, and what to do",
    "glossary": "our words, and those of Torch-Pruning, NNCF and ModelOpt",
    "comparison": "what other tools do that this one does not, and the reverse",
    "versions": "what may change and when: semantic versions, deprecation",
    "exit-codes": "what the exit code of a command says",
    "changelog": "what changed, release by release",
}


def page(topic: str) -> str:
    """The text of a topic. Raises OptionError with the nearest one.

    >>> page("glossary").splitlines()[0]
    'Words'
    """
    if topic not in TOPICS:
        raise OptionError(f"there is no page about '{topic}'", where=f"help {topic}", cure=nearest(topic, TOPICS))
    if topic == "changelog":
        return (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    module = importlib.import_module(f"{__name__}.{topic.replace('-', '_')}")
    text = inspect.cleandoc(module.__doc__ or "") + "\n"
    for word, listing in _LISTINGS.get(topic, {}).items():
        text = text.replace(word, listing())
    return text


def _targets() -> str:
    """Every target, those of plugins included, with the first line that its class says of itself."""
    lines = []
    for name in registry.names("backend"):
        try:
            said = (inspect.getdoc(registry.lookup("backend", name)) or "").partition("\n\n")[0]
        except OptionError as error:
            said = error.what
        lines += textwrap.wrap(
            " ".join(said.replace("``", "").split()), 104, initial_indent=f"  {name:<10} ", subsequent_indent=" " * 13
        )
    return "\n".join(lines)


def _options() -> str:
    """Every option of the command line, and where it is taken."""
    from ..commands import COMMANDS

    where: dict[str, list[str]] = {}
    for command in COMMANDS:
        for one in options_of(command).values():
            if not one.refused and not one.place:
                where.setdefault(one.dashed, []).append(command)
    for one in options_of("dynamo").values():
        if not one.refused:
            where.get(one.dashed, []).append("torch.compile")
    return "\n".join(
        f"  {option:<16} {'every command' if len(doors) == len(COMMANDS) else ', '.join(doors)}"
        for option, doors in where.items()
    )


def _of_dynamo() -> str:
    """Every option of ``torch.compile``."""
    lines = []
    for one in options_of("dynamo").values():
        if one.refused:
            continue
        shown = f" (default: {one.default})" if one.default and "default" not in one.help else ""
        lines += textwrap.wrap(
            one.text().replace("--", "") + shown, 100, initial_indent=f"  {one.name:<12} ", subsequent_indent=" " * 15
        )
    return "\n".join(lines)


_LISTINGS: dict[str, dict[str, Callable[[], str]]] = {
    "targets": {"{targets}": _targets},
    "options": {"{options}": _options},
    "dynamo": {"{options}": _of_dynamo},
}


def contents() -> str:
    """The list of topics."""
    width = max(map(len, TOPICS))
    lines = [f"  {name:<{width}}  {line}" for name, line in TOPICS.items()]
    return (
        "\n".join(
            [
                "fxprune help TOPIC",
                "",
                *lines,
                "",
                "fxprune COMMAND --help lists options; fxprune doctor says what this machine can do.",
            ]
        )
        + "\n"
    )
