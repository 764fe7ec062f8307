"""What a plan costs: a polynomial in the sizes of axes, evaluated without touching the graph.

FLOPs here are multiply-accumulates (MACs) of one sample, as in the papers. Counted: linear, matmul, einsum, convolution
and the two products of attention. Not counted: norms, softmax, activations, biases, embeddings, element-wise work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import OptionError
from .axes import Axes
from .axis import Axis, Dim, atoms, real_size, total
from .group import PruneGroup, Switch
from .program import Program

METRICS = ("flops", "params", "bytes")
COUNTED = "multiply-accumulates per sample of linear, matmul, einsum, convolution and attention; nothing else"
Kept = Mapping[Axis, int]
Sizes = Mapping[int, int] | Mapping[int, int | Fraction]


@dataclass(frozen=True)
class Cost:
    """flops in MACs of one sample (other open sizes as in the example), params as element count of parameters, bytes of
    parameters and buffers."""

    flops: int
    params: int
    bytes: int

    def metric(self, name: str) -> int:
        return int(getattr(self, name))


@dataclass(frozen=True)
class Budget:
    """An upper bound on one metric: ``amount`` is a ratio of the dense cost when ``relative``, else absolute.

    The metric ``latency`` is known to cost models that hold a measured table; its amounts are in milliseconds.
    """

    metric: str
    amount: float
    relative: bool = True

    @staticmethod
    def of_latency(value: str | float | int, ms: bool = False) -> Budget:
        """A share of the dense latency, or milliseconds."""
        where = f"--latency{'-ms' if ms else ''} {value}"
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise OptionError(
                f"'{value}' is no latency", where=where, cure="write `--latency 0.6` or `--latency-ms 12`"
            )
        if number > 1 and not ms:
            raise OptionError(
                "a budget ratio is at most 1", where=where, cure=f"for milliseconds: `--latency-ms {value}`"
            )
        return Budget("latency", number, relative=not ms)

    @staticmethod
    def parse(metric: str, value: str | float | int) -> Budget:
        """``0.5`` is a ratio; ``2.3G``, ``800M``, ``64KiB`` or a number of 1000 and more is absolute."""
        if metric not in METRICS:
            from ..errors import nearest

            raise OptionError(f"unknown budget '{metric}'", cure=nearest(metric, METRICS))
        units = {
            "": 1,
            "k": 1e3,
            "m": 1e6,
            "g": 1e9,
            "t": 1e12,
            "kib": 2**10,
            "mib": 2**20,
            "gib": 2**30,
            "kb": 1e3,
            "mb": 1e6,
            "gb": 1e9,
        }
        text = str(value).strip().lower().replace("_", "")
        digits = text.rstrip("abcdfghijklmnopqrstuvwxyz")  # no e: 1.5e9 is a number
        unit = text[len(digits) :]
        where = f"--{metric} {value}"
        try:
            number = float(digits)
        except ValueError:
            raise OptionError(
                f"'{value}' is not a budget", where=where, cure="write a ratio such as 0.5, or an amount such as 2.3G"
            ) from None
        if unit not in units or not math.isfinite(number):
            raise OptionError(
                f"'{value}' is not a budget", where=where, cure=f"units: {', '.join(filter(None, units))}"
            )
        if number <= 0:
            raise OptionError("a budget must be positive", where=where, cure="write a ratio such as 0.5")
        if unit or number >= 1000:
            return Budget(metric, number * units[unit], relative=False)
        if number > 1:
            raise OptionError(
                "a budget ratio is at most 1",
                where=where,
                why="a ratio is the share of the dense cost that stays",
                cure=f"write 0.5 for half, or an absolute amount with a unit, e.g. --{metric} 2.3G",
            )
        return Budget(metric, number)

    def limit(self, dense: Cost) -> float:
        """The bound in units of the metric; of latency these are nanoseconds."""
        absolute = self.amount * 1e6 if self.metric == "latency" else self.amount
        return self.amount * dense.metric(self.metric) if self.relative else absolute

    def __str__(self) -> str:
        """``flops=0.5``: the text that :meth:`parse` reads as this very budget, ``latency=12ms``."""
        short = f"{self.amount:g}"
        text = short if float(short) == self.amount else repr(self.amount)
        if self.metric == "latency":
            return f"latency={text}{'ms' * (not self.relative)}"
        if not self.relative and self.amount < 1000:  # a bare number below 1000 would be read as a ratio
            text = f"{self.amount / 1000!r}k"
        return f"{self.metric}={text}"


@dataclass(frozen=True)
class Expression:
    """``constant * product(variables) * product(sums)``: a dim, or a product of dims, ready to evaluate.

    The constant is a Fraction where a sample has a share of something (a frame, of the products for its whole clip).
    """

    constant: int
    variables: tuple[Axis, ...] = ()
    sums: tuple[tuple[Expression, ...], ...] = ()

    def __call__(self, kept: Kept) -> int:
        value = self.constant
        for axis in self.variables:
            value *= kept.get(axis, axis.size)
        for terms in self.sums:
            value *= sum(term(kept) for term in terms)
        return value

    def at(self, counts: Kept) -> Expression:
        """With these axes at fixed counts: free in the others alone."""
        constant = math.prod((counts[a] for a in self.variables if a in counts), start=self.constant)
        sums = []
        for terms in self.sums:
            bound = tuple(t.at(counts) for t in terms)
            if any(t.axes() for t in bound):
                sums.append(bound)
            else:
                constant *= sum(t.constant for t in bound)
        return Expression(constant, tuple(a for a in self.variables if a not in counts), tuple(sums))

    def times(self, axes: Iterable[Axis]) -> Expression:
        """The product with these axes."""
        more = tuple(axes)
        return Expression(self.constant, (*self.variables, *more), self.sums) if more else self

    def axes(self) -> set[Axis]:
        return set(self.variables).union(*(t.axes() for terms in self.sums for t in terms))


def expression(dim: Dim, free: set[Axis], sizes: Sizes) -> Expression:
    """``dim``'s total as a function of the ``free`` axes; all others at their size, open ones at that in ``sizes``."""
    constant: Any = 1  # a Fraction in between, and at the end where it has to be
    variables, sums = [], []
    for axis in atoms(dim):
        terms = tuple(expression(s, free, sizes) for s in axis.segments or ())
        if axis in free:
            variables.append(axis)
        elif any(t.axes() for t in terms):
            sums.append(terms)
        else:
            constant *= real_size(axis.size, sizes) if axis.segments is None else sum(t.constant for t in terms)
    constant = int(constant) if constant == int(constant) else constant
    return Expression(constant, tuple(variables), tuple(sums))


