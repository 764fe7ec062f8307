"""What a search can choose: groups of elements that live and die together, parts that are there or not, ties of groups.

All are a :class:`Prunable`: a name, a kind, levels, what a level does to sizes (and so to the cost), what it is worth,
and what the plan then says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Protocol

import torch

from .axis import Axis, Dim
from .choice import AnyChoice, Choice
from .importance import ImportanceScores


class Kind(str, Enum):
    """What a group's elements are. Only a name for policy and people: slicing never looks at it. A plugin's kind is a
    word of its own."""

    HEAD = "head"  # attention heads; a whole KV group under GQA/MQA is KV
    KV = "kv"
    QUERY = "query"  # query heads inside each KV group (the same ones in every group)
    QK = "qk"  # width of queries and keys
    V = "v"  # width of values
    QKV = "qkv"  # width shared by queries, keys and values (fused projections)
    FFN = "ffn"
    CHANNEL = "channel"
    WIDTH = "width"  # residual width and other axes under a norm's statistics
    EXPERT = "expert"
    BLOCK = "block"
    LAYER = "layer"
    TOKEN = "token"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


DEFAULT_KINDS = (Kind.HEAD, Kind.KV, Kind.FFN, Kind.CHANNEL)
"""Pruned when the user does not say otherwise: cutting them is exact and keeps every tensor's meaning."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer that a group's elements index.

    ``dim`` is the whole expression of that dimension, so one group may sit in it as the inner factor of a product
    and inside two segments of a sum at once.
    """

    parameter: str
    position: int
    dim: Dim


Scores = Mapping[str, ImportanceScores]


class Prunable(Protocol):
    """What a search can choose. Implementations: :class:`PruneGroup` (elements of an axis), ``BlockGroup`` (tiles of a
    weight), ``TokenSite`` (tokens behind an attention), :class:`Switch` (a part that is there or not), :class:`Tie`
    (groups that share a count), and whatever a kind of a plugin finds.

    name    unique and stable;  kind  a word, see ``registry.KINDS``: it says which pass finds it and which applies it
    size    how many elements it has;  frozen  why it must stay whole, or ""
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def frozen(self) -> str: ...

    def levels(self) -> list[int]:
        """Kept counts that may be chosen, ascending; the last one is the whole."""
        ...

    def sizes(self, count: int) -> dict[Axis, int]:
        """What keeping ``count`` does to the variables of the cost."""
        ...

    def choose(self, count: int, scores: Scores) -> dict[str, AnyChoice]:
        """What a plan says where ``count`` stay, by name."""
        ...


@dataclass(frozen=True)
class OpUse:
    """A product with a weight that a group passes through, and what cannot be done there: why, or "".

    recovery     the weight cannot be moved to make up for what is gone
    cost         its multiply-accumulates are in no budget
    importance   no criterion that runs the model sees removals here
    """

    node: str
    op: str
    recovery: str = ""
    cost: str = ""
    importance: str = ""


