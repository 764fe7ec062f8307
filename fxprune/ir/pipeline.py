"""Passes and pipelines: order checked when built, the program verified and its change measured after every pass."""

from __future__ import annotations

import dataclasses
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from ..errors import FxpruneError, InternalError, PlanError, PluginError, find_package
from .open_sizes import open_sizes
from .program import FACTS, Program
from .provenance import first_line
from .verify import verify


@dataclass(frozen=True)
class Pass(ABC):
    """One verb. Fields are its options; those with ``repr=False`` (data, callbacks) stay out of the pipeline text.

    name          on the command line; that of the class (``SliceAxes`` -> ``slice-axes``) where it states none. The
                  registry gives a plugin's pass the name of its entry point
    needs, gives  facts of the program that it reads, and that it leaves known
    takes         fields that the run fills in when the pass's turn comes: ``data`` (calibration batches), ``reduced``
                  (the program with its plan's tokens reduced), ``dense`` (multiply-accumulates before slicing); and
                  those that a pipeline text may leave to the options beside it: ``budget``, ``criterion``
    """

    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""

    @classmethod
    def slug(cls) -> str:
        """The name on the command line and of the file: ``slice-axes``."""
        return cls.name or re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, program: Program) -> Program:
        """Return a new program; the one given stays as it was."""

    def apply(self, program: Program) -> tuple[Program, Any]:
        """(a new program, what the pass has to tell of it): the record of what a pass found that is no fact of the
        program, plain and frozen; None where there is nothing. A pass with a record writes this, and :meth:`run` by it.
        """
        return self.run(program), None

    def runs(self) -> tuple[object, ...]:
        """What else may break something when the pass runs: a criterion, a search. Plugins are told from fxprune so."""
        return ()

    def __str__(self) -> str:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        default = {f.name: f.default for f in dataclasses.fields(self)}
        said = [f"{k.replace('_', '-')}={_text(v)}" for k, v in options.items() if v != default[k]]
        return self.slug() + (f"{{{','.join(said)}}}" if said else "")


class Analysis(Pass):
    """Finds facts; leaves the graph and the weights alone."""

    kind: ClassVar[str] = "analysis"


class Search(Pass):
    """Decides; leaves the graph and the weights alone."""

    kind: ClassVar[str] = "search"


class Transform(Pass):
    """Changes the graph or the weights, and drops the facts when it did."""

    kind: ClassVar[str] = "transform"


@dataclass(frozen=True)
class PassResult:
    """What one pass did, measured by the pipeline and never claimed by the pass; ``record`` is what it returned."""

    name: str
    text: str
    seconds: float
    added: int
    removed: int
    edited: int
    resized: int
    record: Any = field(default=None, repr=False, compare=False)

    @property
    def changed(self) -> bool:
        return bool(self.added or self.removed or self.edited or self.resized)


