"""The decision: which elements of each group stay. Versioned JSON by parameter names, to be diffed and edited."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, nearest
from .group import Kind, PruneGroup
from .json_source import Source, loads
from .sparsity import Sparsity

VERSION = 1
MAX_BYTES = 256 * 2**20  # a plan lists kept indices: far below this for any model, so a larger file is not a plan


@dataclass(frozen=True)
class Choice:
    """What stays of one group: ``keep`` sorted and unique, out of ``size``."""

    kind: str
    size: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class TokenPlan:
    """How many tokens every image loses behind which attention.

    reducer   how they are merged or dropped, as on the command line: ``tome``, ``ppt{threshold=2}``
    removed   site name -> how many tokens go there
    unmerge   whether heads that read every token get all of them back
    """

    reducer: str
    removed: Mapping[str, int]
    unmerge: bool = False

    @property
    def empty(self) -> bool:
        return not any(self.removed.values())


@dataclass(frozen=True)
class CompressionPlan:
    """Group name -> what stays. Groups that are not named keep everything. And how tokens become fewer, if they do.

    ``about`` is free-form provenance (criterion, budget, versions); applying a plan never reads it.
    ``blocks`` says which tiles of a weight stay, by its name; tiles are of the weight that slicing leaves.
    ``source`` is the file that it was read from: errors then name the line.
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    tokens: TokenPlan | None = None
    blocks: Mapping[str, Sparsity] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False, compare=False)

    @property
    def empty(self) -> bool:
        whole = all(len(c.keep) == c.size for c in self.choices.values()) and not self.blocks
        return whole and (self.tokens is None or self.tokens.empty)

    @property
    def digest(self) -> str:
        """Of what is decided, whatever ``about`` says: 16 hexadecimal digits of a SHA-256. The same plan has the same
        one, in memory and read back.

        >>> one = CompressionPlan({"a": Choice("ffn", 4, (1, 2))}, {"seed": 0})
        >>> one.digest == CompressionPlan.from_json(one.to_json()).digest == CompressionPlan(one.choices).digest
        True
        """
        bare = replace(self, about={})
        if self.tokens is not None:
            bare = replace(bare, tokens=replace(self.tokens, removed=dict(sorted(self.tokens.removed.items()))))
        return hashlib.sha256(bare.to_json().encode()).hexdigest()[:16]

    def kept(self, group: PruneGroup) -> Tensor:
        """Indices of ``group`` that stay. [kept] int64"""
        choice = self.choices.get(group.name)
        return torch.arange(group.size) if choice is None else torch.tensor(choice.keep, dtype=torch.long)

    def check(self, groups: Mapping[str, PruneGroup]) -> None:
        """Raise :class:`PlanError` unless every choice fits its group: known, same size, not frozen, in range."""
        for name, choice in self.choices.items():
            where, group = self.place(name), groups.get(name)
            if group is None:
                raise PlanError(
                    "the plan names a group that this model does not have",
                    where=where,
                    why="it was made for another architecture, or edited",
                    cure=nearest(name, groups),
                )
            if choice.size != group.size:
                raise PlanError(
                    "the plan was made for another architecture",
                    where=self.place(name, "size"),
                    why=f"the group has {group.size} elements here and {choice.size} in the plan",
                    cure="make a new plan with `fxprune plan`",
                )
            if self.source is not None and choice.kind != str(group.kind):
                raise PlanError(
                    f"the plan says '{choice.kind}' of a group of kind '{group.kind}'",
                    where=self.place(name, "kind"),
                    why="it was made for another architecture, or edited",
                    cure=f'write "kind": "{group.kind}"',
                )
            _check_indices(choice, where)
            if not choice.keep and group.floor > 0:
                raise PlanError(
                    "the plan drops a whole branch",
                    where=where,
                    why="the group keeps nothing",
                    cure="keep at least one, or pass --allow-empty",
                )
            if group.frozen and len(choice.keep) != group.size:
                raise PlanError(
                    "the plan cuts a frozen group", where=where, why=group.frozen, cure="remove the group from the plan"
                )
            odd = len(choice.keep) % group.granularity and len(choice.keep) != group.size
            if odd and self.source is not None:  # an edited one; a plan that was made here knows its own multiples
                raise PlanError(
                    "a kept count is not a multiple",
                    where=self.place(name, "keep"),
                    why=f"{len(choice.keep)} of {group.size} stay, asked are multiples of {group.granularity}",
                    cure=f"keep {len(choice.keep) // group.granularity * group.granularity} or "
                    f"{-(-len(choice.keep) // group.granularity) * group.granularity}, or align less",
                )

    def place(self, name: str, *more: str | int) -> str:
        """Where the choice of a group, or something in it, stands: with the line where the plan is a file's."""
        return f"{self.source.at('groups', name, *more)}: group '{name}'" if self.source else f"group '{name}'"

    def to_json(self) -> str:
        """Readable JSON, one group per line, stable order."""
        groups = ",\n".join(
            f"    {json.dumps(name)}: " + json.dumps({"kind": c.kind, "size": c.size, "keep": list(c.keep)})
            for name, c in sorted(self.choices.items())
        )
        about = json.dumps(dict(self.about), indent=2, sort_keys=True).replace("\n", "\n  ")
        tokens = (
            ""
            if self.tokens is None
            else ',\n  "tokens": '
            + json.dumps(
                {"reducer": self.tokens.reducer, "unmerge": self.tokens.unmerge, "removed": dict(self.tokens.removed)},
                indent=2,
            ).replace("\n", "\n  ")
        )
        blocks = ",\n".join(f"    {json.dumps(n)}: {json.dumps(s.to_dict())}" for n, s in sorted(self.blocks.items()))
        tail = tokens + (f',\n  "blocks": {{\n{blocks}\n  }}' if blocks else "")
        return f'{{\n  "fxprune_plan": {VERSION},\n  "about": {about},\n  "groups": {{\n{groups}\n  }}{tail}\n}}\n'

    @staticmethod
    def from_json(text: str, where: str = "plan") -> CompressionPlan:
        """Parse and validate. Raises :class:`PlanError` with the line or the group at fault."""
        source = Source(where, text)
        try:
            raw, twice = loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise PlanError("the plan is not valid JSON", where=f"{where}{line}", why=str(error)) from None
        if not isinstance(raw, dict) or "fxprune_plan" not in raw:
            raise PlanError(
                "this file is not a plan",
                where=where,
                why="it has no 'fxprune_plan' version",
                cure="make one with `fxprune plan MODEL --flops 0.5`",
            )
        if raw["fxprune_plan"] != VERSION:
            raise PlanError(
                "the plan has another version",
                where=source.at("fxprune_plan"),
                why=f"found {raw['fxprune_plan']!r}, this fxprune reads {VERSION}",
            )
        repeated = source.repeated(depth=3) if twice else None
        if repeated is not None and repeated[0][0] != "about":
            raise PlanError(
                f"'{repeated[0][-1]}' is there twice",
                where=f"{where}:{repeated[1]}",
                why="which of the two counts cannot be told",
                cure="remove one of them",
            )
        groups, about, blocks = raw.get("groups"), raw.get("about", {}), raw.get("blocks", {})
        for key, value in (("groups", groups), ("about", about), ("blocks", blocks)):
            if not isinstance(value, dict):
                raise PlanError("the plan is malformed", where=source.at(key), why=f"'{key}' must be an object")
        assert isinstance(groups, dict)
        choices = {name: _choice(entry, name, source) for name, entry in groups.items()}
        sparse = {name: _sparsity(entry, name, source) for name, entry in blocks.items()}
        return CompressionPlan(choices, about, _tokens(raw.get("tokens"), source), sparse, source)

    @staticmethod
    def read(path: str | Path) -> CompressionPlan:
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PlanError(
                    "this file is too large to be a plan",
                    where=str(path),
                    why=f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}",
                )
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError("the plan cannot be read", where=str(path), why=error.strerror or str(error)) from None
        except UnicodeDecodeError as error:
            raise PlanError("the plan is not a text file", where=str(path), why=str(error)) from None
        return CompressionPlan.from_json(text, str(path))


