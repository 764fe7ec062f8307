"""Does a lowered program compute what the graph computes? Seeded inputs, several sizes, worst difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import VerifyError
from ..ir.agreement import TOLERANCE, compare, find_bounded_outputs, relative_error, seeded, tolerance_of, why_random
from ..ir.double import exactly, within_rounding
from ..ir.program import Program
from ..ir.signature import DRAWS, Sizes, dim_names, output_names, sample_inputs, sizes_to_try
from ..ir.writes import find_written_inputs

Runner = Callable[[Sequence[Any]], list[Any]]
"""User inputs flat and in graph order (tensors, numbers, None) -> output tensors flat and in order."""

NUDGE = 2e-5
"""How far inputs are moved, relative, to see where a program jumps: some ten times what kernels differ by in fp32."""
NUDGES, ATTEMPTS = 6, 4


@dataclass(frozen=True)
class Parity:
    """The largest differences over all outputs and all sizes tried.

    max_abs    in units of the output
    max_rel    max |got - want| / max |want|, per output; the worst of them
    tolerance  on ``max_rel``; integer and boolean outputs must be equal
    tried      the symbolic sizes of each run, e.g. ``({"batch": 2}, {"batch": 1})``; the example's come first
    skipped    (sizes, why) where the program itself refused to run, which says nothing about the backend
    unsteady   samples left out, because the program itself jumps there when its inputs move by a rounding error
    constant   outputs that were the same for all inputs tried (a head of zeros): their comparison shows little
    rounded    the largest difference beyond ``tolerance`` that is rounding: the program itself is as far from what fp64
               gives
    """

    max_abs: float
    max_rel: float
    tolerance: float
    tried: tuple[Sizes, ...]
    skipped: tuple[tuple[Sizes, str], ...] = ()
    unsteady: int = 0
    constant: tuple[str, ...] = ()
    rounded: float = 0.0

    @property
    def ok(self) -> bool:
        return self.max_rel <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "tolerance": self.tolerance,
            "ok": self.ok,
            "tried": [dict(s) for s in self.tried],
            "skipped": [{"sizes": dict(s), "why": why} for s, why in self.skipped],
            "unsteady": self.unsteady,
            "constant": list(self.constant),
            **({"rounded": self.rounded} if self.rounded else {}),
        }


def eager(exported: ExportedProgram) -> Runner:
    """``exported`` itself as a runner, without gradients; what it writes into is put back after every run."""
    module, spec = exported.module(), exported.call_spec.in_spec
    written = bool(find_written_inputs(exported.graph))
    state = [*module.parameters(), *module.buffers(), *exported.constants.values()] if written else []

    def run(flat: Sequence[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(
            [v.clone() if written and isinstance(v, Tensor) else v for v in flat], spec
        )
        with torch.no_grad():
            before = [(t, t.clone()) for t in state if isinstance(t, Tensor)]
            made = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]
            made = [t.clone() for t in made] if written else made  # an output may lie where something is put back
            for tensor, value in before:
                tensor.copy_(value)
        return made

    return run


def check_parity(
    program: Program,
    run: Runner,
    *,
    what: str = "the lowered program",
    tolerance: Mapping[torch.dtype, float] = TOLERANCE,
    seed: int = 0,
    cure: str = "",
) -> Parity:
    """Compare ``run`` with the program itself at several sizes.

    Raises VerifyError naming the output, the index and the error where they differ by more than the tolerance.
    """
    reference, names, limit = eager(program.exported), output_names(program.exported), tolerance_of(program, tolerance)
    worst_abs = worst_rel = rounded = 0.0
    unsteady = 0
    tried: list[Sizes] = []
    skipped: list[tuple[Sizes, str]] = []
    seen: dict[str, Tensor | None] = {}
    ends = find_bounded_outputs(program)
    words = dim_names(program)
    random, remedy = why_random(program)
    cure = f"{remedy}: {random}" if random else cure
    for number, symbols in enumerate(sizes_to_try(program)):
        sizes = {words[s]: size for s, size in symbols.items()}
        label = ", ".join(f"{k}={v}" for k, v in sizes.items()) or "the example sizes"
        try:
            flat, want = inputs_that_run(program, reference, symbols, seed + number, seed)
        except Exception as error:
            if number == 0:
                raise VerifyError(
                    "the pruned program does not run on its own example sizes", where=program.name, why=_short(error)
                ) from error
            skipped.append((sizes, _short(error)))
            continue
        got = _run(run, flat, seed, want, what, label, cure)
        try:
            found = [
                compare(
                    one, two, limit, what=what, where=f"output '{name}'", label=label, cure=cure, bounded=name in ends
                )
                for name, one, two in zip(names, got, want, strict=True)
            ]
        except VerifyError as error:
            redone = _where_steady(program, reference, run, symbols, limit, seed + number)
            if redone is None or max(rel for _, rel in redone[0]) > limit:
                if random or not within_rounding(got, want, exactly(program, flat), limit):
                    raise error from None
                rounded = max(rounded, relative_error(got, want))
                continue
            found, unsteady = redone[0], unsteady + redone[1]
        finally:
            tried.append(sizes)
        worst_abs, worst_rel = (max(worst, *(f[i] for f in found)) for i, worst in enumerate((worst_abs, worst_rel)))
        seen = {name: _one_value(value, seen.get(name, value)) for name, value in zip(names, want, strict=True)}
    constant = tuple(name for name, value in seen.items() if value is not None)
    return Parity(worst_abs, worst_rel, limit, tuple(tried), tuple(skipped), unsteady, constant, rounded)


def _run(
    run: Runner, flat: Sequence[Any], seed: int, want: Sequence[Any], what: str, label: str, cure: str
) -> list[Any]:
    """What ``run`` returns, as many outputs as ``want``. Raises VerifyError where it does not."""
    try:
        with seeded(seed):
            got = run(flat)
    except Exception as error:  # whatever the target's runtime raises
        raise VerifyError(f"{what} does not run", where=f"at {label}", why=_short(error), cure=cure) from error
    if len(got) != len(want):
        raise VerifyError(f"{what} returns another number of outputs", why=f"{len(got)}, expected {len(want)}")
    return got


def inputs_that_run(
    program: Program, reference: Runner, sizes: Sizes | None = None, seed: int = 0, random: int = 0
) -> tuple[list[Any], list[Any]]:
    """(user inputs of ``sizes``, what ``reference`` returns there), as :func:`sample_inputs` draws them; where it fails
    on what was drawn, less is drawn, down to the example's own rows. Raises the first failure where all fail.

    seed   of what is drawn;  random: of what ``reference`` itself draws
    """
    failure: Exception | None = None
    for draw in DRAWS:
        flat = sample_inputs(program, sizes, seed, draw)
        try:
            with seeded(random):
                return flat, reference(flat)
        except Exception as error:  # the model's own words
            failure = failure or error
    assert failure is not None
    raise failure


def _one_value(output: Tensor, before: Tensor | None) -> Tensor | None:
    """What an output is for every sample, as it was ``before``; None where samples or runs differ. [1, ..]"""
    if before is None or not output.numel():
        return None
    rows, first = output[None] if not output.dim() else output, before[None] if not before.dim() else before[:1]
    return rows[:1] if rows.shape[1:] == first.shape[1:] and bool((rows == first).all()) else None


def steady(run: Runner, flat: Sequence[Any], want: Sequence[Any], limit: float, seed: int = 0) -> Tensor | None:
    """Which samples to compare: those at which ``run`` does not jump when its inputs move by ``NUDGE``. [n] bool

    Programs that decide (which tokens merge, which expert is asked) are not continuous: where two choices are as good
    as equal, any two kernels may take different ones. None where all samples are steady (a difference is then one), or
    fewer than half are, or outputs do not belong to samples.
    """
    first = next((t for t in flat if isinstance(t, Tensor) and t.dim()), None)
    if first is None or not all(isinstance(w, Tensor) and w.dim() and len(w) == len(first) for w in want):
        return None
    generator = torch.Generator().manual_seed(seed)
    kept = torch.ones(len(first), dtype=torch.bool)
    for _ in range(NUDGES):
        moved = [
            t * (1 + NUDGE * torch.randn(t.shape, generator=generator).to(t))
            if isinstance(t, Tensor) and t.is_floating_point()
            else t
            for t in flat
        ]
        for one, two in zip(run(moved), want, strict=True):
            if two.is_floating_point():
                gap = (
                    (one.double() - two.double()).abs().flatten(1).amax(1)
                    if two.dim() > 1
                    else (one.double() - two.double()).abs()
                )
                kept &= ~(gap.cpu() > limit * float(two.double().abs().max()))
            else:
                kept &= (one == two).reshape(len(two), -1).all(1).cpu()
    return kept if not bool(kept.all()) and 2 * int(kept.sum()) >= len(kept) else None


def _where_steady(
    program: Program, reference: Runner, run: Runner, symbols: Sizes, limit: float, seed: int
) -> tuple[list[tuple[float, float]], int] | None:
    """((max abs, max rel) per output over steady samples, samples left out), from the first of a few draws of inputs
    at which half the samples or more are steady; None where the program is steady, so that a difference is one."""
    left_out = 0
    for attempt in range(ATTEMPTS):
        flat, want = inputs_that_run(program, reference, symbols, seed + 1000 * attempt, seed)
        kept = steady(reference, flat, want, limit, seed)
        with seeded(seed):
            got = run(flat)
        if kept is None:
            if attempt == 0 and len(want[0]) > 1:
                return None
            kept = torch.ones(len(want[0]), dtype=torch.bool)
        left_out += int((~kept).sum())
        pairs = [(g.double()[kept], w.double()[kept]) for g, w in zip(got, want, strict=True)]
        errors = [
            (float((g - w).abs().max()), float((g - w).abs().max() / w.abs().max().clamp_min(1e-12))) for g, w in pairs
        ]
        if max(rel for _, rel in errors) <= limit or attempt + 1 == ATTEMPTS:
            return errors, left_out
    return None


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