@dataclass(frozen=True)
class Pipeline(Pass):
    """A sequence of passes, itself a pass. ``start`` names the facts the input program already has."""

    passes: tuple[Pass, ...]
    start: tuple[str, ...] = ()
    on_pass: Callable[[Pass, Program], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        have, dropped_by = set(self.start), ""
        for p in self.passes:
            missing = [f for f in p.needs if f not in have]
            if missing:
                makers = [q.slug() for q in self.passes if set(missing) & set(q.gives)]
                hint = f"'{makers[0]}' must come before" if makers else "no pass of this pipeline gives it"
                lost = f" after '{dropped_by}' changed the graph" if dropped_by else ""
                raise InternalError(f"pass '{p.slug()}' needs {', '.join(missing)}{lost}: {hint}", pipeline=str(self))
            if isinstance(p, Transform):
                have, dropped_by = set(), p.slug()
            have |= set(p.gives)

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, tuple[PassResult, ...]]:
        """(the program behind all passes, what each of them did)."""
        results = []
        for p in self.passes:
            if self.on_pass is not None:
                self.on_pass(p, program)
            result, after = self._step(p, program)
            results.append(result)
            program = after
        return program, tuple(results)

    def _step(self, p: Pass, program: Program) -> tuple[PassResult, Program]:
        """One pass, and what it did. Raises PluginError where a plugin breaks something, InternalError where we do."""
        by = next(filter(None, map(find_package, (p, *p.runs()))), "")
        try:
            before, taken, started = snapshot(program), open_sizes(program), time.perf_counter()
            after, record = p.apply(program)
            seconds = time.perf_counter() - started
            if by and not isinstance(after, Program):
                raise InternalError(f"it gave a {type(after).__name__}, not a Program")
            result = dataclasses.replace(measure(p, before, snapshot(after), seconds), record=record)
            narrowed = taken.compare_with(open_sizes(after))
            if narrowed:
                raise InternalError(f"after '{p}': an open size was narrowed: {narrowed}")
            _check(p, program, after, result, by)
            return result, after
        except FxpruneError:
            raise
        except Exception as error:
            if by:
                broken = isinstance(error, InternalError)
                whose = "of a plugin" if find_package(p) else "with what a plugin brought"
                raise PluginError(
                    f"the pass '{p.slug()}' {whose} {'broke an invariant' if broken else 'failed'}",
                    by=by,
                    where=str(self),
                    why=error.what if isinstance(error, InternalError) else first_line(error),
                ) from error
            if not isinstance(error, InternalError):
                raise
            raise InternalError(error.what, pipeline=str(self)) from error

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def _check(p: Pass, before: Program, after: Program, result: PassResult, by: str) -> None:
    """Raise InternalError unless the pass changed no more than its kind may, and left a program that is whole.

    by   who brought it: a plan that does not fit comes from the user's file, or from a plugin
    """
    if result.changed:
        if not isinstance(p, Transform | Pipeline):
            raise InternalError(f"{p.kind} '{p.slug()}' changed the graph: {result}")
        stale = [f for f in FACTS if getattr(after, f) is not None and getattr(after, f) is getattr(before, f)]
        if isinstance(p, Transform) and stale:
            raise InternalError(f"transform '{p.slug()}' kept stale facts: {stale}")
    try:
        verify(after, graph_changed=result.changed)
    except InternalError as error:
        raise InternalError(f"after '{p}': {error.what}") from error
    except PlanError as error:
        if not by:
            raise
        raise InternalError(f"after '{p}': {error.what}: {error.where}, {error.why}") from error


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + " ".join(map(_text, value)) + "]"
    return str(value)


Snapshot = dict[str, tuple[str, tuple[Any, ...]]]


def snapshot(program: Program) -> tuple[Snapshot, dict[str, tuple[int, ...]]]:
    """Every node as text and every tensor's shape: fx's own hooks do not fire on argument edits."""

    def describe(node: Node) -> tuple[str, tuple[Any, ...]]:
        return str(node.target), (repr(node.args), repr(node.kwargs))

    nodes = {n.name: describe(n) for n in program.graph.nodes}
    shapes = {name: (t.data_ptr(), *t.shape) for name, t in program.tensors.items()}
    return nodes, shapes


def measure(p: Pass, before: Any, after: Any, seconds: float) -> PassResult:
    """What ``p`` did, from the snapshots before and after it."""
    (nodes0, shapes0), (nodes1, shapes1) = before, after
    return PassResult(
        name=p.slug(),
        text=str(p),
        seconds=seconds,
        added=len(nodes1.keys() - nodes0.keys()),
        removed=len(nodes0.keys() - nodes1.keys()),
        edited=sum(nodes0[n] != nodes1[n] for n in nodes0.keys() & nodes1.keys()),
        resized=sum(shapes0.get(n) != s for n, s in shapes1.items()) + len(shapes0.keys() - shapes1.keys()),
    )


def describe_results(results: Sequence[PassResult]) -> list[dict[str, Any]]:
    """Pass results as plain data for ``report.json``."""
    names = [f.name for f in dataclasses.fields(PassResult) if f.name != "record"]
    return [{**{n: getattr(r, n) for n in names}, "seconds": round(r.seconds, 4)} for r in results]
