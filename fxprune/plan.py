"""The decision: which elements of each group stay. Versioned JSON by parameter names, to be diffed and edited."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import PlanError
from .group import PruneGroup
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
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    tokens: TokenPlan | None = None
    blocks: Mapping[str, Sparsity] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        whole = all(len(c.keep) == c.size for c in self.choices.values()) and not self.blocks
        return whole and (self.tokens is None or self.tokens.empty)

    def kept(self, group: PruneGroup) -> Tensor:
        """Indices of ``group`` that stay. [kept] int64"""
        choice = self.choices.get(group.name)
        return torch.arange(group.size) if choice is None else torch.tensor(choice.keep, dtype=torch.long)

    def check(self, groups: Mapping[str, PruneGroup]) -> None:
        """Raise :class:`PlanError` unless every choice fits its group: known, same size, not frozen, in range."""
        from .errors import nearest

        for name, choice in self.choices.items():
            where = f"group '{name}'"
            group = groups.get(name)
            if group is None:
                raise PlanError("the plan names a group that this model does not have", where=where,
                                why="it was made for another architecture, or edited", cure=nearest(name, groups))
            if choice.size != group.size:
                raise PlanError("the plan was made for another architecture", where=where,
                                why=f"the group has {group.size} elements here and {choice.size} in the plan",
                                cure="make a new plan with `fxprune plan`")
            _check_indices(choice, where)
            if not choice.keep and group.floor > 0:
                raise PlanError("the plan drops a whole branch", where=where, why="the group keeps nothing",
                                cure="keep at least one, or pass --allow-empty")
            if group.frozen and len(choice.keep) != group.size:
                raise PlanError("the plan cuts a frozen group", where=where, why=group.frozen,
                                cure="remove the group from the plan")

    def to_json(self) -> str:
        """Readable JSON, one group per line, stable order."""
        groups = ",\n".join(
            f"    {json.dumps(name)}: " + json.dumps({"kind": c.kind, "size": c.size, "keep": list(c.keep)})
            for name, c in sorted(self.choices.items())
        )
        about = json.dumps(dict(self.about), indent=2, sort_keys=True).replace("\n", "\n  ")
        tokens = "" if self.tokens is None else ',\n  "tokens": ' + json.dumps(
            {"reducer": self.tokens.reducer, "unmerge": self.tokens.unmerge, "removed": dict(self.tokens.removed)},
            indent=2).replace("\n", "\n  ")
        blocks = ",\n".join(f"    {json.dumps(n)}: {json.dumps(s.to_dict())}" for n, s in sorted(self.blocks.items()))
        tail = tokens + (f',\n  "blocks": {{\n{blocks}\n  }}' if blocks else "")
        return f'{{\n  "fxprune_plan": {VERSION},\n  "about": {about},\n  "groups": {{\n{groups}\n  }}{tail}\n}}\n'

    @staticmethod
    def from_json(text: str, where: str = "plan") -> CompressionPlan:
        """Parse and validate. Raises :class:`PlanError` with the line or the group at fault."""
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise PlanError("the plan is not valid JSON", where=f"{where}{line}", why=str(error)) from None
        if not isinstance(raw, dict) or "fxprune_plan" not in raw:
            raise PlanError("this file is not a plan", where=where, why="it has no 'fxprune_plan' version",
                            cure="make one with `fxprune plan MODEL --flops 0.5`")
        if raw["fxprune_plan"] != VERSION:
            raise PlanError("the plan has another version", where=where,
                            why=f"found {raw['fxprune_plan']!r}, this fxprune reads {VERSION}")
        groups, about, blocks = raw.get("groups"), raw.get("about", {}), raw.get("blocks", {})
        if not isinstance(groups, dict) or not isinstance(about, dict) or not isinstance(blocks, dict):
            raise PlanError("the plan is malformed", where=where, why="'groups', 'about' and 'blocks' must be objects")
        choices = {}
        for name, entry in groups.items():
            at = f"{where}: group '{name}'"
            if not isinstance(entry, dict) or not {"kind", "size", "keep"} <= entry.keys():
                raise PlanError("the plan is malformed", where=at, why="an entry needs kind, size and keep")
            kind, size, keep = entry["kind"], entry["size"], entry["keep"]
            integers = isinstance(keep, list) and all(type(i) is int for i in keep)
            if not isinstance(kind, str) or type(size) is not int or size < 1 or not integers:
                raise PlanError("the plan is malformed", where=at,
                                why="kind must be a string, size a positive integer, keep a list of integers")
            choices[name] = Choice(kind, size, tuple(keep))
            _check_indices(choices[name], at)
        sparse = {name: Sparsity.from_dict(entry, f"{where}: blocks of '{name}'") for name, entry in blocks.items()}
        return CompressionPlan(choices, about, _tokens(raw.get("tokens"), f"{where}: tokens"), sparse)

    @staticmethod
    def read(path: str | Path) -> CompressionPlan:
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PlanError("this file is too large to be a plan", where=str(path),
                                why=f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError("the plan cannot be read", where=str(path), why=error.strerror or str(error)) from None
        except UnicodeDecodeError as error:
            raise PlanError("the plan is not a text file", where=str(path), why=str(error)) from None
        return CompressionPlan.from_json(text, str(path))


def _tokens(raw: Any, where: str) -> TokenPlan | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or not {"reducer", "removed"} <= raw.keys():
        raise PlanError("the plan is malformed", where=where, why="tokens need reducer and removed")
    reducer, removed, unmerge = raw["reducer"], raw["removed"], raw.get("unmerge", False)
    counts = isinstance(removed, dict) and all(type(r) is int and r >= 0 for r in removed.values())
    if not isinstance(reducer, str) or not counts or not isinstance(unmerge, bool):
        raise PlanError("the plan is malformed", where=where, why="reducer must be a string, removed an object of site "
                        "names and counts, unmerge true or false")
    return TokenPlan(reducer, dict(removed), unmerge)


def _check_indices(choice: Choice, where: str) -> None:
    keep = choice.keep
    if any(b <= a for a, b in itertools.pairwise(keep)):
        raise PlanError("kept indices must be sorted and unique", where=where)
    if keep and (keep[0] < 0 or keep[-1] >= choice.size):
        raise PlanError("a kept index is out of range", where=where,
                        why=f"indices must be 0..{choice.size - 1}, found {keep[0]}..{keep[-1]}")
