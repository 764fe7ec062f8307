"""What a search is to reach: the budget, the kinds that may be cut, and how they are judged and repaired."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import OptionError, nearest
from ..ir.cost import Budget
from ..ir.group import DEFAULT_KINDS, LAYERS, Kind
from ..target.latency_table import LatencyTable
from .layers import LayerGoal
from .tokens import TokenGoal, token_goal

if TYPE_CHECKING:
    from ..passes.analysis.importance.criterion import Criterion
    from ..passes.transform.recover import Recover
    from .options import Decision


MOST_ROUNDS = 20
MEMBERS = ("auto", "scores", "obs")


@dataclass(frozen=True)
class Goal:
    """What a search is to reach, and by which criterion. Unknown names are OptionErrors as soon as it is made.

    No budget: the token counts are explicit, or layers go, and nothing else is cut.

    wider   kinds that are tried beside ``kinds``, and taken where data say that the result is nearer to the dense model
    rival   another criterion is tried as well, in the same way, where channels may go
    """

    budget: Budget | None
    criterion: str
    kinds: tuple[Kind | str, ...]
    samples: int | str
    recover: str = "none"
    rounds: int = 1
    head_scale: float | str = 1.0
    members: str = "auto"
    rearrange: int = 0
    tokens: TokenGoal | None = None
    search: str = "auto"
    table: LatencyTable | None = None
    wider: tuple[Kind | str, ...] = ()
    rival: bool = False
    layers: LayerGoal | None = None

    def __post_init__(self) -> None:
        from ..passes.search.search_plan import SearchPlan, kinds_named

        kinds_named(self.kinds)
        if self.tokens is not None and self.rounds > 1:
            raise OptionError(
                "rounds and tokens do not go together",
                where=f"--rounds {self.rounds}",
                why="tokens are decided once, on the dense model",
                cure="leave one of them away",
            )
        self._check_parts()
        others = [str(k) for k in self.scored_kinds if str(k) not in self.scorer.only]
        if self.scorer.only and others:
            known = ", ".join(sorted(self.scorer.only))
            raise OptionError(
                f"'{self.scorer.name}' scores {known} alone",
                where=f"--importance {self.criterion}",
                why=f"kinds {', '.join(others)} are to be pruned here",
                cure=f"say `--prune {known.replace(', ', ',')}`; trajectory scores all kinds",
            )
        if self.budget is not None and self.budget.metric == "latency" and self.rounds > 1:
            raise OptionError(
                "rounds and latency do not go together",
                where=f"--rounds {self.rounds}",
                why="what is measured is the dense model, not what a round leaves",
                cure="leave one away",
            )
        self.recovery  # noqa: B018  reads its name and options
        check_samples(self.samples)
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise OptionError(f"rounds are between 1 and {MOST_ROUNDS}", where=f"--rounds {self.rounds}")
        if self.members not in MEMBERS:
            raise OptionError(
                f"unknown way to choose members '{self.members}'",
                where="--members",
                cure=nearest(self.members, MEMBERS),
            )
        if self.rearrange < 0:
            raise OptionError("rounds of rearrangement cannot be negative", where=f"--rearrange {self.rearrange}")
        self.scorer  # noqa: B018  reads the criterion's name and options
        SearchPlan(
            self.budget or Budget("flops", 1.0),
            method=self.search,
            head_scale=1.0 if self.head_scale == "auto" else self.scale,
        )
        if self.members == "obs" and not self.scorer.comparable:
            raise OptionError(
                f"the scores of '{self.scorer.name}' cannot say how many stay per group",
                where="--members obs",
                why="they only rank elements within a group",
                cure="use trajectory or fisher, or leave `--members` away",
            )

    def _check_parts(self) -> None:
        """Raise OptionError where kinds that bring passes of their own meet what these know nothing of."""
        if self.layers is not None and self.tokens is not None:
            raise OptionError(
                "layers and tokens are not chosen together",
                where=f"--layers {self.layers.text} --tokens {self.tokens.text}",
                cure="leave one of them away, or compile the result of the first",
            )
        layers = () if self.layers is None else self.layers.kinds
        added = [str(k) for k in (*self.kinds, *layers) if registry.brings_passes(str(k))]
        if added and (self.rounds > 1 or (self.budget is not None and self.budget.metric == "latency")):
            raise OptionError(
                f"groups of kind '{added[0]}' are searched in one round, and not by time",
                where=f"--prune {added[0]}",
                why="rounds and measured tables know of axes and tokens alone",
                cure="leave the kind, or rounds and latency away",
            )

    @cached_property
    def scorer(self) -> Criterion:
        """The criterion itself."""
        from ..passes.analysis.score_groups import criterion

        return criterion(self.criterion)

    @cached_property
    def recovery(self) -> Recover:
        """The recovery itself, without data: from ``name`` or ``name{option=value}``."""
        from ..ir.spec import build, parse
        from ..passes.transform.recover import Recover

        name, options = parse(self.recover, "--recover")
        made: Recover = build(Recover, {"method": name, **options}, f"recovery '{name}'", "--recover")
        return made

    @property
    def needs_data(self) -> bool:
        """Whether the criterion or the recovery runs the model."""
        by_groups = self.by_groups and (self.scorer.needs_data or self.by_obs or self.head_scale == "auto")
        by_groups |= bool(self.scored_kinds) and self.scorer.needs_data
        return by_groups or self.recovery.method != "none" or (self.tokens is not None and self.tokens.needs_data)

    @property
    def group_kinds(self) -> tuple[Kind | str, ...]:
        """The kinds of groups that may be cut: all but tokens."""
        return tuple(k for k in self.kinds if str(k) != str(Kind.TOKEN))

    @property
    def by_groups(self) -> bool:
        """Whether groups take part at all."""
        return self.budget is not None and bool(self.group_kinds)

    @property
    def scored_kinds(self) -> tuple[Kind | str, ...]:
        """The kinds that are chosen by score: of groups under the budget, and of so many layers."""
        layers = self.layers.kinds if self.layers is not None and self.layers.drop else ()
        return (*(self.group_kinds if self.by_groups else ()), *layers)

    def at(self, budget: Budget | None) -> Goal:
        """The same wish under another budget, with the same criterion and ranking: they remember what they found."""
        made = dataclasses.replace(self, budget=budget)
        made.__dict__.update(scorer=self.scorer, ranks=self.ranks)
        return made

    @cached_property
    def ranks(self) -> dict[str, Any]:
        """What the ranking by OBS remembers."""
        return {}

    @property
    def scale(self) -> float:
        """The head scale as a number. Raises OptionError when it is none."""
        try:
            return float(self.head_scale)
        except ValueError:
            raise OptionError(
                f"'{self.head_scale}' is no head scale", where="--head-scale", cure="write a number, or auto"
            ) from None

    @property
    def by_obs(self) -> bool:
        """Whether OBS says which neurons stay: it presumes that the others are fitted afterwards."""
        layers = {str(k) for k in self.group_kinds} <= set(map(str, LAYERS))  # no neurons to choose
        mixed = self.scorer.comparable and self.scorer.name != "obs" and not self.rearrange and not layers
        fitted = self.recovery.method not in ("none", "scale")
        return self.members == "obs" or (self.members == "auto" and mixed and fitted)


def default_criterion(data: Any) -> str:
    """The best that the inputs allow."""
    return "l2" if data is None else "trajectory"


def kinds_of(prune: str | Sequence[str | Kind] | None) -> tuple[Kind | str, ...]:
    """Kinds to prune from what the user wrote: plural or singular, and ``heads`` takes KV groups along.

    >>> [str(k) for k in kinds_of("heads,ffn")]
    ['head', 'kv', 'ffn']
    """
    if prune is None:
        return DEFAULT_KINDS
    words = prune.split(",") if isinstance(prune, str) else [str(p) for p in prune]
    known, kinds = registry.names("kind"), []
    for word in (w.strip().lower() for w in words):
        kind = word if word in known else word.removesuffix("s")
        kinds += ["head", "kv"] if word == "heads" else [kind if kind in known else word]
    return tuple(dict.fromkeys(kinds))


def kinds_and_tokens(
    prune: str | Sequence[str | Kind] | None, tokens: str | None, unmerge: bool
) -> tuple[tuple[Kind | str, ...], TokenGoal | None]:
    """What ``--prune``, ``--tokens`` and ``--unmerge`` say together."""
    kinds = kinds_of(prune)
    return kinds, token_goal(tokens, kinds, unmerge)


WIDER = (Kind.QK, Kind.V, Kind.WIDTH)
"""Kinds that pay on some models and cost on others: data say which."""


def with_alternatives(goal: Goal, asked: Decision) -> Goal:
    """The goal with what is to be tried beside it: kinds where nobody named any, a criterion where nobody named one,
    and there are data to judge by."""
    alone = goal.tokens is None and goal.layers is None and goal.rounds == 1
    plain = alone and goal.budget is not None and goal.budget.metric != "latency"
    if asked.data is None or not plain or not goal.scorer.comparable:
        return goal
    fitted = goal.recovery.method not in ("none", "scale")
    named = asked.importance is not None or asked.members != "auto"
    return dataclasses.replace(goal, wider=() if asked.prune is not None else WIDER, rival=fitted and not named)


def check_samples(asked: int | str) -> None:
    """Raise OptionError for what is neither a positive number nor ``auto``."""
    if isinstance(asked, str) and asked != "auto":
        raise OptionError(
            "samples are a whole number, or auto",
            where=f"--samples {asked}",
            cure="leave it away for as many as cost little",
        )
    if not isinstance(asked, str) and asked < 1:
        raise OptionError("at least one sample is needed", where=f"--samples {asked}")
