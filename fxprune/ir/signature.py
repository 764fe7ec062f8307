"""What a program takes and returns: names, open sizes, and inputs drawn to fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .axes import Axes
from .axis import Axis, Dim, atoms, total
from .fake_run import collect_size_conditions
from .guards import holds, other_side
from .open_sizes import shape_env_of
from .program import Program

if TYPE_CHECKING:
    import sympy

Sizes = Mapping[str, int]


def output_names(exported: ExportedProgram) -> list[str]:
    """A name per output tensor: its key for dicts (``logits``), ``output`` if alone, else ``output_0``...

    Unique, and different from every input's name. Outputs that are no tensor (None, a number) have no name.
    """
    spec = exported.call_spec.out_spec
    outputs = [n.meta.get("val") if isinstance(n, torch.fx.Node) else n for n in _output_nodes(exported)]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    taken, names = set(exported.graph_signature.user_inputs), []
    for (path, _leaf), value in zip(paths, outputs, strict=True):
        if not isinstance(value, Tensor):
            continue
        words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        if not words or words[0].isdigit():
            words.insert(0, "output")
        name = "_".join(words)
        while name in taken:
            name += "_out"
        taken.add(name)
        names.append(name)
    return names


def _output_nodes(exported: ExportedProgram) -> list[Any]:
    """What the graph returns to the user, in order (buffer updates come before and are not the user's)."""
    returned = list(exported.graph.output_node().args[0])
    return returned[len(returned) - exported.call_spec.out_spec.num_leaves :]


def dim_names(program: Program) -> dict[str, str]:
    """Symbol -> a word for people and for ONNX: ``batch``, ``sequence``, else the input's name and the position."""
    names: dict[str, str] = {}
    for name, value in zip(program.user_inputs, input_values(program), strict=True):
        for position, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol or str(size.node.expr) in names:
                continue
            counts = position == 1 and not value.is_floating_point()
            word = "batch" if position == 0 else "sequence" if counts else f"{name}_{position}"
            if word in names.values():
                word = f"{name}_{word}"
            names[str(size.node.expr)] = word
    return names


def sizes_to_try(program: Program) -> list[dict[str, int]]:
    """Values for the symbolic sizes: the example's, batch 1, batch + 1, another length for what is no batch, and sizes
    on the other side of those at which torch takes other kernels.

    Keys are symbols as in the graph (``s77``); an empty dict stands for a program without symbolic sizes.
    """
    hints, batch, _ = _symbols(program)
    trials = [dict(hints)]
    if batch:
        trials.append({**hints, **{s: 1 for s in batch}})
        trials.append({**hints, **{s: hints[s] + 1 for s in batch}})
    if len(hints) > len(batch):
        trials.append(all_other(program))
    for condition in collect_size_conditions(program.graph).values():
        symbol = str(next(iter(condition.free_symbols), ""))
        size = other_side(condition, hints[symbol]) if symbol in hints else None
        if size is not None:
            trials.append({**hints, **{s: size for s in ([symbol] if symbol not in batch else batch)}})
    return [t for i, t in enumerate(trials) if t not in trials[:i]]


def all_other(program: Program) -> dict[str, int]:
    """Values for the symbolic sizes of which none is the example's, that meet what the program demands of them.

    Batches grow by one sample. Other sizes shrink where they may: shorter is always inside what a position table
    holds, and an odd count finds a constant that was baked in.
    """
    hints, batch, upper = _symbols(program)
    more = {s: hints[s] + 1 for s in batch}
    trials = [
        {**hints, **more, **{s: min(upper[s], way(n)) for s, n in hints.items() if s not in batch}} for way in _WAYS
    ]
    fit = [t for t in trials if min(t.values(), default=1) > 0 and find_refusal(program, t) is None]
    return (fit or trials)[0]


_WAYS: tuple[Callable[[int], int], ...] = (
    lambda n: max(2, n // 2 + 1),
    lambda n: n - 1,
    lambda n: n + 1,
    lambda n: n // 2,
    lambda n: 2 * n,
)


def input_sizes(program: Program) -> dict[str, int]:
    """The symbolic sizes of the user inputs, and what they are in the example."""
    return _symbols(program)[0]


def find_stuck(program: Program) -> dict[str, sympy.Basic]:
    """Symbols that can have the example's size only, alone and together with all others that are no batches, each with
    a condition that says so. Sizes are tried, not solved for."""
    hints, batch, upper = _symbols(program)
    others = {s: n for s, n in hints.items() if s not in batch}
    found: dict[str, sympy.Basic] = {}
    for symbol, size in others.items():
        trials = [{**hints, symbol: way(size)} for way in _WAYS]
        trials += [{**hints, **{s: way(n) for s, n in others.items()}} for way in _WAYS]
        trials = [t for t in trials if t[symbol] != size and all(0 < n <= upper[s] for s, n in t.items())]
        refused = [find_refusal(program, trial) for trial in trials]
        if refused and all(condition is not None and _names(condition, symbol) for condition in refused):
            found[symbol] = next(c for c in refused if c is not None)
    return found


def _names(condition: sympy.Basic, symbol: str) -> bool:
    return any(str(s) == symbol for s in condition.free_symbols)


def find_refusal(program: Program, sizes: Sizes) -> sympy.Basic | None:
    """A condition that torch found while it traced the program, and that ``sizes`` (by symbol) do not meet."""
    env = shape_env_of(program.exported)
    if env is None:
        return None
    known = {s: sizes[str(s)] for s in env.var_to_range if str(s) in sizes}
    conditions = (env.simplify(guard.expr) for guard in env.guards)
    return next((c for c in conditions if holds(c, known) is False), None)


def size_ranges(program: Program) -> dict[str, tuple[int, int, int]]:
    """Symbol -> (least legal size, the example's, largest legal size; 2**31 and more where nothing bounds it).

    torch captures no batch of 1 as such: a lower bound of 2 that only says so counts as 1, as verification tries it.
    """
    hints, _, upper = _symbols(program)
    bounds = {str(k): v for k, v in program.exported.range_constraints.items()}
    lower = {
        s: int(bounds[s].lower) if s in bounds and getattr(bounds[s].lower, "is_Integer", False) else 1 for s in hints
    }
    return {s: (1 if lower[s] <= 2 else lower[s], hint, upper[s]) for s, hint in hints.items()}


def _symbols(program: Program) -> tuple[dict[str, int], set[str], dict[str, int]]:
    """(symbol -> its size in the example, symbols that stand in a dimension 0, symbol -> its largest legal value)."""
    hints: dict[str, int] = {}
    batch: set[str] = set()
    examples = pytree.tree_leaves(program.example_inputs)
    for value, example in zip(input_values(program), examples, strict=True):
        if not isinstance(value, Tensor):
            continue
        for position, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbol = str(size.node.expr)
                hints.setdefault(symbol, int(example.shape[position]))
                if position == 0:
                    batch.add(symbol)
    ranges = {str(k): v for k, v in program.exported.range_constraints.items()}
    upper = {}
    for symbol in hints:
        limit = ranges[symbol].upper if symbol in ranges else math.inf
        upper[symbol] = int(limit) if getattr(limit, "is_Integer", False) else 2**31
    return hints, batch, upper


def input_values(program: Program) -> list[Any]:
    """What the graph knows of each user input: a fake tensor with symbolic sizes, or a constant."""
    wanted = set(program.user_inputs)
    return [n.meta.get("val") for n in program.placeholders() if n.name in wanted]


def describe_inputs(program: Program) -> list[dict[str, Any]]:
    """Name, dtype and shape (open sizes as words) of every user input tensor, for reports."""
    words = dim_names(program)
    return [
        {
            "name": name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [s if isinstance(s, int) else words.get(str(s), str(s)) for s in value.shape],
        }
        for name, value in zip(program.user_inputs, input_values(program), strict=True)
        if isinstance(value, Tensor)
    ]


DRAWS = ("rows", "rows, cut in front", "the example")
"""How inputs are drawn, from the most to the least: see :func:`sample_inputs`."""


def sample_inputs(program: Program, sizes: Sizes | None = None, seed: int = 0, draw: str = DRAWS[0]) -> list[Any]:
    """User inputs, flat, like the example's but of other ``sizes`` (symbol -> size) and with seeded values.

    draw   ``rows``: finite floating tensors are normal with the example's mean and deviation; of all others whole rows
           of the example are taken, in an order that inputs of one batch size share: ids may be tied to pictures or to
           each other (so many image tokens, one end of text a row), and masks to ids. A shorter row loses its end.
           ``rows, cut in front``: it loses its beginning. ``the example``: its rows in their order, floats as well

    Non-tensors are the example's.
    """
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, Tensor] = {}
    flat = []
    for value, example in zip(input_values(program), pytree.tree_leaves(program.example_inputs), strict=True):
        if not isinstance(example, Tensor):
            flat.append(example)
            continue
        shape = [size_at(s, sizes or {}, int(example.shape[i])) for i, s in enumerate(value.shape)]
        source = example.detach().cpu()
        if draw != DRAWS[2] and source.is_floating_point() and bool(source.isfinite().all()):
            flat.append(_normal_like(source, shape, generator).to(example.device))
            continue
        count = source.shape[0] if source.dim() else 1
        if count not in orders:
            kept = draw == DRAWS[2]
            orders[count] = torch.arange(count) if kept else torch.randperm(count, generator=generator)
        flat.append(_rows_of(source, shape, orders[count], in_front=draw == DRAWS[1]).to(example.device))
    return flat


def _normal_like(source: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    wide = source.double()
    deviation, mean = (float(wide.std(correction=0)), float(wide.mean())) if wide.numel() else (0.0, 0.0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * (deviation or 1.0) + mean
    return drawn.to(source.dtype)


def _rows_of(source: Tensor, shape: Sequence[int], order: Tensor, *, in_front: bool) -> Tensor:
    """Rows of ``source`` in ``order``, again and again, cut to ``shape`` or repeated to it. [*shape]"""
    if not source.numel():
        return torch.zeros(shape, dtype=source.dtype)
    for position, size in enumerate(shape):
        have = source.shape[position]
        index = order[torch.arange(size) % have] if position == 0 else torch.arange(size) % have
        if in_front and position > 0 and size < have:
            index = index + (have - size)
        source = source.index_select(position, index)
    return source


def size_at(size: int | torch.SymInt, sizes: Sizes, otherwise: int) -> int:
    """A size where its symbols have these ``sizes``; ``otherwise`` where one of them is not said."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    return int(expression.subs(known)) if len(known) == len(expression.free_symbols) else otherwise


def samples_in(flat: Iterable[Any]) -> int:
    """How many samples user inputs hold: the first dimension of the first tensor that has one; 1 where none has.

    >>> samples_in([None, torch.zeros(()), torch.zeros(4, 2)])
    4
    """
    return next((len(t) for t in flat if isinstance(t, Tensor) and t.dim()), 1)


def padding_mask(program: Program, flat: Sequence[Any]) -> Tensor | None:
    """[batch, positions], True where a token is real, from the integer or bool input called ``..mask``, if any."""
    for name, value in zip(program.user_inputs, flat, strict=True):
        if name.endswith("mask") and isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value != 0
    return None


def batch_axes(program: Program) -> set[Axis]:
    """The axes that number samples: dimension 0 of the first tensor input, and of inputs of the same length."""
    axes: Axes = program.need("axes")
    first: list[Dim] = [axes.dims[name][0] for name in program.user_inputs if axes.dims.get(name)]
    return {atoms(dim)[0] for dim in first if len(atoms(dim)) == 1 and total(dim) == total(first[0])}
