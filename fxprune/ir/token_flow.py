"""Where a vision transformer's tokens may become fewer, and how they flow from there. All by node name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import PlanError, nearest
from .axis import Axis, Dim, atoms, find, leaves, total
from .choice import TOKEN, AnyChoice, TokenChoice, TokenPlan

if TYPE_CHECKING:
    from .axes import Axes


@dataclass(frozen=True)
class TokenSite:
    """One attention block behind which tokens may be reduced.

    name        unique and stable: the module of the projection that closes the attention, e.g. ``blocks.3.attn.proj``
    attention   node of the attention: ``scaled_dot_product_attention``, or the softmax of the explicit form
    value       node [batch, tokens, width] that is reduced: between attention and feed-forward layer of a pre-norm
                block, in general the first value behind the attention that everything later reads its tokens through
    query, key, values   nodes [batch, heads, tokens, d]; "" where they cannot be tapped
    transposed  the key is [batch, heads, d, tokens]
    mapped      the attention node itself is softmax(..) [batch, heads, tokens, tokens]
    scale       of the attention's scores
    tokens      before any reduction; ``protected`` of them in front are class, distillation or register tokens
    axis        the unprotected tokens from here to the next site, in ``TokenFlow.axes``
    frozen      why tokens must not be reduced here, or ""
    """

    name: str
    attention: str
    value: str = ""
    query: str = ""
    key: str = ""
    values: str = ""
    transposed: bool = False
    mapped: bool = False
    scale: float = 1.0
    tokens: int = 0
    protected: int = 0
    axis: Axis | None = None
    frozen: str = ""

    @property
    def usable(self) -> bool:
        return not self.frozen

    # ------------------------------------------------------------ a Prunable: its elements are the unprotected tokens

    @property
    def kind(self) -> str:
        return TOKEN

    @property
    def size(self) -> int:
        return self.tokens - self.protected

    def levels(self) -> list[int]:
        """Tokens that may be left, as far as the site knows: a reducer may not take as many at once."""
        return list(range(self.size + 1)) if self.usable else [self.size]

    def level_above(self, share: float) -> int:
        """The fewest tokens that are at least this share."""
        return math.ceil(share * self.size - 1e-9)

    def sizes(self, count: int) -> dict[Axis, int]:
        """What ``count`` tokens left do to the variables of the cost, from here to the next site (of
        ``TokenFlow.axes``)."""
        return {} if self.axis is None else {self.axis: count}

    def choose(
        self, count: int, scores: object = None, reducer: str = "tome", unmerge: bool = False
    ) -> dict[str, AnyChoice]:
        """As a plan says it; {} where all stay. Which tokens go is the reducer's choice, for every image anew."""
        gone = self.size - count
        return {self.name: TokenChoice(gone, reducer, unmerge)} if gone else {}


@dataclass(frozen=True)
class TokenFlow:
    """How tokens flow: the sites, and for every node behind one, which site it is behind.

    sites      in graph order, frozen ones included
    region     node -> index into ``sites`` of the last usable site before it; nodes that hold all tokens are absent
    axes       the walk's axes, where the nodes of every region have an axis of their own for the tokens that are left
    softmaxes  node -> position of the dimension that it normalises, tokens of its region (attention over fewer keys)
    averages   node -> the dimensions of its input that it averages or sums over and that hold tokens
    grid       rows and columns of the patches, where that is what the token dimension was made of
    restored   (node, reader): edges at which all tokens must be there again (dense prediction), with ``unmerge``
    unmerge    whether such edges were looked for
    """

    sites: tuple[TokenSite, ...]
    region: Mapping[str, int] = field(default_factory=dict)
    axes: Axes | None = None
    softmaxes: Mapping[str, int] = field(default_factory=dict)
    averages: Mapping[str, int] = field(default_factory=dict)
    restored: tuple[tuple[str, str], ...] = ()
    grid: tuple[int, ...] = ()
    unmerge: bool = False

    @property
    def usable(self) -> tuple[TokenSite, ...]:
        return tuple(s for s in self.sites if s.usable)

    def holds_rows(self, node: str) -> bool:
        """Whether the node's value is [batch, tokens, width] behind a site: a row per token that is left."""
        if node not in self.region or self.axes is None:
            return False
        dims, axis = self.axes.dims.get(node), self.sites[self.region[node]].axis
        return (
            isinstance(dims, list)
            and len(dims) == 3
            and axis is not None
            and axis in set(leaves(dims[1]))
            and not any(axis in set(leaves(d)) for d in (dims[0], dims[2]))
        )


