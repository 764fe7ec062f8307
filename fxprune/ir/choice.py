"""What a plan says of one thing that a search can choose: which elements stay, how many tokens go, which tiles stay."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from ..errors import PlanError, nearest
from .json_source import Source
from .sparsity import Sparsity

BASES = ("data", "weights")
TOKEN, BLOCK = "token", "block"  # kinds whose choice has a form of its own; that of all others is a ``Choice``


@dataclass(frozen=True)
class Choice:
    """What stays of one group: ``keep`` sorted and unique, out of ``size``.

    basis   which elements they are: "" for those of the model as it is, ``data`` or ``weights`` for those of the basis
            that is made by them: by ``RotateWidth`` of a residual stream, by ``AlignHeads`` of queries, keys and values
    """

    kind: str
    size: int
    keep: tuple[int, ...]
    basis: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing goes."""
        return len(self.keep) == self.size

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a plan."""
        basis = {"basis": self.basis} if self.basis else {}
        return {"kind": self.kind, "size": self.size, **basis, "keep": list(self.keep)}


@dataclass(frozen=True)
class TokenChoice:
    """How many tokens every image loses behind one attention.

    reducer   how they are merged or dropped, as on the command line: ``tome``, ``ppt{threshold=2}``
    unmerge   whether heads that read every token get all of them back; both are the same at every site of a plan
    """

    kind: ClassVar[str] = TOKEN
    removed: int
    reducer: str
    unmerge: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing goes."""
        return not self.removed

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a plan."""
        unmerge = {"unmerge": True} if self.unmerge else {}
        return {"kind": self.kind, "reducer": self.reducer, "removed": self.removed, **unmerge}


AnyChoice: TypeAlias = Choice | TokenChoice | Sparsity
"""By kind: ``token``, ``block``, and a :class:`Choice` for every other, those of plugins included."""


@dataclass(frozen=True)
class TokenPlan:
    """How many tokens every image loses behind which attention: all token choices of a plan together.

    reducer   how they are merged or dropped, as on the command line: ``tome``, ``ppt{threshold=2}``
    removed   site name -> how many tokens go there
    unmerge   whether heads that read every token get all of them back
    """

    reducer: str
    removed: Mapping[str, int]
    unmerge: bool = False

    @property
    def empty(self) -> bool:
        """Whether no token goes."""
        return not any(self.removed.values())

    def choices(self) -> dict[str, TokenChoice]:
        """By site name.

        >>> TokenPlan("tome", {"a:token": 3}).choices()
        {'a:token': TokenChoice(removed=3, reducer='tome', unmerge=False)}
        """
        return {name: TokenChoice(count, self.reducer, self.unmerge) for name, count in self.removed.items()}


def tokens_of(choices: Mapping[str, AnyChoice]) -> TokenPlan | None:
    """The token choices together; None where there are none."""
    found = {name: c for name, c in choices.items() if isinstance(c, TokenChoice)}
    if not found:
        return None
    first = next(iter(found.values()))
    return TokenPlan(first.reducer, {name: c.removed for name, c in found.items()}, first.unmerge)


# ------------------------------------------------------------ reading a file


def read_choice(entry: Any, section: str, name: str, source: Source, kinds: Iterable[str] | None = None) -> Choice:
    """The entry of a group under ``section``. Raises PlanError at its line.

    kinds   those that there are; None: any word, because plugins may offer more
    """

    def at(*more: str | int) -> str:
        return f"{source.at(section, name, *more)}: group '{name}'"

    if not isinstance(entry, dict) or not {"kind", "size", "keep"} <= entry.keys():
        raise PlanError("the plan is malformed", where=at(), why="an entry needs kind, size and keep")
    _only(entry, ("kind", "size", "keep", "basis"), at)
    kind, size, keep, basis = entry["kind"], entry["size"], entry["keep"], entry.get("basis", "")
    if "basis" in entry and basis not in BASES:
        raise PlanError("the plan is malformed", where=at("basis"), why=f"basis must be {' or '.join(BASES)}")
    integers = isinstance(keep, list) and all(type(i) is int for i in keep)
    if not isinstance(kind, str) or type(size) is not int or size < 1 or not integers:
        key = "kind" if not isinstance(kind, str) else "keep" if type(size) is int and size > 0 else "size"
        raise PlanError(
            "the plan is malformed",
            where=at(key),
            why="kind must be a string, size a positive integer, keep a list of integers",
        )
    if kinds is not None and kind not in kinds:
        raise PlanError(f"unknown kind of group '{kind}'", where=at("kind"), cure=nearest(kind, list(kinds)))
    choice = Choice(kind, size, tuple(keep), basis)
    bad = next((i for i, k in enumerate(keep) if not 0 <= k < size or (i and k <= keep[i - 1])), None)
    if bad is not None:
        check_indices(choice, at("keep", bad))
    return choice


def read_any(entry: Any, name: str, source: Source) -> AnyChoice:
    """The entry of whatever kind under ``choices``. Raises PlanError at its line."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if kind == TOKEN:
        return _token(entry, name, source)
    if kind == BLOCK:
        return read_sparsity({k: v for k, v in entry.items() if k != "kind"}, "choices", name, source)
    return read_choice(entry, "choices", name, source)