class CostModel:
    """Counts kept -> :class:`Cost`. Free variables are the axes of the prunable groups, and those in ``also``.

    ``terms`` maps each metric to its expressions; a metric's value is their sum. What lies inside a part that may go
    (:class:`~fxprune.ir.group.Switch`) is multiplied by whether it is there.
    """

    def __init__(self, program: Program, axes: Axes | None = None, also: Iterable[Axis] = ()) -> None:
        axes = axes or program.need("axes")
        self.free = {g.axis for g in program.groups or () if not g.frozen} | set(also)
        sizes, free = _per_sample(program, axes), self.free
        inside: dict[str, list[Axis]] = {}
        for part in program.groups or ():
            for node in part.inside if isinstance(part, Switch) and not part.frozen else ():
                inside.setdefault(node, []).append(part.axis)
        macs = [expression(m.factors, free, sizes).times(inside.get(m.node, ())) for m in axes.matmuls]
        params, size_bytes, seen = [], [], set()
        parameters = program.exported.graph_signature.inputs_to_parameters
        tensors = program.tensors
        for placeholder, name in program.tensor_of_placeholder.items():
            tensor, dims = tensors[name], axes.dims.get(placeholder)
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            if dims is None or key in seen:
                continue
            seen.add(key)
            one = expression(tuple(a for d in dims for a in d), free, sizes).times(inside.get(placeholder, ()))
            if placeholder in parameters:
                params.append(one)
            size_bytes.append(Expression(one.constant * tensor.element_size(), one.variables, one.sums))
        self.terms: dict[str, list[Expression]] = {"flops": macs, "params": params, "bytes": size_bytes}

    def __call__(self, kept: Kept | None = None) -> Cost:
        return Cost(**{m: math.ceil(sum(t(kept or {}) for t in terms)) for m, terms in self.terms.items()})

    def ledger(self, metric: str, kept: Kept) -> Ledger:
        return Ledger(self.terms[metric], kept)

    def separable(self, metric: str, axes: Sequence[Axis]) -> bool:
        """True when the metric is a constant plus one linear term per axis of ``axes`` (no products between them)."""
        chosen = set(axes)
        return all(_linear(term, chosen) for term in self.terms[metric])