def describe_tokens(flow: TokenFlow, plan: TokenPlan | None) -> dict[str, Any]:
    """The token reduction as plain data for the report."""
    removed: Mapping[str, int] = {} if plan is None else plan.removed
    sites, left = [], 0
    for site in flow.sites:
        left = left or site.tokens
        left -= removed.get(site.name, 0) if site.usable else 0
        sites.append(
            {
                "site": site.name,
                "tokens": site.tokens,
                "protected": site.protected,
                "removed": removed.get(site.name, 0),
                "left": left if site.usable else site.tokens,
                "frozen": site.frozen,
            }
        )
    return {
        "reducer": None if plan is None else plan.reducer,
        "unmerge": plan is not None and plan.unmerge,
        "restored": [list(edge) for edge in flow.restored],
        "sites": sites,
    }


class Positional(Exception):
    """A dim holds a part of the tokens: they are read by where they stand."""


def patches_of(dim: Dim) -> tuple[Dim, int]:
    """(the tokens that may be reduced, how many stand in front of them) of a token dim.

    A class token is a segment of its own in front of the patches: ``(1 + 14*14)``. Raises Positional where something
    stands behind the patches.
    """
    parts = atoms(dim)
    if len(parts) != 1 or parts[0].segments is None:
        return parts, 0
    segments = parts[0].segments
    largest = max(range(len(segments)), key=lambda i: (total(segments[i]), i))
    if largest != len(segments) - 1:
        raise Positional("something stands behind the patches")
    return atoms(segments[largest]), sum(total(s) for s in segments[:largest])


class Swap:
    """Replaces the run ``patches`` by one ``axis`` wherever it stands whole. One object per region."""

    def __init__(self, patches: Dim, axis: Axis) -> None:
        self.patches, self.axis = atoms(patches), axis
        self.leaves = set(leaves(patches))
        self._sums: dict[Axis, Axis] = {}

    def holds(self, dim: Dim) -> bool:
        """Whether ``dim`` has to do with the tokens at all."""
        return any(axis in self.leaves for axis in leaves(dim))

    def __call__(self, dim: Dim) -> Dim:
        """``dim`` with the tokens' axis in the place of the patches. Raises Positional where only a part of them is."""
        out: list[Axis] = []
        parts, size, i = atoms(dim), len(self.patches), 0
        while i < len(parts):
            if parts[i : i + size] == self.patches:
                out.append(self.axis)
                i += size
                continue
            axis = find(parts[i])
            if axis.segments is not None and self.holds((axis,)):
                axis = self._sum(axis)
            elif axis in self.leaves:
                raise Positional("only a part of the tokens")
            out.append(axis)
            i += 1
        return tuple(out)

    def _sum(self, axis: Axis) -> Axis:
        if axis not in self._sums:
            made = Axis(axis.size, axis.label)
            made.segments = [self(s) for s in axis.segments or ()]
            self._sums[axis] = made
        return self._sums[axis]


class Capped(Protocol):
    """What counts are held against: how many tokens a reducer can take at once."""

    name: ClassVar[str]

    def cap(self, tokens: int, protected: int) -> int:
        """The most tokens that may go at once."""
        ...


def counts_behind(flow: TokenFlow, plan: TokenPlan, reducer: Capped) -> dict[str, int]:
    """Tokens left behind every usable site, by name. Raises PlanError where the plan does not fit."""
    known = {s.name: s for s in flow.sites}
    for name in plan.removed:
        if name not in known:
            raise PlanError(
                "the plan reduces tokens where this model has no attention",
                where=f"site '{name}'",
                why="it was made for another architecture, or edited",
                cure=nearest(name, known),
            )
        if known[name].frozen and plan.removed[name]:
            raise PlanError("the plan reduces tokens at a frozen site", where=f"site '{name}'", why=known[name].frozen)
    left, behind = 0, {}
    for site in flow.usable:
        left = left or site.tokens
        r, most = plan.removed.get(site.name, 0), reducer.cap(left, site.protected)
        if r > most:
            raise PlanError(
                "the plan removes more tokens than can go at once",
                where=f"site '{site.name}'",
                why=f"{r} of {left}, '{reducer.name}' takes at most {most} there",
            )
        left -= r
        behind[site.name] = left
    return behind
