"""The decision: what stays of everything a search could choose. Versioned JSON by name, to be diffed and edited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, nearest
from .axis import Axis, Keep
from .choice import (
    AnyChoice,
    Choice,
    TokenChoice,
    TokenPlan,
    check_alike,
    check_indices,
    read_any,
    read_choice,
    read_sparsity,
    read_tokens,
    tokens_of,
)
from .group import Kind, PruneGroup
from .json_source import Source, loads
from .sparsity import Sparsity

__all__ = ["Choice", "CompressionPlan", "TokenChoice", "TokenPlan", "compose"]

VERSION = 2
_ROTATED = "rotated"  # where plans of format 2 once said which widths are in a basis by data
TILES = ":block"  # the name of a weight's tiles is the weight's with this behind it
HALVED = "halved"  # in ``about``: how often the search halved the groups' multiples
MAX_BYTES = 256 * 2**20  # a plan lists kept indices: far below this for any model, so a larger file is not a plan


@dataclass(frozen=True)
class CompressionPlan:
    """Name -> what was chosen. What is not named stays whole.

    choices   by the name of a group (``blocks.0.mlp.fc1:ffn``), of an attention where tokens go
              (``blocks.3.attn.proj:token``), of a weight's tiles (``blocks.0.mlp.fc1.weight:block``; tiles are of the
              weight that slicing leaves), or of whatever a kind of a plugin finds
    about     free-form provenance (criterion, budget, versions); applying a plan never reads it
    source    the file that it was read from: errors then name the line
    aliases   digests that 0.1.0 gave the same plan
    """

    choices: Mapping[str, AnyChoice] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = field(default=(), repr=False, compare=False)

    # ------------------------------------------------------------ one kind of choice

    @property
    def elements(self) -> dict[str, Choice]:
        """The choices of elements, by group."""
        return {name: c for name, c in self.choices.items() if isinstance(c, Choice)}

    @property
    def tokens(self) -> TokenPlan | None:
        """The choices of tokens together; None where no site is named."""
        return tokens_of(self.choices)

    @property
    def blocks(self) -> dict[str, Sparsity]:
        """The choices of tiles, by the weight's name."""
        return {n.removesuffix(TILES): c for n, c in self.choices.items() if isinstance(c, Sparsity)}

    def with_elements(self, choices: Mapping[str, Choice], about: Mapping[str, Any] | None = None) -> CompressionPlan:
        """The same tokens and tiles, with other choices of elements."""
        rest = {name: c for name, c in self.choices.items() if not isinstance(c, Choice)}
        return replace(self, choices={**choices, **rest}, about=self.about if about is None else about)

    def with_tokens(self, tokens: TokenPlan | None) -> CompressionPlan:
        """The same elements and tiles, with other choices of tokens, or none."""
        rest = {name: c for name, c in self.choices.items() if not isinstance(c, TokenChoice)}
        return replace(self, choices={**rest, **({} if tokens is None else tokens.choices())})

    def with_blocks(self, blocks: Mapping[str, Sparsity]) -> CompressionPlan:
        """The same elements and tokens, with other choices of tiles, by the weight's name."""
        rest = {name: c for name, c in self.choices.items() if not isinstance(c, Sparsity)}
        return replace(self, choices={**rest, **{name + TILES: c for name, c in blocks.items()}})

    # ------------------------------------------------------------ what it says

    @property
    def empty(self) -> bool:
        """Whether nothing goes."""
        return all(c.whole for c in self.choices.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of what is chosen, each once."""
        return tuple(dict.fromkeys(c.kind for c in self.choices.values()))

    @property
    def basis(self) -> str:
        """By what queries, keys and values are put in order of which something goes, "" where none are (see
        ``AlignHeads``)."""
        return next((c.basis for c in self.elements.values() if c.basis and c.kind != Kind.WIDTH), "")

    @property
    def rotated(self) -> tuple[str, ...]:
        """The groups of which something goes whose elements are directions of a residual stream's own basis (see
        ``RotateWidth``)."""
        return tuple(name for name, c in self.elements.items() if c.basis and c.kind == Kind.WIDTH)

    @property
    def digest(self) -> str:
        """Of what is decided, whatever ``about`` says: 16 hexadecimal digits of a SHA-256. The same plan has the same
        one, in memory and read back, in this format and in the first.

        >>> one = CompressionPlan({"a": Choice("ffn", 4, (1, 2))}, {"seed": 0})
        >>> one.digest == CompressionPlan.from_json(one.to_json()).digest == CompressionPlan(one.choices).digest
        True
        """
        return _digest(self, self.tokens)

    def kept(self, group: PruneGroup) -> Tensor:
        """Indices of ``group`` that stay. [kept] int64"""
        choice = self.choices.get(group.name)
        whole = not isinstance(choice, Choice)
        return torch.arange(group.size) if whole else torch.tensor(choice.keep, dtype=torch.long)  # type: ignore[union-attr]

    def sizes(self, groups: Collection[PruneGroup]) -> dict[Axis, int]:
        """How many elements stay of the axis of every group that is named: what a cost is asked at."""
        found = self.elements
        return {g.axis: len(found[g.name].keep) for g in groups if g.name in found}

    def keep(self, groups: Collection[PruneGroup]) -> Keep:
        """Axis -> the elements that stay, for every axis of tensors that becomes shorter."""
        cut = {g.axis: self.kept(g) for g in groups if g.sliced and g.name in self.choices}
        return {axis: index for axis, index in cut.items() if len(index) < axis.size}

    # ------------------------------------------------------------ whether it fits

    def check(self, groups: Mapping[str, PruneGroup]) -> None:
        """Raise :class:`PlanError` unless every choice fits its group: known, same size, not frozen, in range."""
        for name, choice in self.elements.items():
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
            self._check_basis(choice, name, group)
            check_indices(choice, where)
            if not choice.keep and group.floor > 0:
                raise PlanError(
                    "the plan drops a whole branch",
                    where=where,
                    why="the group keeps nothing",
                    cure="keep at least one, or pass `--allow-empty`",
                )
            if group.frozen and len(choice.keep) != group.size:
                raise PlanError(
                    "the plan cuts a frozen group", where=where, why=group.frozen, cure="remove the group from the plan"
                )
            self._check_multiple(choice, name, group.granularity)

    def _check_basis(self, choice: Choice, name: str, group: PruneGroup) -> None:
        if bool(choice.basis) == bool(group.basis) or (self.source is None and not choice.basis):
            return
        by = "rotate-width" if choice.kind == Kind.WIDTH else "align-heads"
        raise PlanError(
            "the plan numbers elements of another basis",
            where=self.place(name, *(["basis"] if choice.basis else [])),
            why=f"they are put in order by {by} there, and not here"
            if choice.basis
            else f"they are put in order by {by} here, and not there",
            cure=f"state {by} before read-plan where the plan says `basis`, and only there; else make a new plan",
        )

    def _check_multiple(self, choice: Choice, name: str, step: int) -> None:
        count = len(choice.keep)
        if count % step and count != choice.size and self.source is not None:  # one that was made here knows its own
            raise PlanError(
                "a kept count is not a multiple",
                where=self.place(name, "keep"),
                why=f"{count} of {choice.size} stay, asked are multiples of {step}",
                cure=f"keep {count // step * step} or {-(-count // step) * step}, or align less",
            )

    def check_kinds(self, known: Collection[str]) -> None:
        """Raise :class:`PlanError` for a kind that is none of those ``known``."""
        for name, choice in self.choices.items():
            if choice.kind not in known:
                raise PlanError(
                    f"unknown kind of group '{choice.kind}'",
                    where=self.place(name, "kind"),
                    cure=f"{nearest(choice.kind, known)} A kind of a plugin needs the plugin installed",
                )

    def place(self, name: str, *more: str | int) -> str:
        """Where a choice, or something in it, stands: with the line where the plan is a file's."""
        choice, at = self.choices.get(name), ("choices", name, *more)
        old: tuple[str | int, ...] = ("groups", name, *more)
        noun = "group"
        if isinstance(choice, TokenChoice):
            noun, old = "site", ("tokens", "removed", name)
        elif isinstance(choice, Sparsity):
            noun, old = "blocks of", ("blocks", name.removesuffix(TILES), *more)
        if self.source is None:
            return f"{noun} '{name}'"
        return f"{self.source.at(*(at if self.source.holds('choices') else old))}: {noun} '{name}'"

    # ------------------------------------------------------------ as a file

    def to_json(self) -> str:
        """Readable JSON, one choice per line, stable order."""
        choices = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(c.to_dict())}" for name, c in sorted(self.choices.items())
        )
        about = json.dumps(dict(self.about), indent=2, sort_keys=True).replace("\n", "\n  ")
        return f'{{\n  "fxprune_plan": {VERSION},\n  "about": {about},\n  "choices": {{\n{choices}\n  }}\n}}\n'

    @staticmethod
    def from_json(text: str, where: str = "plan") -> CompressionPlan:
        """Parse and validate, in this format or the first. Raises :class:`PlanError` with the line or the group at
        fault."""
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
        version = raw["fxprune_plan"]
        if type(version) is not int or version not in (1, VERSION):
            raise PlanError(
                "the plan has another version",
                where=source.at("fxprune_plan"),
                why=f"found {version!r}, this fxprune reads 1 and {VERSION}",
            )
        repeated = source.find_repeated(depth=3) if twice else None
        if repeated is not None and repeated[0][0] != "about":
            raise PlanError(
                f"'{repeated[0][-1]}' is there twice",
                where=f"{where}:{repeated[1]}",
                why="which of the two counts cannot be told",
                cure="remove one of them",
            )
        return _read_1(raw, source) if version == 1 else _read_2(raw, source)

    @staticmethod
    def read(path: str | Path) -> CompressionPlan:
        """The plan of a file. Raises :class:`PlanError`."""
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
    choices = first.elements
    for name, choice in second.elements.items():
        earlier = choices.get(name)
        keep = choice.keep if earlier is None else tuple(earlier.keep[i] for i in choice.keep)
        choices[name] = replace(choice, size=choice.size if earlier is None else earlier.size, keep=keep)
    return CompressionPlan(second.with_elements(choices).choices, second.about)


