"""The chain of proof between the captured graph and the sliced one: each link run on both forms, at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import InternalError, VerifyError
from ..ir.agreement import relative_error, seeded, tolerance_of, why_random
from ..ir.double import exactly, in_double, widen, within_rounding
from ..ir.program import Program
from ..ir.proof import Link
from ..ir.provenance import first_line
from ..ir.signature import Sizes, all_other, dim_names, input_sizes
from ..process.silence import silence
from ..target.parity import inputs_that_run, steady
from ..testing import masked_run, run_flat

if TYPE_CHECKING:
    from .run import Run

SLICED = "the dense graph with masks and the sliced one"
PREPARED = "the captured graph and the one that is cut, with nothing removed"


def compare_with_captured(captured: Program, prepared: Program, seed: int) -> Link:
    """How near the graph that will be cut, with nothing removed, is to the one that was captured.

    ``prepared`` is ``captured`` behind the passes that make it ready and find its axes. Raises InternalError where it
    computes something else.
    """
    from ..passes.transform.resize import resize

    whole = prepared.but(exported=resize(prepared, {}))
    return _compare(
        PREPARED,
        captured,
        lambda flat: run_flat(captured, flat),
        lambda flat: run_flat(whole, flat),
        lambda flat: exactly(captured, flat),
        seed,
    )


def compare_with_masking(run: Run, dense: Program) -> Link:
    """How near the run's sliced graph is to ``dense`` with the same elements masked.

    Raises InternalError beyond the tolerance of the coarsest dtype: slicing is then wrong, and nothing is written.
    VerifyError where the model draws random numbers, so that nothing can be said.
    """
    plan, sliced = dense.need("plan"), run.program

    def exact(flat: Sequence[Any]) -> list[Any] | None:
        try:
            return masked_run(in_double(dense), plan, [widen(value) for value in flat])
        except Exception:  # whatever torch says of a dtype that a kernel does not have
            return None

    with _attach_pipeline(run):
        return _compare(
            SLICED,
            dense,
            lambda flat: masked_run(dense, plan, flat),
            lambda flat: run_flat(sliced, flat),
            exact,
            run.seed,
        )


def _compare(
    compared: str,
    program: Program,
    one: Callable[[Sequence[Any]], list[Any]],
    two: Callable[[Sequence[Any]], list[Any]],
    exact: Callable[[Sequence[Any]], list[Any] | None],
    seed: int,
) -> Link:
    """Both forms on seeded inputs of two sizes. Where they differ by more than the tolerance, samples at which the
    first itself jumps do not count, and neither does what is no more than its own distance from fp64."""
    limit, worst, rounded, tried = tolerance_of(program), 0.0, 0.0, list[Sizes]()

    def run_seeded(run: Callable[[Sequence[Any]], list[Any]], flat: Sequence[Any]) -> list[Any]:
        with seeded(seed):
            return run(flat)

    for named, sizes in _sizes(program):
        try:
            with silence():
                flat, want = inputs_that_run(program, one, sizes, seed, seed)
        except Exception as failure:  # the program refuses these sizes, which says nothing of the other form
            if not tried:
                raise VerifyError(
                    "the captured graph does not run on its own example inputs",
                    where=program.name,
                    why=first_line(failure),
                    cure="give inputs that the model takes (`--input`)",
                ) from failure
            continue
        with silence():
            got = run_seeded(two, flat)
            error = relative_error(got, want)
            if not error <= limit:
                kept = steady(lambda inputs: run_seeded(one, inputs), flat, want, limit, seed)
                if kept is not None:
                    error = relative_error(_rows(got, kept), _rows(want, kept))
        tried.append(named)
        if error <= limit:
            worst = max(worst, error)
        elif within_rounding(got, want, _unless_random(program, exact, flat), limit):
            rounded = max(rounded, error)
        else:
            _refuse(compared, program, error, limit)
    return Link(compared, worst, limit, tuple(tried), rounded)


def _sizes(program: Program) -> list[tuple[Mapping[str, int], Sizes]]:
    """(sizes by their words, by symbol): the example's, and others where any is open."""
    words, sizes = dim_names(program), input_sizes(program)
    trials = [sizes, all_other(program)] if sizes else [sizes]
    return [({words[s]: n for s, n in trial.items()}, trial) for trial in trials]


def _rows(outputs: Sequence[Any], kept: Tensor) -> list[Any]:
    return [t[kept] if isinstance(t, Tensor) else t for t in outputs]


def _unless_random(
    program: Program, exact: Callable[[Sequence[Any]], list[Any] | None], flat: Sequence[Any]
) -> list[Any] | None:
    return None if why_random(program)[0] else exact(flat)


def _refuse(compared: str, program: Program, error: float, limit: float) -> None:
    why, cure = why_random(program)
    if why:
        raise VerifyError(f"{compared} cannot be compared", where=program.name, why=why, cure=cure)
    raise InternalError(f"{compared} differ by {error:.1e} (relative, tolerance {limit:.0e})")


@contextmanager
def _attach_pipeline(run: Run) -> Iterator[None]:
    """An error that is fxprune's own comes with the pipeline that reproduces it."""
    try:
        yield
    except InternalError as error:
        raise InternalError(error.what, pipeline=run.pipeline) from error


def prove_prepared(run: Run) -> Run:
    """The run with its program, whose axes are known, held against the captured one; the link goes into the report."""
    run.tell.stage("compare the graph that is cut with the captured one")
    with _attach_pipeline(run):
        link = compare_with_captured(run.opened.dense, run.program, run.seed)
    return run.but(proof=(*run.program.proof, link))