def _per_sample(program: Program, axes: Axes) -> dict[int, int | Fraction]:
    """Number of a symbolic size -> what one sample has of it: the batch counts 1, and what depends on the batch, or on
    values, counts as its share in the example. A fixed batch counts in full."""
    made = axes.stand_ins
    inputs = (axes.dims.get(name) for name in program.user_inputs)
    first = [size for size in (total(dims[0]) for dims in inputs if dims) if made.symbols(size)]
    samples = {symbol: real_size(size, axes.sizes) for size in reversed(first) for symbol in made.symbols(size)}
    if first:
        samples.update(dict.fromkeys(made.of_values, real_size(first[0], axes.sizes)))
    shares: dict[int, int | Fraction] = {}
    for number, size in axes.sizes.items():
        batch = next((samples[symbol] for symbol in sorted(made.symbols(number)) if symbol in samples), 1)
        shares[number] = Fraction(size, batch) if size % batch else size // batch
    return shares


def _linear(term: Expression, chosen: set[Axis]) -> bool:
    """Degree at most one in the chosen axes together."""

    def degree(e: Expression) -> int:
        return sum(a in chosen for a in e.variables) + sum(max(map(degree, terms), default=0) for terms in e.sums)

    return degree(term) <= 1


class Ledger:
    """A running total of one metric that can ask what a change would cost without re-adding everything."""

    def __init__(self, terms: Sequence[Expression], kept: Kept) -> None:
        self.kept = dict(kept)
        self.terms = list(terms)
        self.values = [t(self.kept) for t in self.terms]
        self.total = sum(self.values)
        self.users: dict[Axis, list[int]] = {}
        for i, term in enumerate(self.terms):
            for axis in term.axes():
                self.users.setdefault(axis, []).append(i)

    def change(self, axis: Axis, count: int) -> int:
        """Cost difference if ``axis`` held ``count`` elements."""
        trial = _Patched(self.kept, axis, count)
        return sum(self.terms[i](trial) - self.values[i] for i in self.users.get(axis, ()))

    def set(self, axis: Axis, count: int) -> None:
        self.kept[axis] = count
        for i in self.users.get(axis, ()):
            value = self.terms[i](self.kept)
            self.total += value - self.values[i]
            self.values[i] = value

    def changes(self, sizes: Kept) -> int:
        """Cost difference if these axes held so many elements, all at once."""
        if len(sizes) == 1:
            return self.change(*next(iter(sizes.items())))
        trial = {**self.kept, **sizes}
        touched = {i for axis in sizes for i in self.users.get(axis, ())}
        return sum(self.terms[i](trial) - self.values[i] for i in touched)


class _Patched(dict[Axis, int]):
    """A view of ``kept`` with one count replaced; cheaper than copying the whole mapping per question."""

    def __init__(self, kept: Kept, axis: Axis, count: int) -> None:
        super().__init__()
        self._kept, self._axis, self._count = kept, axis, count

    def get(self, axis: Axis, default: int = 0) -> int:  # type: ignore[override]
        return self._count if axis is self._axis else self._kept.get(axis, default)


def with_macs(program: Program) -> Program:
    """The program with what one element of each group costs filled in: the dense MACs minus those with one less."""
    ledger = CostModel(program).ledger("flops", {})
    groups: Sequence[PruneGroup] = program.need("groups")
    return program.but(
        groups=tuple(g if g.frozen else g.but(macs=-ledger.changes(g.sizes(g.size - 1))) for g in groups)
    )
