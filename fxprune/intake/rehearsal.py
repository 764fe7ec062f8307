"""Rehearse a pickle: learn what it would import, call and make, without any of it happening."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from ..errors import LoadError

TRUST_CURE = (
    "if you trust where the file comes from, `--trust-pickle` runs it; "
    "safer: save a .pt2 with torch.export.save, or the weights alone as .safetensors"
)
DAMAGED = "the file is damaged or incomplete: copy or download it again"


class _Refused(Exception):
    """The pickle asks for something that no well-behaved module file contains."""


@dataclass(frozen=True)
class _Name:
    """A global the pickle mentions, not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Inert:
    """Stands for any object the pickle would make; swallows what a pickle may do to it."""

    def __init__(self, made_by: str, seen: Rehearsal) -> None:
        self.made_by, self.seen = made_by, seen

    def append(self, item: Any) -> None:
        self.seen.listed.add(self.made_by)

    def extend(self, items: Any) -> None:
        self.seen.listed.add(self.made_by)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.seen.keyed.add(self.made_by)

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Rehearsal:
    """What a pickle would do: the globals it names, those it calls, those it instantiates, those whose results it fills
    like a list or like a dict, and what it ends as.

    root is "dict", "list", "tensor", ..., or the dotted name of the class of the outermost object.
    """

    names: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)
    keyed: set[str] = field(default_factory=set)
    root: str = ""


class _Rehearser(pickle._Unpickler):  # the pure-Python unpickler, whose opcodes can be replaced
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    stack: list[Any]  # set by load()
    append: Callable[[Any], None]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.seen = Rehearsal()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAME_MAPPING:  # the names torch's unpickler would see
            module, name = NAME_MAPPING[(module, name)]
        elif module in IMPORT_MAPPING:
            module = IMPORT_MAPPING[module]
        self.seen.names.add(f"{module}.{name}")
        return _Name(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and pid and pid[0] == "storage"):
            raise _Refused("a persistent object that is no tensor storage")
        return _Inert("storage", self.seen)

    def _note(self, callee: Any, into: set[str]) -> None:
        if not isinstance(callee, _Name):
            raise _Refused("a call of something that the file itself computed")
        into.add(str(callee))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        callee = self.stack[-1]
        self._note(callee, self.seen.called)
        first = args[0] if isinstance(args, tuple) and args else None
        if str(callee) == "functools.partial" and not isinstance(first, _Name):
            raise _Refused("functools.partial of something that is not a plain name")
        if str(callee) == "torch._tensor._rebuild_from_type_v2":  # calls its first argument
            self._note(first, self.seen.called)
        self.stack[-1] = _Inert(str(callee), self.seen)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        callee = self.stack.pop()
        self._note(callee, self.seen.made)
        if args != ():
            raise _Refused(f"an instance of {callee} made with arguments")
        self.append(_Inert(str(callee), self.seen))

    def load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], _Inert):
            raise _Refused("attributes set on something that is no new object")

    def refuse(self) -> None:
        raise _Refused("an operation outside pickle protocol 2, which torch.save uses")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    # Only what torch's own restricted unpickler understands, so that both read the same program alike.
    _shared = frozenset(
        getattr(pickle, name)[0]
        for name in [
            "APPEND",
            "APPENDS",
            "BINFLOAT",
            "BINGET",
            "BININT",
            "BININT1",
            "BININT2",
            "BINPERSID",
            "BINPUT",
            "BINUNICODE",
            "BUILD",
            "EMPTY_DICT",
            "EMPTY_LIST",
            "EMPTY_SET",
            "EMPTY_TUPLE",
            "GLOBAL",
            "LONG1",
            "LONG_BINGET",
            "LONG_BINPUT",
            "MARK",
            "NEWFALSE",
            "NEWOBJ",
            "NEWTRUE",
            "NONE",
            "PROTO",
            "REDUCE",
            "SETITEM",
            "SETITEMS",
            "SHORT_BINSTRING",
            "STOP",
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
        ]
    )
    for _opcode in range(256):
        if _opcode not in _shared:
            dispatch[_opcode] = refuse


def rehearse(program: bytes) -> Rehearsal:
    """Run a pickle program on inert stand-ins: nothing is imported, called or instantiated.

    Raises LoadError for a program that is damaged, or that calls what it computed itself (``getattr`` chains).
    """
    reader = _Rehearser(io.BytesIO(program))
    try:
        end = reader.load()
    except _Refused as refusal:
        raise LoadError("the pickle is refused", why=f"it contains {refusal}", cure=TRUST_CURE) from None
    except Exception as failure:
        raise LoadError("the pickle cannot be read", why=f"{type(failure).__name__}: {failure}", cure=DAMAGED) from None
    reader.seen.root = end.made_by if isinstance(end, _Inert) else type(end).__name__
    if isinstance(end, _Name):
        reader.seen.root = "a bare name"
    return reader.seen


def first_line(failure: BaseException) -> str:
    """The type of an exception and the first line it says."""
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0][:300]}" if text else type(failure).__name__