def compose(first: CompressionPlan, second: CompressionPlan) -> CompressionPlan:
    """One plan for two cuts in a row: ``second`` numbers what ``first`` left.

    >>> one = CompressionPlan({"a": Choice("ffn", 4, (1, 2, 3))})
    >>> compose(one, CompressionPlan({"a": Choice("ffn", 3, (0, 2))})).choices["a"].keep
    (1, 3)
    """
    choices = dict(first.choices)
    for name, choice in second.choices.items():
        earlier = choices.get(name)
        keep = choice.keep if earlier is None else tuple(earlier.keep[i] for i in choice.keep)
        choices[name] = Choice(choice.kind, choice.size if earlier is None else earlier.size, keep)
    return CompressionPlan(choices, second.about, second.tokens, second.blocks)


def _choice(entry: Any, name: str, source: Source) -> Choice:
    """One group's entry. Raises PlanError at its line."""

    def at(*more: str | int) -> str:
        return f"{source.at('groups', name, *more)}: group '{name}'"

    if not isinstance(entry, dict) or not {"kind", "size", "keep"} <= entry.keys():
        raise PlanError("the plan is malformed", where=at(), why="an entry needs kind, size and keep")
    unknown = entry.keys() - {"kind", "size", "keep"}
    if unknown:
        key = min(unknown)
        raise PlanError(
            f"the plan has a key that means nothing: '{key}'",
            where=at(key),
            cure=nearest(key, ["kind", "size", "keep"]),
        )
    kind, size, keep = entry["kind"], entry["size"], entry["keep"]
    integers = isinstance(keep, list) and all(type(i) is int for i in keep)
    if not isinstance(kind, str) or type(size) is not int or size < 1 or not integers:
        key = "kind" if not isinstance(kind, str) else "keep" if type(size) is int and size > 0 else "size"
        raise PlanError(
            "the plan is malformed",
            where=at(key),
            why="kind must be a string, size a positive integer, keep a list of integers",
        )
    if kind not in {str(k) for k in Kind}:
        raise PlanError(f"unknown kind of group '{kind}'", where=at("kind"), cure=nearest(kind, [str(k) for k in Kind]))
    choice = Choice(kind, size, tuple(keep))
    bad = next((i for i, k in enumerate(keep) if not 0 <= k < size or (i and k <= keep[i - 1])), None)
    if bad is not None:
        _check_indices(choice, at("keep", bad))
    return choice


def _sparsity(entry: Any, name: str, source: Source) -> Sparsity:
    """One weight's tiles. Raises PlanError at their line."""
    try:
        return Sparsity.from_dict(entry, "")
    except PlanError as error:
        raise PlanError(
            error.what, where=f"{source.at('blocks', name)}: blocks of '{name}'", why=error.why, cure=error.cure
        ) from None


def _tokens(raw: Any, source: Source) -> TokenPlan | None:
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


def _check_indices(choice: Choice, where: str) -> None:
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
