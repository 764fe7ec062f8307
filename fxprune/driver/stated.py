"""An explicit pipeline: the text that passes print of themselves in reports, read back and checked before it runs.

    propagate-axes,find-groups,score-groups{criterion=trajectory},search-plan{budget=flops=0.5},recover,slice-axes

Preparation (``clean,inline,drop-masks,fold-weights``) comes first where the text names none of it. What always runs
may be there or not: ``merge-tokens,propagate-axes,find-groups`` before ``slice-axes`` where the plan reduces tokens,
``fold-indices,spell-out-tokens,fuse-norms,propagate-axes`` behind it, ``sparsify-blocks`` at the end. Passes of plugins
may stand anywhere.

What a run decides between passes is printed as passes that state the decision: ``plan-tokens{counts=[8 6]}``, rounds
between ``start-round`` and ``join-rounds``, ``keep-counts`` for a search by measured time. Behind the last slicing
stand the passes of tiles, from ``find-blocks`` on (with 2:4, from the ``find-groups`` of ``permute-channels``).

A plan that somebody gave is printed as ``read-plan{digest=..}``: the plan itself is given beside the text, and the
digest says whether it is the same one. Its tiles are carried out behind slicing, whether the text names the passes for
that (``find-groups{align=1},permute-channels,propagate-axes,sparsify-blocks``) or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import registry
from ..errors import OptionError, spell
from ..ir.cost import METRICS, Budget
from ..ir.pipeline import Pass
from ..ir.plan import CompressionPlan
from ..ir.spec import build, parse, split
from .apply import PlanLike, read_plan

OPTION = "--pipeline"
PREPARATION = ("clean", "inline", "drop-masks", "fold-weights")
TAIL = ("fold-indices", "spell-out-tokens", "fuse-norms", "propagate-axes")
CUT, MERGE, START, JOIN, ZERO = "slice-axes", "merge-tokens", "start-round", "join-rounds", "sparsify-blocks"
READ, COUNTED = "read-plan", ("plan-tokens", "keep-counts")
BEHIND_MERGING = ("propagate-axes", "find-groups")
TILES = ("find-groups", "permute-channels", "find-blocks", "search-blocks", "recover-blocks", ZERO)
PERMUTED = ("find-groups{align=1}", "permute-channels", "propagate-axes")  # as the plan that is read says


@dataclass(frozen=True)
class StatedPipeline:
    """A pipeline as it was stated: passes without data, those before slicing, those behind it, and those of tiles.

    plan   what its ``read-plan`` takes
    """

    text: str
    before: tuple[Pass, ...]
    after: tuple[Pass, ...] = ()
    tiles: tuple[Pass, ...] = ()
    plan: CompressionPlan | None = None

    @property
    def budget(self) -> Budget | None:
        """The bound of the last search that may have one, tiles first; none where counts without one are stated behind
        it."""
        for passes in (self.tiles, self.before):
            bounds = [getattr(p, "budget", None) for p in passes if "budget" in p.takes]
            if bounds and isinstance(bounds[-1], Budget):
                return bounds[-1]
        return None

    @property
    def read(self) -> bool:
        """Whether the plan is one that was given, and no search behind it made another."""
        searches = [p.slug() for p in self.before if p.kind == "search"]
        return searches[-1:] == [READ] and not self.tiles

    @property
    def criterion(self) -> str | None:
        """What the last pass that scores scores by."""
        found = [str(getattr(p, "criterion", None)) for p in self.before if "criterion" in p.takes]
        return found[-1] if found else None


def read_pipeline(
    text: str, budget: Budget | None = None, seed: int = 0, plan: PlanLike | None = None
) -> StatedPipeline:
    """The passes that ``text`` names, with their options.

    budget   of a search that states none;  seed   of passes that state none;  plan   for ``read-plan``, a path or one

    Raises OptionError naming the pass at fault: unknown names and options, a pass whose facts no pass before it finds,
    a budget that is said twice or not at all, rounds that do not end, passes of tiles before slicing, a plan that is
    missing or not read. PlanError where the plan cannot be read.
    """
    try:
        parts = split(text)
    except ValueError as error:
        raise OptionError("the pipeline cannot be read", where=f"{OPTION} {text}", why=str(error)) from None
    if not parts:
        raise OptionError(
            "the pipeline is empty",
            where=OPTION,
            cure="for example propagate-axes,find-groups,"
            "score-groups{criterion=l2},search-plan{budget=flops=0.5},slice-axes",
        )
    given, known = _plan_for(parts, plan), dict[str, Any]()
    passes = [_read(part, number, budget, seed, known, given) for number, part in enumerate(parts, 1)]
    if budget is not None and not any(getattr(p, "budget", None) is budget for p in passes):  # to those that need none
        passes = [
            replace(p, budget=budget) if getattr(p, "budget", budget) is None else p  # type: ignore[call-arg]
            for p in passes
        ]
    if budget is not None and not any(getattr(p, "budget", None) is budget for p in passes):
        raise OptionError(
            "the budget is given twice, or not used",
            where=f"{OPTION} .. --{budget.metric}",
            why="every search of the pipeline states its own",
            cure="leave one of them away",
        )
    names = [p.slug() for p in passes]
    if not set(names) & set(PREPARATION):
        passes[:0] = [registry.lookup("pass", name)() for name in PREPARATION]
        names[:0] = PREPARATION
    at = _last_cut(passes)
    before = _without_merging(passes[:at])
    rest = _without(TAIL, passes[at + 1 :])
    first = next((i for i, p in enumerate(rest) if p.slug() in TILES), len(rest))
    # behind slicing axes are found after every pass, stated or not
    after, tiles = tuple(p for p in rest[:first] if p.slug() != "propagate-axes"), _tiles(rest[first:], passes)
    _check_order(before, passes, set())
    _check_order(tiles, list(tiles), {"axes"})
    if not any("plan" in p.gives for p in (*before, *tiles)):
        raise OptionError(
            "no pass of the pipeline makes a plan",
            where=f"{OPTION} {text}",
            cure="put search-plan{budget=flops=0.5} before slice-axes; a plan that is there already is "
            "taken by read-plan, or applied by `fxprune apply`",
        )
    return StatedPipeline(text, before, after, tiles, given)


def _plan_for(parts: Sequence[str], plan: PlanLike | None) -> CompressionPlan | None:
    """The plan that ``read-plan`` takes. Raises OptionError where there is one without the other."""
    at = next((n for n, part in enumerate(parts, 1) if part.partition("{")[0].strip() == READ), None)
    if at is None and plan is None:
        return None
    if at is None:
        raise OptionError(
            "give a plan or a pipeline, not both",
            where=f"{OPTION} .. --plan",
            why=f"no pass of the pipeline reads the plan: it has no {READ}",
            cure=f"leave one of them away, or put {READ} in place of the passes that score and search",
        )
    if plan is None:
        raise OptionError(
            "the pipeline reads a plan, and none is given",
            where=f"{OPTION}, pass {at}: {parts[at - 1]}",
            why="the text says which plan it was, not which elements it keeps",
            cure="give the plan.json that lies beside the report: fxprune compile MODEL --pipeline .. "
            "--plan small/plan.json",
        )
    return read_plan(plan)


def _last_cut(passes: Sequence[Pass]) -> int:
    """Where the slicing is that makes the result, or the end; others are of rounds. Raises OptionError for rounds out
    of order."""
    at, within, cut = len(passes), False, False
    for number, name in enumerate(p.slug() for p in passes):
        if name == CUT and at < number:
            raise OptionError(
                "the pipeline slices twice",
                where=OPTION,
                why="a plan is of the whole model",
                cure=f"say {START} before the first {CUT}, and {JOIN} before the last recover and {CUT}",
            )
        if at < number:
            continue
        if name == JOIN and not within:
            raise OptionError(f"'{JOIN}' has no round to join", where=OPTION, cure=f"put {START} before it")
        if name == CUT and within and cut:
            break
        if name == CUT and not within:
            at = number
        within = name == START or (within and name != JOIN)
        cut = name == CUT or (cut and name != START)
    if within:
        raise OptionError(
            "the rounds of the pipeline are not joined",
            where=f"{OPTION} .. {START}",
            cure=f"put {JOIN} behind the last search",
        )
    late = [
        p
        for p in passes[at:]
        if p.slug() in (START, JOIN, MERGE, "recover") or (p.kind == "search" and p.slug() not in TILES)
    ]
    early = [p for p in passes[:at] if p.slug() in TILES[1:]]
    if late or early:
        odd, here, there = (late[0], "behind", "before") if late else (early[0], "before", "behind")
        raise OptionError(
            f"'{odd.slug()}' stands {here} {CUT}", where=f"{OPTION} .. {odd}", cure=f"put it {there} {CUT}"
        )
    return at


def _without(names: Sequence[str], passes: Sequence[Pass]) -> list[Pass]:
    """The passes without ``names`` at their start, as far as these are there."""
    rest = list(passes)
    for name in names:
        if rest and rest[0].slug() == name:
            del rest[0]
    return rest


def _without_merging(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes without what merges tokens, or drops parts of kinds that bring their own passes, at their end. Raises
    OptionError for anything else there."""
    names = [p.slug() for p in passes]
    added = kinds_added(names)
    carriers = [name for name in (MERGE, *(k.apply.slug() for k in added)) if name in names]
    if not carriers:
        return tuple(passes)
    at = min(map(names.index, carriers))
    first, before = names[at], passes[:at]
    if MERGE in names and not any((p.kind == "search" and "tokens" in p.needs) or p.slug() == READ for p in before):
        raise OptionError(
            f"'{MERGE}' has nothing to merge",
            where=f"{OPTION} .. {MERGE}",
            why="no pass before it plans tokens",
            cure="put plan-tokens{reducer=tome,counts=[8 6]} before it",
        )
    rest = list(passes[at:])
    while rest and rest[0].slug() in carriers:
        rest = _without((*BEHIND_MERGING, *(k.find.slug() for k in added)), rest[1:])
    if rest:
        raise OptionError(
            f"'{rest[0].slug()}' stands between {first} and {CUT}",
            where=f"{OPTION} .. {rest[0]}",
            why="merging and slicing carry out one plan" if first == MERGE else "they carry out one plan",
            cure=f"put it before {first}",
        )
    stated, again = ([str(p) for p in part if p.slug() == "find-groups"] for part in (passes[:at][::-1], passes[at:]))
    odd = next((one for one in again if one not in stated[:1]), None)
    if odd is not None:
        raise OptionError(
            f"the groups behind {first} are those that the plan was made for",
            where=f"{OPTION} .. {odd}",
            why=f"before it stands {next(iter(stated), 'none')}",
            cure="state the same limits in both places",
        )
    return tuple(before)