@dataclass(frozen=True)
class PruneGroup:
    """``size`` interchangeable elements that live and die together.

    name         unique and stable: the parameter slot that best names it, e.g. ``blocks.0.mlp.fc1.weight[0]``
    axis         the leaf axis, a variable of the cost
    slots        every parameter or buffer dimension it reaches
    exact        cutting it equals masking it; False where a norm's statistics then run over the kept elements
    frozen       why it must not be cut, or "" when it may
    macs         multiply-accumulates that one element costs in the dense program at its example shapes
    nodes        graph nodes that contract it (its consumers), for people
    granularity  kept counts are multiples of this, or the full size
    strict       nobody may take finer steps; else a search may, where these leave much of the budget
    floor        the smallest kept count a search may choose
    least        how low it may go all the same where its budget is out of reach otherwise, or where that is better: a
                 floor that nobody asked for; None: it is what was asked for
    uses         the products with a weight that it passes through, and what is not known of them
    ordered      a basis was chosen in which its elements come in the order of what they carry: the last ones go first,
                 whatever their single scores
    basis        by what ``AlignHeads`` or ``RotateWidth`` chose its basis (``data``, ``weights``), "" where it has the
                 model's own
    """

    sliced: ClassVar[bool] = True  # its elements are an axis of tensors, which slicing makes shorter

    name: str
    kind: Kind | str
    size: int
    axis: Axis
    slots: tuple[Slot, ...] = ()
    exact: bool = True
    frozen: str = ""
    macs: int = 0
    nodes: tuple[str, ...] = ()
    granularity: int = 1
    floor: int = 1
    strict: bool = True
    least: int | None = None
    uses: tuple[OpUse, ...] = ()
    ordered: bool = False
    basis: str = ""

    @property
    def prunable(self) -> bool:
        return not self.frozen and self.size > 1

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the groups whose scores say what this one is worth: none where a criterion scores it itself."""
        return ()

    def levels(self) -> list[int]:
        """Kept counts that a plan may choose, ascending; the last one is ``size``."""
        step = self.granularity
        counts = [k for k in range(0, self.size, step) if k >= self.floor]
        return [*counts, self.size]

    def lowest(self) -> PruneGroup:
        """The same group with the lowest floor that a search may go down to."""
        return self if self.least is None else self.but(floor=min(self.floor, self.least))

    def finer(self, times: int = 1) -> PruneGroup:
        """The same group in steps that are halved so often (an odd step becomes single elements); as it is where
        nobody may take finer ones.

        >>> one = PruneGroup("a", "ffn", 160, Axis(160), granularity=6, strict=False)
        >>> [one.finer(n).granularity for n in range(4)], one.but(strict=True).finer().granularity
        ([6, 3, 1, 1], 6)
        """
        step = self.granularity
        for _ in range(0 if self.strict else times):
            step = step // 2 if step % 2 == 0 else 1
        return self if step == self.granularity else self.but(granularity=step)

    def level_above(self, share: float) -> int:
        """The smallest count that a plan may choose and that is at least this share."""
        least = math.ceil(share * self.size - 1e-9)
        return next(count for count in self.levels() if count >= least)

    def sizes(self, count: int) -> dict[Axis, int]:
        """What keeping ``count`` elements does to the variables of the cost."""
        return {self.axis: count}

    def choose(self, count: int, scores: Scores) -> dict[str, AnyChoice]:
        """The best ``count`` elements, as a plan says it; {} where all stay."""
        if count == self.size:
            return {}
        keep = tuple(sorted(scores[self.name].ranking()[:count]))
        return {self.name: Choice(str(self.kind), self.size, keep, self.basis)}

    def derive(self, scores: Scores) -> ImportanceScores:
        """Its scores, made of those of its ``members``."""
        return scores[self.name]

    def within(self, nodes: Set[str]) -> bool:
        """Whether all that reads it is among these nodes: it is gone where they are."""
        return bool(self.nodes) and set(self.nodes) <= nodes

    def but(self, **changes: object) -> PruneGroup:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Switch(PruneGroup):
    """A part of the graph that is there or not: a residual branch, a layer. Its axis is its own and in no tensor.

    inside   names of the nodes that are gone with it, placeholders of its parameters included: what they cost is
             multiplied by whether it is there
    ends     names of the nodes through which it reaches the rest: where they are zero, it is as if it were gone
    shares   names of the groups that together are the whole of it, each part once: they say what it is worth
    """

    sliced: ClassVar[bool] = False

    size: int = 1
    floor: int = 0
    inside: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()

    @property
    def prunable(self) -> bool:
        return not self.frozen

    @property
    def members(self) -> tuple[str, ...]:
        return self.shares

    def within(self, nodes: Set[str]) -> bool:
        return self.inside < nodes

    def level_above(self, share: float) -> int:
        """Gone, for every share below one: there is nothing between."""
        return self.size if share >= 1 else 0

    def derive(self, scores: Scores) -> ImportanceScores:
        """Worth what losing its elements costs: of each group all at once where that was measured, else added up. Where
        scores only rank, by the rule that a search has
        for groups that may go entirely (``ladder``): as much as going down to the best element, and once more."""
        parts = [scores[name] for name in self.shares]
        each = [p.values.detach().to("cpu", torch.float64) for p in parts]
        sums = [v.sum() if p.whole is None else v.new_tensor(p.whole) for p, v in zip(parts, each, strict=True)]
        total, curve = torch.stack(sums).sum().view(1), None
        if not parts[0].comparable:
            drops = [1.0 + float((v.sum() / v.max()).log()) for v in each if float(v.max()) > 0]
            curve = torch.tensor([0.0, max(drops, default=0.0)], dtype=torch.float64)
        return replace(parts[0], group=self.name, values=total, gradients=None, order=None, curve=curve, whole=None)


@dataclass(frozen=True, kw_only=True)
class Tie(PruneGroup):
    """Groups that keep the same number of elements, each its own: one number of a configuration speaks for all of them.

    tied   the groups, of one size; the axis is the first one's
    """

    sliced: ClassVar[bool] = False

    tied: tuple[PruneGroup, ...]

    @staticmethod
    def of(name: str, groups: Sequence[PruneGroup]) -> Tie:
        """The tie of these groups, under the strictest of their limits. Raises ValueError where sizes differ."""
        first = groups[0]
        if len({g.size for g in groups}) != 1:
            raise ValueError(f"{name}: groups of {sorted({g.size for g in groups})} elements share no count")
        return Tie(
            name=name,
            kind=first.kind,
            size=first.size,
            axis=first.axis,
            exact=all(g.exact for g in groups),
            frozen=next((g.frozen for g in groups if g.frozen), ""),
            macs=sum(g.macs for g in groups),
            nodes=tuple(dict.fromkeys(n for g in groups for n in g.nodes)),
            granularity=math.lcm(*(g.granularity for g in groups)),
            floor=max(g.floor for g in groups),
            strict=any(g.strict for g in groups),
            least=None if any(g.least is None for g in groups) else max(g.least or 0 for g in groups),
            tied=tuple(groups),
        )

    def over(self, groups: Sequence[PruneGroup]) -> Tie:
        """The same tie of what a round of pruning left of its groups."""
        return Tie.of(self.name, groups)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.tied)

    def sizes(self, count: int) -> dict[Axis, int]:
        return {g.axis: count for g in self.tied}

    def choose(self, count: int, scores: Scores) -> dict[str, AnyChoice]:
        return {name: choice for g in self.tied for name, choice in g.choose(count, scores).items()}

    def derive(self, scores: Scores) -> ImportanceScores:
        """Element i stands for every group's i-th best: worth them all together."""
        parts = [scores[g.name] for g in self.tied]
        ranked = torch.stack([p.values.detach().to("cpu", torch.float64)[p.ranking()] for p in parts])
        first, curves = parts[0], [p.curve for p in parts if p.curve is not None]
        curve = torch.stack([c.double().cpu() for c in curves]).sum(0) if len(curves) == len(parts) else None
        wholes = [p.whole for p in parts if p.whole is not None]
        whole = sum(wholes) if len(wholes) == len(parts) else None
        alone = replace(first, group=self.name, gradients=None, order=torch.arange(self.size), curve=curve)
        return replace(alone, values=ranked.sum(0), whole=whole)


def with_bases(groups: Sequence[PruneGroup], known: Mapping[str, PruneGroup]) -> tuple[PruneGroup, ...]:
    """Groups that were found again, in the bases that those of the same names were put into: graphs do not tell."""
    return tuple(
        g.but(ordered=known[g.name].ordered, basis=known[g.name].basis)
        if g.name in known and known[g.name].basis
        else g
        for g in groups
    )


def lies_inside(groups: Sequence[PruneGroup], choices: Mapping[str, Choice]) -> set[str]:
    """Names of the groups that are gone because a part that they lie inside is: nothing is left to choose of them."""
    off = [g for g in groups if isinstance(g, Switch) and g.name in choices and not choices[g.name].keep]
    return {g.name for g in groups if any(g.name != part.name and g.within(part.inside) for part in off)}


def with_derived(groups: Sequence[PruneGroup], scores: Scores) -> dict[str, ImportanceScores]:
    """The scores with those of groups that others speak for, made anew."""
    found = dict(scores)
    for group in groups:
        if group.prunable and group.members:
            found[group.name] = group.derive(found)
    return found
