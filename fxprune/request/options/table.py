"""What an option is: a field of a group, with what the command line, files, help and Python say about it.

    class Limits:
        allow_empty: bool = option(False, "", "no floors: whole branches may go", doors="compile plan")

A door is a command, or ``dynamo``. Whoever takes options loops over :func:`select_options`; nobody lists them again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from ...errors import OptionError

Titles: TypeAlias = Mapping[str, str]  # of a group: door -> its title in the help, "" for all others

COMMANDS = "*"  # as a door: every command
MODELS = "compile plan apply inspect sweep sensitivity export"  # those that are about a model
DECIDING = "compile plan sweep"
SEARCHING = f"{DECIDING} dynamo"
_METADATA = "option"


class Absent(Enum):
    """In place of a default: there is none, or it is the same as Python's."""

    REQUIRED = 1
    SAME = 2


REQUIRED = Absent.REQUIRED


@dataclass(frozen=True)
class Option:
    """One option, as one door takes it.

    name      in Python;  flag: on the command line and in files, without dashes;  short: one letter, where there is one
    group     the class that its value is a field of, called ``field`` there;  title: of its section in the help
    default   in Python; REQUIRED: it must be given
    unsaid    the command line's default, where that is another one
    metavar   what its value is called in the help; "": the option is a switch
    help      ``{default}`` and ``{targets}`` stand for what they are when the help is shown
    parse     text -> value. Raises ValueError, or OptionError where it can say more
    repeated  it may be given several times
    place     of an argument without a flag: "1", "?" or "*" values
    in_passes what it says is part of the passes, so that a pipeline leaves no room for it
    door      the door itself;  python: doors whose Python function has it; None: all
    refused   why this door does not take it, though others do
    at        door -> what is different there
    """

    default: Any
    metavar: str
    help: str
    doors: frozenset[str]
    name: str = ""
    flag: str = ""
    short: str = ""
    group: type[Any] = object
    field: str = ""
    title: str | None = None
    unsaid: Any = Absent.SAME
    parse: Callable[[str], Any] = str
    repeated: bool = False
    place: str = ""
    in_passes: bool = False
    door: str = ""
    python: frozenset[str] | None = None
    refused: str = ""
    at: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def dashed(self) -> str:
        """As on the command line: ``--head-scale``."""
        return f"--{self.flag}"

    @property
    def in_python(self) -> bool:
        """Whether the door's Python function has it."""
        return self.python is None or self.door in self.python

    @property
    def switch(self) -> bool:
        """Whether it takes no value."""
        return not self.metavar

    @property
    def required(self) -> bool:
        """Whether the command line cannot do without."""
        return self.default is REQUIRED and self.unsaid is Absent.SAME

    def unsaid_value(self) -> Any:
        """What the command line means where it does not say it."""
        return self.default if self.unsaid is Absent.SAME else self.unsaid

    def value_of(self, said: Any) -> Any:
        """The value that Python gets for what argparse found (None: nothing)."""
        if said is None:
            return self.unsaid_value()
        return tuple(said) if self.repeated else said

    def is_usual(self, value: Any) -> bool:
        """Whether a value says no more than leaving the option away: None, nothing, or the default, also as text.

        >>> import dataclasses
        >>> one = Option(0.1, "SHARE", "", frozenset(), repeated=True)
        >>> [one.is_usual(v) for v in (0.1, ("0.1",), "0.10", (), None, 0.2, ["0.1", "heads=0.5"])]
        [True, True, True, True, True, False, False]
        """
        if isinstance(value, list | tuple):
            if len(value) > 1:
                return False
            value = value[0] if value else None
        if value is None or value == self.default:
            return True
        try:
            return float(value) == float(self.default)
        except (TypeError, ValueError):
            return str(value) == str(self.default)

    def text(self, targets: Iterable[str] = ()) -> str:
        """The help, with its default, and with the targets that there are."""
        default = self.unsaid_value()
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        *most, last = list(targets) or [""]
        known = f"{', '.join(most)} or {last}" if most else last
        return self.help.replace("{default}", shown).replace("{targets}", known)


def option(
    default: Any,
    metavar: str,
    help: str,
    doors: str,
    *,
    python: str | None = None,
    at: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Any:
    """A field of a group, with the option that it is; see :class:`Option`.

    doors, python   names between spaces;  at: doors that take it as well, or otherwise;  more: other facts of Option
    """
    one = Option(
        default,
        metavar,
        help,
        frozenset(doors.split()),
        python=None if python is None else frozenset(python.split()),
        at=at or {},
        **more,
    )
    return field(default=None if default is REQUIRED else default, metadata={_METADATA: one})


def select_options(door: str, groups: Iterable[type[Any]]) -> tuple[Option, ...]:
    """The options of ``groups`` that a door takes, or refuses with a reason, as they are there; "": all, as most do."""
    found = []
    for group in groups:
        titles: Mapping[str, str] = getattr(group, "TITLES", {})
        for one in dataclasses.fields(group):
            told: Option | None = one.metadata.get(_METADATA)
            if told is None:
                continue
            everywhere = COMMANDS in told.doors and door != "dynamo"
            if door and not (door in told.doors or door in told.at or everywhere):
                continue
            known = {
                "door": door,
                "name": told.name or one.name,
                "field": one.name,
                "group": group,
                "flag": told.flag or dashes(one.name),
            }
            if told.title is None:
                known["title"] = titles.get(door, titles.get("", ""))
            found.append(dataclasses.replace(told, **{**known, **told.at.get(door, {})}))
    return tuple(found)


def dashes(name: str) -> str:
    """A Python name as the command line writes it.

    >>> dashes("head_scale")
    'head-scale'
    """
    return name.replace("_", "-")


def make_list_parser(
    flag: str, what: str, example: str, kind: type[int] | type[float], least: float
) -> Callable[[str], Any]:
    """What reads ``1,32`` into a tuple; OptionError at ``--flag`` for anything else, or a number below ``least``.

    >>> make_list_parser("batch", "batch sizes", "1,32", int, 1)("1,32")
    (1, 32)
    """

    def parse(text: str) -> tuple[Any, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or min(found) < least:
            raise OptionError(f"'{text}' is not a list of {what}", where=f"--{flag} {text}", cure=f"write {example}")
        return found

    return parse


def names(text: str) -> tuple[str, ...]:
    """What stands between commas outside braces.

    >>> names("onnx, trt{dtype=fp16,via=onnx}")
    ('onnx', 'trt{dtype=fp16,via=onnx}')
    """
    return tuple(part for part in map(str.strip, re.split(r",(?![^{]*\})", text)) if part)


def whole_or_auto(text: str) -> int | str:
    """A whole number, or the word ``auto``. Raises ValueError for anything else.

    >>> whole_or_auto("2"), whole_or_auto("auto")
    (2, 'auto')
    """
    return text if text == "auto" else int(text)


def number_or_word(text: str) -> float | str:
    """A number where the text is one.

    >>> number_or_word("2"), number_or_word("auto")
    (2.0, 'auto')
    """
    try:
        return float(text)
    except ValueError:
        return text
