"""``Invocation``: a door that was called, with its options by group, and the request that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import OptionError
from ..ir.cost import METRICS, Budget
from .budget import one_budget, require_budget
from .goal import Goal, default_criterion, kinds_and_tokens, with_alternatives
from .latency import LatencyGoal, latency_goal
from .limits import AUTO, is_measured
from .options import OF_A_PLAN, Budgets, Decision, Latency, Limits, Source, Writing, collect_asked, options_of
from .options.table import DECIDING, REQUIRED
from .request import Request
from .tiles import TileGoal, kinds_and_blocks, split_request


@dataclass(frozen=True, eq=False)
class Invocation:
    """One call of a door: its options by group, see :mod:`fxprune.request.options`.

    command   the door, whose options these are; what it has no option for is as usual

    What is wrong with the options is an OptionError as soon as ``request`` is asked for.
    """

    command: str
    source: Source
    budget: Budgets
    decision: Decision
    limits: Limits
    latency: Latency
    writing: Writing

    @staticmethod
    def of(command: str, given: Mapping[str, Any]) -> Invocation:
        """The door called with these values, by their names in Python; other names are left out."""
        values: dict[type[Any], dict[str, Any]] = {group: {} for group in _GROUPS.values()}
        for one in options_of(command).values():
            if one.group in values and not one.refused:
                usual = None if one.default is REQUIRED else one.default
                values[one.group][one.field] = given.get(one.name, usual)
        return Invocation(command, **{name: group(**values[group]) for name, group in _GROUPS.items()})

    @cached_property
    def request(self) -> Request:
        """What is to be made. Raises OptionError where it makes no sense."""
        asked = self.decision
        if asked.pipeline is not None:
            self._check_beside_pipeline()
        elif asked.plan is not None and self.budget != Budgets():
            raise OptionError("give a plan or a budget, not both", why="a plan decides already", cure="leave one away")
        if asked.recover not in (None, "none") and asked.data is None and self.command == "compile":
            raise OptionError(
                "recovery needs data",
                where=f"--recover {asked.recover}",
                why="it fits what stays to what the dense model does on it",
                cure="give `--data`",
            )
        if is_measured(self.limits.align) and self.command not in DECIDING.split():
            raise OptionError(
                "nothing is measured here that could say what the target likes",
                where=f"--align {AUTO}",
                cure="write a number, or PATTERN=NUMBER",
            )
        tiles, goal = self._split()
        return Request(
            self.writing.target,
            None if self.command == "plan" else self.writing.out,
            asked.seed,
            self._limits(),
            goal,
            tiles,
            self._latency(tiles),
            asked.samples,
            asked.held_out,
            not self.writing.fast,
            self.options,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What was asked for by the names of the command line, as it was given: the report's ``options``."""
        groups = {type(group): group for group in (getattr(self, name) for name in _GROUPS)}
        known = [one for one in options_of(self.command).values() if one.group in groups]
        return collect_asked(self.command, {one.name: getattr(groups[one.group], one.field) for one in known})

    @property
    def decides(self) -> bool:
        """Whether it is to be decided what goes: neither a plan nor a pipeline says so."""
        named = "importance" in options_of(self.command)
        return named and self.decision.plan is None and self.decision.pipeline is None

    def _limits(self) -> Limits:
        """A plan was made under limits of its own: only what would break the model stands in its way."""
        if self.command == "apply":
            return replace(OF_A_PLAN, align=self.limits.align)
        if self.decision.plan is not None and self.decision.pipeline is None:
            return OF_A_PLAN
        return self.limits

    def _latency(self, tiles: TileGoal | None) -> LatencyGoal:
        asked = self.latency
        if self.writing.fast:
            if asked.seconds:
                raise OptionError(
                    "with `--fast` nothing is timed",
                    where=f"--seconds {asked.seconds:g}",
                    cure="leave one of them away",
                )
            asked = replace(asked, seconds=0.0)
        if self.decides:
            return latency_goal(asked, self.budget, self.limits, tiles is not None)
        table = "" if asked.latency_table is None else str(asked.latency_table)
        return LatencyGoal(asked.batch, asked.threads, table, seconds=asked.seconds)

    def _split(self) -> tuple[TileGoal | None, Goal | None]:
        """(tiles, what is searched for before them)"""
        if not self.decides:
            return None, None
        asked = self.decision
        kinds, wished = kinds_and_tokens(asked.prune, asked.tokens, asked.unmerge)
        kinds, blocks = kinds_and_blocks(kinds, asked.blocks, asked.sparse, self.budget.flops)
        asked = replace(asked, blocks=blocks)
        tiles, budget, rest = split_request(self.budget, asked, self.limits.freeze, plain=self.command == "plan")
        if tiles is not None and wished is None and all(getattr(budget, metric) is None for metric in METRICS):
            return tiles, None
        explicit = wished is not None and wished.explicit
        measuring = "flops" not in options_of(self.command)  # what is measured is no plan, but the whole model
        found = Budget("flops", 1.0) if measuring else one_budget(budget) if explicit else require_budget(budget)
        goal = Goal(
            found,
            rest.importance or default_criterion(rest.data),
            kinds,
            rest.samples,
            rest.recover or ("none" if rest.data is None or measuring else "auto"),
            rest.rounds,
            rest.head_scale,
            rest.members,
            rest.rearrange,
            wished,
            rest.search,
        )
        among = self.command == "compile" and tiles is None  # a plan must mean the same without data
        return tiles, with_alternatives(goal, rest) if among else goal

    def _check_beside_pipeline(self) -> None:
        """Raise OptionError where an option is given that the passes' own options say."""
        options = self.options
        for one in sorted(options_of(self.command).values(), key=lambda one: one.flag):
            if one.in_passes and one.flag in options and not one.is_usual(options[one.flag]):
                raise OptionError(
                    f"`--pipeline` and `{one.dashed}` say the same thing",
                    where="--pipeline",
                    why="the pipeline states every pass with its own options",
                    cure="leave one of them away",
                )


_GROUPS: Mapping[str, type[Any]] = {
    "source": Source,
    "budget": Budgets,
    "decision": Decision,
    "limits": Limits,
    "latency": Latency,
    "writing": Writing,
}