def _read_2(raw: Mapping[str, Any], source: Source) -> CompressionPlan:
    known = ("fxprune_plan", "about", "choices")
    odd = next((key for key in raw if key not in known), None)
    if odd is not None:
        raise PlanError(
            f"the plan has a key that means nothing: '{odd}'", where=source.at(odd), cure=nearest(odd, known)
        )
    about, choices = raw.get("about", {}), raw.get("choices")
    _objects(source, about=about, choices=choices)
    found = {name: read_any(entry, name, source) for name, entry in choices.items()}  # type: ignore[union-attr]
    check_alike(found, source)
    return _basis_in_choices(CompressionPlan(found, about, source))


def _basis_in_choices(plan: CompressionPlan) -> CompressionPlan:
    """A plan from before 0.2.0 was released said in ``about`` of which widths the elements are directions."""
    names = plan.about.get(_ROTATED)
    if not isinstance(names, list) or plan.rotated:
        return plan
    turned = {n: replace(c, basis="data") for n, c in plan.elements.items() if n in names and c.kind == Kind.WIDTH}
    about = {key: value for key, value in plan.about.items() if key != _ROTATED}
    found = replace(plan, choices={**plan.choices, **turned}, about=about)
    return replace(found, aliases=(plan.digest,)) if turned else found