def read_sparsity(entry: Any, section: str, name: str, source: Source) -> Sparsity:
    """The tiles of one weight under ``section``. Raises PlanError at their line."""
    try:
        return Sparsity.from_dict(entry, "")
    except PlanError as error:
        where = f"{source.at(section, name)}: blocks of '{name}'"
        raise PlanError(error.what, where=where, why=error.why, cure=error.cure) from None


def _token(entry: dict[str, Any], name: str, source: Source) -> TokenChoice:
    def at(*more: str | int) -> str:
        return f"{source.at('choices', name, *more)}: site '{name}'"

    if not {"reducer", "removed"} <= entry.keys():
        raise PlanError("the plan is malformed", where=at(), why="tokens need reducer and removed")
    _only(entry, ("kind", "reducer", "removed", "unmerge"), at)
    reducer, removed, unmerge = entry["reducer"], entry["removed"], entry.get("unmerge", False)
    count = type(removed) is int and removed >= 0
    if not isinstance(reducer, str) or not count or not isinstance(unmerge, bool):
        raise PlanError(
            "the plan is malformed",
            where=at("reducer" if not isinstance(reducer, str) else "removed" if not count else "unmerge"),
            why="reducer must be a string, removed a count, unmerge true or false",
        )
    return TokenChoice(removed, reducer, unmerge)


def read_tokens(raw: Any, source: Source) -> TokenPlan | None:
    """The section ``tokens`` of format 1. Raises PlanError at its line."""
    if raw is None:
        return None
    where = f"{source.at('tokens')}: tokens"
    if not isinstance(raw, dict) or not {"reducer", "removed"} <= raw.keys():
        raise PlanError("the plan is malformed", where=where, why="tokens need reducer and removed")
    reducer, removed, unmerge = raw["reducer"], raw["removed"], raw.get("unmerge", False)
    counts = isinstance(removed, dict) and all(type(r) is int and r >= 0 for r in removed.values())
    if not isinstance(reducer, str) or not counts or not isinstance(unmerge, bool):
        raise PlanError(
            "the plan is malformed",
            where=where,
            why="reducer must be a string, removed an object of site names and counts, unmerge true or false",
        )
    return TokenPlan(reducer, dict(removed), unmerge)


def check_alike(choices: Mapping[str, AnyChoice], source: Source) -> None:
    """Raise PlanError at the first token choice that asks for another reducer than those before it."""
    found = [(name, c) for name, c in choices.items() if isinstance(c, TokenChoice)]
    for name, c in found:
        first = found[0][1]
        if (c.reducer, c.unmerge) != (first.reducer, first.unmerge):
            key = "reducer" if c.reducer != first.reducer else "unmerge"
            raise PlanError(
                "the plan reduces tokens in two ways",
                where=f"{source.at('choices', name, key)}: site '{name}'",
                why=f"{key} is {getattr(c, key)!r} here and {getattr(first, key)!r} at {found[0][0]}",
                cure="state the same at every site",
            )


def check_indices(choice: Choice, where: str) -> None:
    """Raise PlanError unless the kept indices are sorted, unique and in range."""
    keep = choice.keep
    double = next((b for a, b in itertools.pairwise(keep) if b <= a), None)
    if double is not None:
        raise PlanError(
            "kept indices must be sorted and unique",
            where=where,
            why=f"{double} comes twice" if keep.count(double) > 1 else f"{double} comes too late",
        )
    if keep and (keep[0] < 0 or keep[-1] >= choice.size):
        raise PlanError(
            "a kept index is out of range",
            where=where,
            why=f"indices must be 0..{choice.size - 1}, found {keep[0]}..{keep[-1]}",
        )


def _only(entry: Mapping[str, Any], known: tuple[str, ...], at: Any) -> None:
    unknown = entry.keys() - set(known)
    if unknown:
        key = min(unknown)
        raise PlanError(
            f"the plan has a key that means nothing: '{key}'", where=at(key), cure=nearest(key, list(known))
        )
