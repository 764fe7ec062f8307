"""``FindGroups``: name what can be pruned, and say why the rest cannot."""

from __future__ import annotations

import collections
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import OptionError
from ...ir.axes import Axes
from ...ir.axis import OPEN, Axis, Dim, atoms, leaves, real_size
from ...ir.cost import with_macs
from ...ir.group import Kind, PruneGroup, Slot, Tie
from ...ir.norms import row_norms
from ...ir.pipeline import Analysis
from ...ir.program import Program
from .op_uses import op_uses
from .residual import branch_ends, residual_streams

ALIGN = 8
FLOOR = 0.1
LAYERED = (Kind.HEAD, Kind.KV, Kind.FFN)
"""Kinds whose elements are all that an attention, or a feed-forward layer, is."""
KEEP_WHOLE = (Kind.HEAD, Kind.KV, Kind.QUERY)
"""Kinds whose elements are already as wide as a kernel likes: alignment counts neurons, not heads."""


@dataclass(frozen=True)
class FindGroups(Analysis):
    """One group per leaf axis that reaches a parameter or buffer.

    align        kept counts of neurons and channels are multiples of this (where the axis is at least twice as long);
                 of 8 where nothing is asked, and a search may then take finer steps where these leave much of a budget
    floor        smallest share of neurons or channels that stays, per group; one head always stays. A tenth where
                 nothing is asked, and a search may then go below where its budget is out of reach otherwise
    allow_empty  let a whole attention or FFN branch go, all but the bias of the projection that closes it
    layers       the same for heads and neurons of branches of a residual stream, and for nothing else
    freeze       glob patterns of group or parameter names that must not be cut, e.g. ``blocks.0.*``
    aligns       ``PATTERN=N``: multiples for the groups that a pattern names, heads included; the last match counts
    floors       ``PATTERN=SHARE``: the same for floors
    inherit      between rounds: multiples, floors, the basis and what is frozen are those of the same group of the
                 whole program (see ``StartRound``), and groups that it did not have are frozen

    A pattern is a glob of a group's name (``blocks.*.mlp.fc1:ffn``, also with a dot for the colon) or of a module
    above it (``blocks.*.mlp``), or a kind (``ffn``, ``heads``).

    Needs ``program.axes``, gives ``program.groups`` in the order of the graph's parameters.
    """

    align: int | None = None
    floor: float | None = None
    allow_empty: bool = False
    freeze: tuple[str, ...] = ()
    aligns: tuple[str, ...] = ()
    floors: tuple[str, ...] = ()
    inherit: bool = False
    layers: bool = False

    needs = ("axes",)
    gives = ("groups",)

    def __post_init__(self) -> None:
        asked = self.align if self.align is not None else ALIGN
        for at, align in [(f"{asked}", asked), *((one, _number(one, "--align")) for one in self.aligns)]:
            if align < 1 or align != int(align):
                raise OptionError("align must be at least 1, and a whole number", where=f"--align {at}")
        common = FLOOR if self.floor is None else self.floor
        for at, floor in [(f"{common}", common), *((one, _number(one, "--floor")) for one in self.floors)]:
            if not 0 <= floor <= 1:
                raise OptionError("floor is a share between 0 and 1", where=f"--floor {at}")
        limits = (self.align, self.floor, self.allow_empty or self.layers, self.aligns, self.floors)
        if self.inherit and limits != (None, None, False, (), ()):
            raise OptionError(
                "limits are inherited or stated, not both",
                where=str(self),
                why="inherit=true takes those of the whole program",
                cure="leave one of them away",
            )

    def run(self, program: Program) -> Program:
        axes: Axes = program.need("axes")
        facts = _Facts(program)
        slots, uses = _slots(program, axes), op_uses(program)
        parameters = set(program.exported.graph_signature.inputs_to_parameters.values())
        taken: collections.Counter[str] = collections.Counter()
        groups = []
        for axis, reached in slots.items():
            kind = facts.kind(axis)
            stem = _stem(program, reached, parameters, kind)
            taken[f"{stem}:{kind}"] += 1
            count = taken[f"{stem}:{kind}"]
            name = f"{stem}:{kind}" + (f"#{count}" if count > 1 else "")
            group = PruneGroup(
                name=name,
                kind=kind,
                size=axis.size,
                axis=axis,
                slots=tuple(reached),
                exact=axis not in facts.statistics,
                nodes=tuple(dict.fromkeys(facts.contracted.get(axis, ()))),
                frozen=facts.why_frozen(axis, reached, parameters) or self._user_freeze(name, reached),
                uses=uses.get(axis, ()),
                ordered=axis in facts.rotated,
                basis="data" if axis in facts.rotated and kind is Kind.WIDTH else "",
            )
            branch = self.layers and group.kind in LAYERED and facts.joins(axis)
            groups.append(self._limit(group, facts.closes(axis) and (self.allow_empty or branch)))
        self._check_freeze([*(g.name for g in groups), *program.tensors])
        if self.inherit:
            return with_macs(program.but(groups=_inherit_limits(program, groups)))
        for option, patterns in (("--align", self.aligns), ("--floor", self.floors)):
            _check_patterns(groups, patterns, option)
        return with_macs(program.but(groups=tuple(groups)))

    def _check_freeze(self, names: list[str]) -> None:
        """A pattern that matches nothing is a typo: what it was meant to protect would be cut."""
        for pattern in self.freeze:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"'{pattern}' matches no group and no parameter",
                    where="--freeze",
                    cure="`fxprune inspect MODEL` lists the names; write a glob such as 'blocks.0.*'",
                )

    def _user_freeze(self, name: str, slots: list[Slot]) -> str:
        names = [name, *(s.parameter for s in slots)]
        hit = next((p for p in self.freeze if any(fnmatch.fnmatchcase(n, p) for n in names)), None)
        return f"asked to freeze '{hit}'" if hit else ""

    def _limit(self, group: PruneGroup, may_vanish: bool) -> PruneGroup:
        """Granularity and floor: whole heads one by one, neurons and channels in aligned steps, or as patterns say."""
        asked_align, asked_floor = (
            _find_number(group, self.aligns, "--align"),
            _find_number(group, self.floors, "--floor"),
        )
        if group.kind in KEEP_WHOLE and asked_align is None and asked_floor is None:
            return group.but(floor=0 if may_vanish else 1)
        common = self.align if self.align is not None else ALIGN
        align = int(asked_align) if asked_align is not None else 1 if group.kind in KEEP_WHOLE else common
        step = align if group.size >= 2 * align else 1
        if asked_floor is not None:
            share, may_vanish = math.ceil(group.size * asked_floor - 1e-9), may_vanish and asked_floor == 0
        else:
            usual = FLOOR if self.floor is None else self.floor
            share = 1 if group.kind in KEEP_WHOLE else round(group.size * usual)
        floor = 0 if may_vanish else min(group.size, -(-max(1, share) // step) * step)
        strict = asked_align is not None or self.align is not None
        asked = asked_floor is not None or self.floor is not None or group.kind in KEEP_WHOLE
        return group.but(granularity=step, floor=floor, strict=strict, least=None if asked else min(floor, step))


def _inherit_limits(program: Program, groups: Iterable[PruneGroup]) -> tuple[PruneGroup, ...]:
    """The groups under the limits of the whole program's. Raises OptionError where no round has started."""
    if program.whole is None:
        raise OptionError(
            "there are no limits to inherit",
            where="find-groups{inherit=true}",
            why="no round has started",
            cure="put start-round before it, or leave inherit away",
        )
    whole = program.whole.group_by_name
    found = tuple(
        g.but(
            floor=min(whole[g.name].floor, g.size),
            granularity=whole[g.name].granularity,
            strict=whole[g.name].strict,
            ordered=whole[g.name].ordered,
            basis=whole[g.name].basis,
            least=whole[g.name].least,
            frozen=g.frozen or whole[g.name].frozen,
        )
        if g.name in whole
        else g.but(frozen=g.frozen or "it appeared only after a round of pruning")
        for g in groups
    )
    left = {g.name: g for g in found}
    ties = [t for t in whole.values() if isinstance(t, Tie) and left.keys() >= set(t.members)]
    return (*found, *(t.over([left[name] for name in t.members]) for t in ties))


def is_named_by(group: PruneGroup, pattern: str) -> bool:
    """Whether ``pattern`` names ``group``: its name, a module above it, or its kind. Parameters would not do: those of
    a feed-forward layer also belong to the residual stream."""
    if pattern.removesuffix("s") == str(group.kind) or pattern == str(group.kind):
        return True
    names = {group.name, group.name.replace(":", ".")}
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in (pattern, f"{pattern}.*"))


def _number(text: str, option: str) -> float:
    try:
        return float(text.rpartition("=")[2])
    except ValueError:
        raise OptionError(f"'{text}' cannot be read", where=option, cure="write PATTERN=NUMBER") from None


def _find_number(group: PruneGroup, patterns: tuple[str, ...], option: str) -> float | None:
    """The number of the last pattern that names the group."""
    found = [_number(one, option) for one in patterns if is_named_by(group, one.rpartition("=")[0])]
    return found[-1] if found else None


def _check_patterns(groups: Iterable[PruneGroup], patterns: tuple[str, ...], option: str) -> None:
    """A pattern that names no group that may be cut is a typo, or says nothing."""
    live = [g for g in groups if g.prunable]
    for one in patterns:
        pattern = one.rpartition("=")[0]
        if not any(is_named_by(g, pattern) for g in live):
            raise OptionError(
                f"'{pattern}' names no group that may be cut",
                where=f"{option} {one}",
                cure="`fxprune inspect MODEL` lists the names; write a glob such as 'blocks.*.mlp', or "
                "a kind such as ffn",
            )


class _Facts:
    """The walk's facts, resolved to leaf axes now that everything is refined."""

    def __init__(self, program: Program) -> None:
        self.axes: Axes = program.need("axes")
        axes = self.axes
        self.contracted: dict[Axis, list[str]] = collections.defaultdict(list)
        for c in axes.contractions:
            for axis in leaves(c.dim):
                self.contracted[axis].append(c.node)
        self.statistics = {a for s in axes.statistics for a in leaves(s.dim)}
        self.rotated = {
            axis
            for norm in row_norms(program.graph)
            if norm.width is not None and isinstance(axes.dims.get(norm.source.name), list)
            for axis in leaves(axes.dims[norm.source.name][-1])
        }
        self.frozen: dict[Axis, str] = {}
        for f in axes.frozen:
            for axis in leaves(f.dim):
                self.frozen.setdefault(axis, f"{f.why} at {f.node}")
        self.tagged = {k: {a for d, _ in facts for a in leaves(d)} for k, facts in axes.tags.items()}
        self.producers: dict[Axis, set[str]] = collections.defaultdict(set)
        for dim, node in axes.tags.get("produce", ()):
            for axis in leaves(dim):
                self.producers[axis].add(node)
        self.head, self.query_key, self.value = self._attention()
        self.paired = self._find_paired_repeats()
        self.streams = residual_streams(program)
        self.ends = branch_ends(program)

    def closes(self, axis: Axis) -> bool:
        """True where nothing but linear layers sums over the axis: without it they still give their bias."""
        linear = {m.node for m in self.axes.matmuls if m.form == "linear"}
        return bool(self.contracted[axis]) and set(self.contracted[axis]) <= linear and axis not in self.statistics

    def joins(self, axis: Axis) -> bool:
        """True where what sums over the axis is added to a residual stream: the stream goes on without it."""
        return axis in self.contracted and set(self.contracted[axis]) <= self.ends

    def has(self, tag: str, axis: Axis) -> bool:
        return axis in self.tagged.get(tag, ())

    def _attention(self) -> tuple[set[Axis], set[Axis], set[Axis]]:
        """Read heads off the products around a softmax: k over keys is attention x V, n (or m) over keys is Q x K."""
        soft = {a for dim, _ in self.axes.tags.get("softmax", ()) for a in _marks(dim)}
        head, query_key, value, keys = set[Axis](), set[Axis](), set[Axis](), set[Axis]()
        for product in self.axes.matmuls:
            if product.form != "matmul":
                continue
            batch = {a for d in product.batch for a in leaves(d)}
            if inner := soft & _marks(product.k):
                head |= batch
                value |= set(leaves(product.n))
                keys |= inner
            elif outer := soft & (_marks(product.n) | _marks(product.m)):
                head |= batch
                query_key |= set(leaves(product.k))
                keys |= outer
        talking = self._beside(keys) - query_key - value
        return (head | talking) - soft, query_key, value

    def _beside(self, keys: set[Axis]) -> set[Axis]:
        """Heads that no product shows: what else a softmax sees, where a weight sums over it later.

        Over attention keys that weight mixes the heads (talking heads). Over something else (points of a deformable
        attention) heads are a factor of what the projection sums over; the branches of a selective kernel are weighed
        per channel, and channels are no heads.
        """
        over = {node: _marks(dim) for dim, node in self.axes.tags.get("softmax", ())}
        weighted = [m for m in self.axes.matmuls if m.form != "matmul"]
        mixed = {a for m in weighted for a in leaves(m.k)}
        factor = {a for m in weighted if m.form == "linear" and len(atoms(m.k)) > 1 for a in leaves(m.k)}
        return {
            axis
            for dim, node in self.axes.tags.get("softmax-beside", ())
            for axis in leaves(dim)
            if axis in (mixed if over[node] & keys else factor)
        }

    def _find_paired_repeats(self) -> set[Axis]:
        """Heads that share a dim with a repeated axis: KV groups and the queries inside them (GQA).

        The batch does not count: it may be folded with the heads, and a class token is repeated over it.
        """
        paired: set[Axis] = set()
        heads = {a for a in self.head if a not in self.frozen}
        repeats = self.tagged.get("repeat", set()) & heads
        for dims in self.axes.dims.values() if repeats else ():
            for dim in _each_dim(dims):
                here = set(leaves(dim)) & heads
                if here & repeats and here - repeats:
                    paired |= here
        return paired

    def kind(self, axis: Axis) -> Kind:
        if self.has("expert", axis):
            return Kind.EXPERT
        stream = axis in self.streams  # whatever one reader views it as
        if axis in self.head and not stream:
            if axis in self.paired:
                return Kind.QUERY if self.has("repeat", axis) else Kind.KV
            return Kind.HEAD
        if (axis in self.query_key or axis in self.value) and not stream:
            both = axis in self.query_key and axis in self.value
            return Kind.QKV if both else Kind.QK if axis in self.query_key else Kind.V
        if axis in self.statistics or axis in self.rotated:
            return Kind.WIDTH
        if self.has("conv", axis) or (self.has("depthwise", axis) and not self._between_linears(axis)):
            return Kind.CHANNEL
        if axis in self.producers and axis in self.contracted:
            # a residual stream without norms has as many producers as blocks; a hidden layer has one or two (gated)
            return Kind.WIDTH if stream or len(self.producers[axis]) > 4 else Kind.FFN
        return Kind.OTHER

    def _between_linears(self, axis: Axis) -> bool:
        """Whether nothing but linear layers makes and sums the elements, depthwise convolutions aside: the neurons of
        a feed-forward that looks at its neighbours (Mix-FFN)."""
        aside = {node for _, node in self.axes.tags["depthwise"]}
        linear = {m.node for m in self.axes.matmuls if m.form == "linear"}
        found = ({*self.producers.get(axis, ()), *self.contracted[axis]}) - aside
        return bool(found) and found <= linear

    def why_frozen(self, axis: Axis, slots: list[Slot], parameters: set[str]) -> str:
        if axis in self.frozen:
            return self.frozen[axis]
        if axis.size > OPEN and real_size(axis.size, self.axes.sizes) != axis.size:
            return "symbolic size"
        if axis not in self.producers and not all(s.parameter in parameters for s in slots):
            return "a constant: no op produces it"
        if axis not in self.contracted and axis not in self.statistics:
            return "nothing sums over it: removing an element would not equal masking it"
        return ""


def _marks(dim: Dim) -> set[Axis]:
    """What tells a dim from others: its leaves, and sums as a whole, for positions that strided slices took apart one
    by one (Swin's downsampling, where windows are a power of two) have no leaves left."""
    return {*leaves(dim), *atoms(dim)}


def _each_dim(dims: object) -> Iterable[Dim]:
    if isinstance(dims, tuple):
        yield dims
    elif isinstance(dims, list):
        for d in dims:
            yield from _each_dim(d)


def _slots(program: Program, axes: Axes) -> dict[Axis, list[Slot]]:
    """Leaf axis -> the parameter and buffer dimensions it reaches, both in graph order. Unused tensors do not count."""
    found: dict[Axis, list[Slot]] = {}
    bound = program.tensor_of_placeholder
    for node in program.placeholders():
        if node.name not in bound or not node.users:
            continue
        for position, dim in enumerate(axes.dims[node.name] or ()):
            for axis in dict.fromkeys(leaves(dim)):
                found.setdefault(axis, []).append(Slot(bound[node.name], position, dim))
    return found


def _stem(program: Program, slots: list[Slot], parameters: set[str], kind: Kind) -> str:
    """The module that best names a group: the first weight whose rows are its elements, else the first slot.

    Heads reach bias networks and tables as well; their largest weight is the projection that people know them by.
    """
    order = [s for s in slots if s.parameter in parameters] or slots
    rows = [s for s in order if s.position == 0 and s.parameter.endswith("weight")] or order
    tensors = program.tensors
    best = max(rows, key=lambda s: tensors[s.parameter].numel()) if kind in KEEP_WHOLE else rows[0]
    return best.parameter.rpartition(".")[0] or best.parameter
