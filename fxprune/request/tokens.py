"""What the user wants done with tokens: ``tome``, ``tome{schedule=constant}``, ``tome:r=13``, ``ppt:r=50@3,6,9``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, nearest
from ..ir.spec import build, parse

if TYPE_CHECKING:
    from ..passes.transform.reducers.reducer import Reducer

SCHEDULES = ("auto", "optin", "removal", "constant", "decreasing")
DEFAULT = "tome"
_EXPLICIT = re.compile(r"r=(?P<counts>\d+(,\d+)*)(@(?P<sites>\d+(,\d+)*))?")


@dataclass(frozen=True)
class TokenSearchOptions:
    """Options of ``--tokens`` that every reducer has.

    schedule   ``optin``: rank elimination on merge curves; ``removal``: on tokens removed one by one; ``constant``,
               ``decreasing``: ToMe's; ``auto``: optin, decreasing and constant are tried on the calibration data, and
               the best is improved
    share      of what the budget takes away that tokens take, beside heads, neurons and channels; None: a few are
               tried on the calibration data
    improve    trials of moving tokens from one site to another (``auto`` only)
    guard      ``optin``, ``removal`` and ``auto`` give way to the constant schedule where, on the calibration data,
               they are not better than it by two standard errors
    aware      ranks are eliminated by score per cost saved; else by the score alone, the paper's order
    mean_first features are compared after their maps were averaged over tokens, as OPTIN's code has it; else token by
               token, as the paper writes
    multiple   of which the tokens left behind every site are, where it can be: some kernels like 8 or 16
    seen       calibration samples that schedules are scored and compared on
    """

    schedule: str = "auto"
    share: float | None = None
    improve: int = 16
    guard: bool = True
    aware: bool = True
    mean_first: bool = False
    multiple: int = 1
    seen: int = 256

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise OptionError(
                f"unknown schedule '{self.schedule}'",
                where="--tokens {schedule=}",
                cure=nearest(self.schedule, SCHEDULES),
            )
        if self.share is not None and not 0 <= self.share <= 1:
            raise OptionError("share is between 0 and 1", where=f"--tokens {{share={self.share}}}")
        if self.improve < 0 or min(self.seen, self.multiple) < 1:
            raise OptionError(
                "improve is a count, multiple at least 1, and at least one sample must be seen",
                where="--tokens",
                why=f"improve={self.improve}, multiple={self.multiple}, seen={self.seen}",
            )


@dataclass(frozen=True)
class TokenGoal:
    """How tokens are to become fewer.

    text      as it was given
    unmerge   heads that read every token get them back
    reducer   ``name{option=value}``;  deciding: what decides the counts
    counts    explicit ones, () where the budget decides: one for all, or one per site; ``sites``: at these alone,
              numbered from 0 in graph order (the reference code's block numbers)
    """

    text: str
    unmerge: bool = False
    reducer: str = field(default="", init=False)
    deciding: TokenSearchOptions = field(default=TokenSearchOptions(), init=False)
    counts: tuple[int, ...] = field(default=(), init=False)
    sites: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        where = f"--tokens {self.text}"
        head, colon, tail = self.text.rpartition(":") if re.search(r":[^{}]*$", self.text) else (self.text, "", "")
        name, given = parse(head, "--tokens")
        shared = {f for f in TokenSearchOptions.__dataclass_fields__}
        mine = {k: v for k, v in given.items() if k in shared}
        own = ",".join(f"{k}={v}" for k, v in given.items() if k not in shared)
        deciding: TokenSearchOptions = build(TokenSearchOptions, mine, "tokens", "--tokens")
        object.__setattr__(self, "deciding", deciding)
        object.__setattr__(self, "reducer", name + (f"{{{own}}}" if own else ""))
        if colon:
            match = _EXPLICIT.fullmatch(tail.strip())
            if not match:
                raise OptionError(
                    f"'{tail}' does not say how many tokens go",
                    where=where,
                    cure="write r=13, r=16,12,8 (per attention) or r=50@3,6,9 (at these alone)",
                )
            object.__setattr__(self, "counts", tuple(map(int, match["counts"].split(","))))
            object.__setattr__(self, "sites", tuple(map(int, match["sites"].split(","))) if match["sites"] else ())
            if self.sites and len(self.counts) not in (1, len(self.sites)):
                raise OptionError(
                    "the counts and the places do not go together",
                    where=where,
                    why=f"{len(self.counts)} counts at {len(self.sites)} places",
                )
        self.method  # noqa: B018  reads the reducer's name and options

    @cached_property
    def method(self) -> Reducer:
        """The reducer itself."""
        from ..passes.transform.merge_tokens import reducer_of

        return reducer_of(self.reducer)

    @property
    def explicit(self) -> bool:
        return bool(self.counts)

    @property
    def needs_data(self) -> bool:
        """Whether the model must run to decide."""
        by_shape = self.deciding.schedule in ("constant", "decreasing") and self.deciding.share is not None
        return not (self.explicit or by_shape)

    def resolve_counts(self, fits: Callable[[Sequence[int]], list[int]], known: int) -> list[int]:
        """The explicit counts, one per usable site, within what may go at once (``fits``).

        A list that is shorter than the sites ends in zeros. Raises OptionError for a site that is not there.
        """
        if self.sites and max(self.sites) >= known:
            raise OptionError(
                "there is no such attention",
                where=f"--tokens {self.text}",
                why=f"the model has {known} where tokens can be reduced, numbered from 0",
            )
        counts = [0] * known
        where = self.sites or tuple(range(known))
        each = self.counts * len(where) if len(self.counts) == 1 else self.counts
        if len(each) > len(where):
            raise OptionError(
                "there are more counts than attentions",
                where=f"--tokens {self.text}",
                why=f"{len(each)} counts, {known} attentions where tokens can be reduced",
            )
        for site, r in zip(where, each, strict=False):
            counts[site] = r
        return fits(counts)


def token_goal(tokens: Any, kinds: Sequence[Any], unmerge: bool) -> TokenGoal | None:
    """What ``--tokens`` and ``--prune`` say together; None: tokens stay. Raises OptionError where they disagree."""
    wanted = "token" in map(str, kinds)
    if tokens is None and wanted:
        tokens = DEFAULT
    if tokens in (None, "off"):
        if wanted:
            raise OptionError(
                "tokens cannot be pruned and left alone",
                where="--tokens off --prune tokens",
                cure="leave one of them away",
            )
        if unmerge:
            raise OptionError(
                "nothing is merged, so nothing can be unmerged",
                where="--unmerge",
                cure="give `--tokens tome`, or `--prune tokens`",
            )
        return None
    return TokenGoal(str(tokens), unmerge)
