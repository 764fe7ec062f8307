"""An explicit pipeline: the text that passes print of themselves in reports, read back and run.

    propagate-axes,find-groups,score-groups{criterion=trajectory},search-plan{budget=flops=0.5},recover,slice-axes

Preparation (``clean,inline,drop-masks,fold-weights``) comes first where the text names none of it. What follows
``slice-axes`` in every report (``fold-indices,spell-out-tokens,propagate-axes``) may be there or not: it always runs.
Passes of plugins may stand anywhere.

What is decided between passes has no place in the text: rounds, how many tokens go where, and tiles. Such runs are
replayed by their options (``--config report.json``).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import jobs, journal, registry
from .cost import Budget
from .errors import OptionError
from .options import build, parse, split
from .pipeline import Pass, Transform
from .program import Program
from .work import Work

OPTION = "--pipeline"
PREPARATION = ("clean", "inline", "drop-masks", "fold-weights")
TAIL = ("fold-indices", "spell-out-tokens", "propagate-axes")
CUT = "slice-axes"
DECIDED_ELSEWHERE = {
    "merge-tokens": "--tokens", "find-blocks": "--blocks", "search-blocks": "--blocks", "recover-blocks": "--blocks",
    "sparsify-blocks": "--blocks", "permute-channels": "--sparse",
}


@dataclass(frozen=True)
class StatedPipeline:
    """A pipeline as it was stated: passes without data, those before slicing and those behind it."""

    text: str
    before: tuple[Pass, ...]
    after: tuple[Pass, ...] = ()

    @property
    def budget(self) -> Budget | None:
        """The bound of the last search that has one."""
        found = [p.budget for p in self.before if isinstance(getattr(p, "budget", None), Budget)]  # type: ignore[attr-defined]
        return found[-1] if found else None

    @property
    def criterion(self) -> str | None:
        """What the last pass that scores scores by."""
        found = [str(p.criterion) for p in self.before if hasattr(p, "criterion")]
        return found[-1] if found else None


def read_pipeline(text: str, budget: Budget | None = None, seed: int = 0) -> StatedPipeline:
    """The passes that ``text`` names, with their options.

    budget   of a search that states none;  seed   of passes that state none

    Raises OptionError naming the pass at fault: unknown names and options, a pass whose facts no pass before it finds,
    a budget that is said twice or not at all, and what a text cannot decide.
    """
    try:
        parts = split(text)
    except ValueError as error:
        raise OptionError("the pipeline cannot be read", where=f"{OPTION} {text}", why=str(error)) from None
    if not parts:
        raise OptionError("the pipeline is empty", where=OPTION, cure="for example propagate-axes,find-groups,"
                          "score-groups{criterion=l2},search-plan{budget=flops=0.5},slice-axes")
    passes = [_read(part, number, budget, seed) for number, part in enumerate(parts, 1)]
    if budget is not None and not any(getattr(p, "budget", None) is budget for p in passes):
        raise OptionError("the budget is given twice, or not used", where=f"{OPTION} .. --{budget.metric}",
                          why="every search of the pipeline states its own", cure="leave one of them away")
    names = [p.slug() for p in passes]
    if not set(names) & set(PREPARATION):
        passes[:0] = [registry.lookup("pass", name)() for name in PREPARATION]
        names[:0] = PREPARATION
    if names.count(CUT) > 1:
        raise OptionError("the pipeline slices twice", where=OPTION, why="rounds are composed into one plan between "
                          "passes", cure="use --rounds, or --config report.json")
    at = names.index(CUT) if CUT in names else len(names)
    rest = list(passes[at + 1 :])
    for name in TAIL:
        if rest and rest[0].slug() == name:
            del rest[0]
    have: set[str] = set()
    for p in passes[:at]:
        _check_needs(p, have, passes)
        have |= set(p.gives)
    if "plan" not in have:
        raise OptionError("no pass of the pipeline makes a plan", where=f"{OPTION} {text}",
                          cure="put search-plan{budget=flops=0.5} before slice-axes")
    return StatedPipeline(text, tuple(passes[:at]), tuple(rest))


def _read(part: str, number: int, budget: Budget | None, seed: int) -> Pass:
    """One pass. Raises OptionError."""
    where = f"{OPTION}, pass {number}: {part}"
    name, options = parse(part, where)
    if name in DECIDED_ELSEWHERE:
        raise OptionError(f"'{name}' cannot be stated alone", where=where,
                          why="what it does is decided between passes, by more than its options",
                          cure=f"use {DECIDED_ELSEWHERE[name]}, or replay the run by --config report.json")
    cls = registry.lookup("pass", name)
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise OptionError(f"'{name}' is not a pass", where=where)
    fields = {f.name for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    if "budget" in fields and "budget" not in options and budget is not None:
        given["budget"] = budget
    if "seed" in fields and "seed" not in options:
        given["seed"] = seed
    try:
        made: Pass = build(cls, options, f"the pass '{name}'", where, **given)
        if isinstance(criterion := getattr(made, "criterion", None), str):
            from .passes.analysis.score_groups import criterion as criterion_of

            made = replace(made, criterion=criterion_of(criterion))  # type: ignore[call-arg]
    except OptionError as error:  # of a pass's own checks, which name options of the command line
        at = error.where if error.where.startswith(OPTION) else where
        raise OptionError(error.what, where=at, why=error.why, cure=error.cure) from None
    return made


def _check_needs(p: Pass, have: set[str], passes: list[Pass]) -> None:
    missing = [fact for fact in p.needs if fact not in have]
    if missing:
        def makes(one: Any) -> bool:
            return bool(set(missing) & set(one.gives) - set(one.needs))

        makers = sorted({q.slug() for q in passes if makes(q)} or {n for n, cls in _built_in() if makes(cls)})
        raise OptionError(f"the pass '{p.slug()}' needs {', '.join(missing)}", where=f"{OPTION} .. {p}",
                          why="no pass before it finds them, or a pass in between changed the graph",
                          cure=f"put {' or '.join(makers)} before it")


def _built_in() -> list[tuple[str, Any]]:
    return [(name, registry.lookup("pass", name)) for name in registry.PASSES]


def decided_by(work: Work, stated: StatedPipeline, samples: int) -> Program:
    """The dense program with the plan that the stated passes make; what they did is in ``work``.

    Passes that score or recover get the calibration data; where none was given, it is made up for criteria that need
    some, with a warning, and recovery is an error.
    """
    from .decide import made_up, without_labels_of_others
    from .measure import versions
    from .passes.analysis.find_groups import FindGroups

    dense = work.dense
    assert dense is not None
    program, data = dense, work.calibration
    work.budget = stated.budget
    jobs.identify(lambda: journal.fingerprint(dense, data, work.seed, [stated.text]))
    for number, one in enumerate(stated.before):
        if isinstance(one, FindGroups):
            work.find_groups = one
        if _takes_data(one):
            if data is None and getattr(getattr(one, "criterion", None), "needs_data", False):
                data = work.calibration = made_up(work, str(one.criterion), samples)  # type: ignore[attr-defined]
            if data is not None and number == _first(stated):
                data = work.calibration = without_labels_of_others(work, program, data)
            one = replace(one, data=data)  # type: ignore[call-arg]
        _check_needs(one, {f for f in ("axes", "groups", "scores", "plan", "tokens")
                           if getattr(program, f) is not None}, list(stated.before))
        program = work.run(program, one)
        results = getattr(one, "results", None)
        if isinstance(one, Transform) and one.slug() == "recover" and results:
            work.recovery = results[-1].record()
    if program.plan is None:
        raise OptionError("the plan is gone when it is time to slice", where=f"{OPTION} {stated.text}",
                          why="a pass behind the search changed the graph, and facts about the old one were dropped",
                          cure="put passes that change the graph before propagate-axes")
    plan = program.plan
    about = {**plan.about, "model": work.name, "pipeline": work.pipeline, "importance": stated.criterion,
             "data": data.origin if data else None, "samples": data.samples if data else 0, "versions": versions()}
    return program.but(plan=replace(plan, about=about))


def _takes_data(p: Pass) -> bool:
    return any(f.name == "data" and not f.repr for f in dataclasses.fields(p))


def _first(stated: StatedPipeline) -> int:
    """The first pass that takes data: labels are looked at once, on the graph as it is then."""
    return next((i for i, p in enumerate(stated.before) if _takes_data(p)), -1)


_BESIDE = {"command", "model", "input", "batch", "threads", "seconds", "checkpoint", "trust-pickle", "data", "samples",
           "seed", "target", "out", "pipeline", "memory", "flops", "params", "bytes"}


def stated_alone(asked: Mapping[str, Any]) -> None:
    """Raise OptionError where an option is given that the passes' own options say. asked: values by option"""
    from .api import compile

    usual = {name.replace("_", "-"): p.default for name, p in inspect.signature(compile).parameters.items()}
    for name in sorted(asked.keys() - _BESIDE):
        if asked[name] != usual[name] and asked[name] not in (None, [], (), "1"):
            raise OptionError(f"--pipeline and --{name} say the same thing", where=OPTION,
                              why="the pipeline states every pass with its own options", cure="leave one of them away")