def _read_1(raw: Mapping[str, Any], source: Source) -> CompressionPlan:
    """A plan of 0.1.0: a section per kind of choice."""
    about, groups, blocks = raw.get("about", {}), raw.get("groups"), raw.get("blocks", {})
    _objects(source, groups=groups, about=about, blocks=blocks)
    kinds = [str(kind) for kind in Kind]
    choices = {name: read_choice(entry, "groups", name, source, kinds) for name, entry in groups.items()}  # type: ignore[union-attr]
    sparse = {name: read_sparsity(entry, "blocks", name, source) for name, entry in blocks.items()}
    tokens = read_tokens(raw.get("tokens"), source)
    plan = CompressionPlan(choices, about, source).with_tokens(tokens).with_blocks(sparse)
    return replace(plan, aliases=(_digest(plan, tokens),)) if tokens is not None and not tokens.removed else plan


def _objects(source: Source, **sections: Any) -> None:
    for key, value in sections.items():
        if not isinstance(value, dict):
            raise PlanError("the plan is malformed", where=source.at(key), why=f"'{key}' must be an object")


def _digest(plan: CompressionPlan, tokens: TokenPlan | None) -> str:
    """Of the text that 0.1.0 wrote of the plan without its ``about``: pipelines of reports name plans by it."""

    def lines(entries: Mapping[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))

    tail = ""
    if tokens is not None:
        said = {"reducer": tokens.reducer, "unmerge": tokens.unmerge, "removed": dict(sorted(tokens.removed.items()))}
        tail = ',\n  "tokens": ' + json.dumps(said, indent=2).replace("\n", "\n  ")
    if plan.blocks:
        tail += f',\n  "blocks": {{\n{lines({n: s.to_dict(bare=True) for n, s in plan.blocks.items()})}\n  }}'
    groups = lines({name: choice.to_dict() for name, choice in plan.elements.items()})
    text = f'{{\n  "fxprune_plan": 1,\n  "about": {{}},\n  "groups": {{\n{groups}\n  }}{tail}\n}}\n'
    return hashlib.sha256(text.encode()).hexdigest()[:16]
