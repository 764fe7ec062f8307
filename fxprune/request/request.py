"""``Request``: all that a door was asked for, once and frozen, and what follows from it before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .. import registry
from ..errors import OptionError
from ..ir.cost import METRICS, Budget
from ..target.backend import Backend
from .budget import budgets_of, needed_budget, one_budget
from .goal import Wish, default_criterion, kinds_and_tokens
from .latency import LatencyWish, latency_wish
from .options import Budgets, Decision, Latency, Limits, Source, Writing, asked_of, options_of
from .options.table import REQUIRED
from .tiles import BlockWish, kinds_and_blocks, split_request

_GROUPS = {
    "source": Source,
    "budget": Budgets,
    "decision": Decision,
    "limits": Limits,
    "latency": Latency,
    "writing": Writing,
}
_WITH_A_PLAN = {"apply", "export"}


@dataclass(frozen=True, eq=False)
class Request:
    """What a door was asked for. What is wrong with it is an OptionError as soon as it is made: it must not cost a
    minute of scoring first.

    command   the door: whose options these are
    source, budget, decision, limits, latency, writing   the options by group, see :mod:`fxprune.request.options`

    What follows from them: ``goal`` (what is searched for among groups and tokens), ``tiles`` (zeros inside weights),
    ``timing`` (how time is measured), ``backend``, and ``options`` (what was asked, for the report).
    """

    command: str
    source: Source
    budget: Budgets
    decision: Decision
    limits: Limits
    latency: Latency
    writing: Writing

    @staticmethod
    def of(command: str, given: Mapping[str, Any]) -> Request:
        """The request that a door was called with.

        given   values by their names in Python (other names are left out); what is not there is as usual for the door
        """
        values: dict[type[Any], dict[str, Any]] = {group: {} for group in _GROUPS.values()}
        for one in options_of(command).values():
            if one.group in values and not one.refused:
                usual = None if one.default is REQUIRED else one.default
                values[one.group][one.field] = given.get(one.name, usual)
        if command in _WITH_A_PLAN or (command == "dynamo" and values[Decision]["plan"] is not None):
            # the plan was made under limits of its own: here only what would break the model stands in its way
            values[Limits] = {"align": values[Limits].get("align", 1), "floor": 0.0, "allow_empty": True}
        return Request(command, **{name: group(**values[group]) for name, group in _GROUPS.items()})

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise OptionError("the share that is held out lies between 0 and 1", where=f"--held-out {self.held_out:g}")
        if self.decision.pipeline is not None:
            self._check_beside_pipeline()
        elif self.decision.plan is not None:
            self._check_beside_plan()
        recover, data = self.decision.recover, self.decision.data
        if self.decides and recover not in (None, "none") and data is None and self.command != "dynamo":
            raise OptionError(
                "recovery needs data",
                where=f"--recover {recover}",
                why="it fits what stays to what the dense model does on it",
                cure="give --data",
            )
        self.goal, self.timing, self.backend  # noqa: B018  read every name in them
        self.limits.find_groups(self.backend.granularity)

    @property
    def decides(self) -> bool:
        """Whether it is to be decided what goes: neither a plan nor a pipeline says so."""
        named = "importance" in options_of(self.command)
        return named and self.decision.plan is None and self.decision.pipeline is None

    @property
    def held_out(self) -> float:
        """The share of the data that nothing is decided or fitted on."""
        return self.decision.held_out

    @property
    def seed(self) -> int:
        """Of all that is random."""
        return self.decision.seed

    @cached_property
    def goal(self) -> Wish | None:
        """What is searched for among groups and tokens; None: nothing is, or a plan or a pipeline decides."""
        return self._split[1]

    @cached_property
    def tiles(self) -> BlockWish | None:
        """Zeros inside weights, after slicing."""
        return self._split[0]

    @cached_property
    def stated_budget(self) -> Budget | None:
        """The budget as it was given, of the whole result; None where there is none."""
        return one_budget(self.budget)

    @cached_property
    def timing(self) -> LatencyWish:
        """How time is measured."""
        if self.decides:
            return latency_wish(self.latency, self.budget, self.limits, self.tiles is not None)
        table = self.latency.latency_table
        return LatencyWish(
            self.latency.batch, self.latency.threads, "" if table is None else str(table), seconds=self.latency.seconds
        )

    @cached_property
    def backend(self) -> Backend:
        """The target, with its options."""
        table = self.tiles.tiling.table if self.tiles is not None else ""
        return registry.target(self.writing.target or "eager", **({"table": table} if table else {}))

    @cached_property
    def options(self) -> dict[str, Any]:
        """What was asked for by the names of the command line, as it was given; :func:`plain` makes data of it."""
        groups = {type(group): group for group in (getattr(self, name) for name in _GROUPS)}
        given = {
            one.name: getattr(groups[one.group], one.field)
            for one in options_of(self.command).values()
            if one.group in groups
        }
        return asked_of(self.command, given)

    def at(self, budget: Budget) -> Request:
        """The same request under another budget. What its criterion found out so far stays known."""
        made = replace(self, budget=budgets_of(budget))
        if self.goal is not None and self.tiles is None:
            made.__dict__["goal"] = self.goal.at(budget)
        return made

    @cached_property
    def _split(self) -> tuple[BlockWish | None, Wish | None]:
        """(tiles, what is searched for before them)"""
        if not self.decides:
            return None, None
        asked = self.decision
        kinds, wished = kinds_and_tokens(asked.prune, asked.tokens, asked.unmerge)
        kinds, blocks = kinds_and_blocks(kinds, asked.blocks, asked.sparse, self.budget.flops)
        asked = replace(asked, blocks=blocks)
        plain = self.command == "plan"
        tiles, budget, rest = split_request(self.budget, asked, self.limits.freeze, plain)
        counted = [getattr(budget, metric) for metric in METRICS]
        if tiles is not None and wished is None and counted == [None] * len(counted):
            return tiles, None
        explicit = wished is not None and wished.explicit
        if "flops" not in options_of(self.command):  # what is measured is no plan: the whole model
            found: Budget | None = Budget("flops", 1.0)
        else:
            found = one_budget(budget) if explicit else needed_budget(budget)
        return tiles, Wish(
            found,
            rest.importance or default_criterion(rest.data),
            kinds,
            rest.samples,
            rest.recover or ("none" if rest.data is None or self.command == "sensitivity" else "auto"),
            rest.rounds,
            rest.head_scale,
            rest.members,
            rest.rearrange,
            wished,
            rest.search,
        )

    def _check_beside_plan(self) -> None:
        """Raise OptionError where something is to be decided although the plan decides."""
        if self.budget != Budgets():
            raise OptionError("give a plan or a budget, not both", why="a plan decides already", cure="leave one away")
        if self.command == "compile" and self.decision.recover not in (None, "none"):
            raise OptionError(
                "a plan is applied without recovery",
                where=f"--recover {self.decision.recover}",
                why="applying a plan uses no data",
                cure="give a budget and data instead, or a pipeline: read-plan,recover (fxprune help pipelines)",
            )

    def _check_beside_pipeline(self) -> None:
        """Raise OptionError where an option is given that the passes' own options say."""
        for one in sorted(options_of(self.command).values(), key=lambda one: one.flag):
            if one.in_passes and one.flag in self.options and not one.is_usual(self.options[one.flag]):
                raise OptionError(
                    f"--pipeline and --{one.flag} say the same thing",
                    where="--pipeline",
                    why="the pipeline states every pass with its own options",
                    cure="leave one of them away",
                )
