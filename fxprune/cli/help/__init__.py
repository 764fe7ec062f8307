"""The long pages: ``fxprune help TOPIC``. One module per topic; its docstring is the page, and its examples are run."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from pathlib import Path

from ... import registry
from ...errors import OptionError, nearest

TOPICS = {
    "methods": "criteria, searches, recovery, token reducers: what each does and when to take it",
    "tokens": "fewer image tokens: reducers, schedules, what they cost, measured",
    "tiles": "zeros inside weights, what they are worth, measured",
    "targets": "what is written, what each target needs, and what is checked",
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
    return text.replace("{targets}", _targets()) if topic == "targets" else text


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