def kinds_added(names: Sequence[str]) -> list[registry.KindPasses]:
    """The kinds that bring their passes, where a pass of that name may be one of theirs."""
    return [] if set(names) <= registry.PASSES.keys() else registry.load_kinds()


def _tiles(passes: Sequence[Pass], stated: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes of tiles without the last, which always runs. Raises OptionError where they plan nothing."""
    names = [p.slug() for p in passes]
    if ZERO in names[:-1]:
        raise OptionError(
            f"'{passes[names.index(ZERO) + 1].slug()}' stands behind {ZERO}",
            where=OPTION,
            cure=f"put it before {', '.join(TILES[2:3])}",
        )
    tiles = tuple(p for p in passes if p.slug() != ZERO)
    unseeded = tuple(str(replace(p, seed=0) if p.slug() == PERMUTED[1] else p) for p in tiles)  # type: ignore[call-arg]
    if any(p.slug() == READ for p in stated) and unseeded in ((), PERMUTED[:2], PERMUTED):
        return ()  # those of the plan that is read, its order of channels included
    if passes and not any("plan" in p.gives for p in tiles):
        raise OptionError(
            "no pass of the pipeline plans tiles",
            where=f"{OPTION} .. {passes[0]}",
            cure="end with find-blocks,score-groups{criterion=magnitude},search-blocks{budget=flops=0.5}",
        )
    return tiles


def _check_order(passes: Sequence[Pass], stated: list[Pass], have: set[str]) -> None:
    for p in passes:
        _check_needs(p, have, stated)
        have |= set(p.gives)


def _read(
    part: str, number: int, budget: Budget | None, seed: int, known: dict[str, Any], plan: CompressionPlan | None
) -> Pass:
    """One pass; passes of one criterion share it, which remembers what it found. Raises OptionError."""
    where = f"{OPTION}, pass {number}: {part}"
    name, options = parse(part, where)
    cls = registry.lookup("pass", name)
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise OptionError(f"'{name}' is not a pass", where=where)
    fields = {f.name for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    required = any(f.name == "budget" and f.default is dataclasses.MISSING for f in dataclasses.fields(cls))
    if required and "budget" not in options and budget is not None:
        given["budget"] = budget
    if "seed" in fields and "seed" not in options:
        given["seed"] = seed
    if name == READ and plan is not None:
        given["plan"] = plan
        options.setdefault("digest", plan.digest)
    try:
        made: Pass = build(cls, options, f"the pass '{name}'", where, **given)
        if isinstance(criterion := getattr(made, "criterion", None), str):
            from ..passes.analysis.score_groups import criterion as criterion_of

            if criterion not in known:
                known[criterion] = criterion_of(criterion)
            made = replace(made, criterion=known[criterion])  # type: ignore[call-arg]
        bound = getattr(made, "budget", None)
        if isinstance(bound, Budget) and bound.metric not in METRICS and name not in COUNTED:
            raise OptionError(
                f"'{name}' cannot search by time in a pipeline",
                where=where,
                why="there is no table of the target to go by",
                cure=f"give `--{bound.metric}` without a pipeline; its report then states {COUNTED[1]}",
            )
    except OptionError as error:  # of a pass's own checks, which name options of the command line
        at = error.where if error.where.startswith(spell(OPTION, bare=True)) else where
        raise OptionError(error.what, where=at, why=error.why, cure=error.cure) from None
    return made


def _check_needs(p: Pass, have: set[str], passes: Sequence[Pass]) -> None:
    missing = [fact for fact in p.needs if fact not in have]
    if missing:

        def makes(one: Any) -> bool:
            handed_on = one.kind == "transform"  # what it gives was found before
            return not handed_on and bool(set(missing) & set(one.gives) - set(one.needs))

        makers = sorted({q.slug() for q in passes if makes(q)} or {n for n, cls in _list_built_in() if makes(cls)})
        raise OptionError(
            f"the pass '{p.slug()}' needs {', '.join(missing)}",
            where=f"{OPTION} .. {p}",
            why="no pass before it finds them, or a pass in between changed the graph",
            cure=f"put {' or '.join(makers)} before it",
        )


def _list_built_in() -> list[tuple[str, Any]]:
    return [(name, registry.lookup("pass", name)) for name in registry.PASSES]
