"""What the user wants zeroed inside weights: ``32x32``, ``32x32{allocation=lsp,slice=0.7}``, ``2:4{permute=false}``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import registry
from ..errors import OptionError
from ..ir.cost import Budget
from ..ir.group import Kind
from ..ir.sparsity import TWO_OF_FOUR, tile_of
from ..ir.spec import build, parse
from .limits import AUTO
from .options import Budgets, Decision

if TYPE_CHECKING:
    from ..passes.analysis.importance.tiles import TileCriterion
    from ..passes.search.search_blocks import SearchBlocks
    from ..passes.transform.recover_blocks import RecoverBlocks


TILE = "32x32"


@dataclass(frozen=True)
class Tiling:
    """Options of ``--blocks`` and ``--sparse``.

    slice       share of the FLOPs that slicing leaves before tiles are chosen; 1: nothing is sliced; auto: several are
                tried with the data, and the one whose outputs stay closest to the dense ones is taken
    allocation, power, smooth   of ``SearchBlocks``
    floor       smallest share of a layer's tiles that stays (see ``FindBlocks``)
    ends        tiles in patch embeddings and classifiers as well
    permute     of 2:4: put the neurons of feed-forward parts in an order that loses less
    table       path of a recorded table of timings for the target's gate; by default what ``fxprune tune`` keeps
    """

    slice: float | str = 1.0
    allocation: str = "auto"
    power: bool = True
    smooth: float = 0.6
    floor: float = 0.1
    ends: bool = False
    permute: bool = True
    table: str = ""

    def __post_init__(self) -> None:
        share = 1.0 if self.slice == AUTO else self.slice
        if isinstance(share, str) or not 0 < share <= 1:
            raise OptionError(
                "slice is a share of the FLOPs", where=f"slice={share}", cure=f"write 0.7, {AUTO}, or leave it away"
            )


@dataclass(frozen=True)
class TileGoal:
    """Zeros inside weights, after slicing.

    text       as it was given, for ``--blocks`` or ``--sparse``
    budget     of the whole result against the dense model, in effective MACs; None with 2:4
    criterion  of tiles, with its options;  recover: of tiles
    freeze     globs of parameters to leave dense

    Unknown names and options are OptionErrors as soon as it is made.
    """

    text: str
    budget: Budget | None
    criterion: str
    recover: str
    freeze: tuple[str, ...] = ()
    pattern: str = field(default="", init=False)
    tiling: Tiling = field(default=Tiling(), init=False)

    def __post_init__(self) -> None:
        name, options = parse(self.text, self.where)
        tile_of(name)
        object.__setattr__(self, "pattern", name)
        object.__setattr__(self, "tiling", build(Tiling, options, f"'{name}'", self.where))
        self.search  # noqa: B018  reads allocation and budget
        self.recovery  # noqa: B018
        if not self.scorer.scores_tiles:
            raise OptionError(
                f"'{self.scorer.name}' does not score tiles",
                where=f"--importance {self.criterion}",
                cure="use lsp, magnitude, wanda or obert",
            )

    @property
    def shares(self) -> bool:
        """Whether it is to be found how much of the budget slicing takes."""
        return self.tiling.slice == AUTO

    @property
    def where(self) -> str:
        """The option that it came from."""
        return f"{'--sparse' if self.text.startswith(TWO_OF_FOUR) else '--blocks'} {self.text}"

    @cached_property
    def scorer(self) -> TileCriterion:
        """The criterion itself."""
        from ..passes.analysis.score_groups import criterion

        found: Any = criterion(self.criterion)
        return found

    @property
    def search(self) -> SearchBlocks:
        """The search, with the budget against the dense model."""
        from ..passes.search.search_blocks import SearchBlocks

        return SearchBlocks(self.budget, self.tiling.allocation, self.tiling.power, self.tiling.smooth)

    @cached_property
    def recovery(self) -> RecoverBlocks:
        """The recovery, without data."""
        from ..passes.transform.recover_blocks import METHODS, RecoverBlocks

        name, options = parse(self.recover, "--recover")
        return (
            build(RecoverBlocks, {"method": name, **options}, f"recovery '{name}'", "--recover")
            if name in METHODS
            else RecoverBlocks()
        )

    @property
    def needs_data(self) -> bool:
        return self.scorer.needs_data or self.recovery.method != "none"


def kinds_and_blocks(
    kinds: Sequence[Any], blocks: str | None, sparse: str | None, flops: Any, data: bool = False
) -> tuple[tuple[Any, ...], str | None]:
    """(kinds of groups, ``--blocks``) where ``--prune`` names blocks beside other kinds.

    Blocks alone take the whole budget. Beside other kinds the data say how much each takes; without any slicing and
    tiles leave the same share, unless ``blocks`` says otherwise. Raises OptionError where that share cannot be told.

    >>> kinds_and_blocks(("head", "ffn", "block"), None, None, 0.25)
    (('head', 'ffn'), '32x32{slice=0.5}')
    >>> kinds_and_blocks(("head", "ffn", "block"), None, None, 0.25, data=True)
    (('head', 'ffn'), '32x32{slice=auto}')
    """
    rest = tuple(kind for kind in kinds if str(kind) != str(Kind.BLOCK))
    if len(rest) == len(kinds) or blocks is not None or sparse is not None:
        return rest, blocks
    if not rest:
        return rest, TILE
    budget = None if flops is None else Budget.parse("flops", flops)
    if budget is not None and data:
        return rest, f"{TILE}{{slice={AUTO}}}"
    if budget is None or not budget.relative:
        raise OptionError(
            "how much slicing takes before tiles is not known",
            where="--prune ..,blocks",
            why="the budget is no share of the FLOPs",
            cure=f"give `--flops 0.5`, or `--blocks '{TILE}{{slice=0.7}}'`",
        )
    return rest, f"{TILE}{{slice={math.sqrt(budget.amount):.6g}}}"


def split_request(
    budget: Budgets, decision: Decision, freeze: Any, plain: bool = False
) -> tuple[TileGoal | None, Budgets, Decision]:
    """What ``--blocks`` or ``--sparse`` asks for, and what is left for slicing: its budget, and how it decides.

    With ``--blocks`` the budget is that of both; ``slice=0.7`` says how much of it slicing takes. With ``--sparse`` the
    budget is slicing's own, and there need not be any. ``--importance`` is of tiles when it names a criterion of tiles,
    else of slicing. plain: without recovery (a plan is only decided)
    """
    blocks, sparse, data = decision.blocks, decision.sparse, decision.data is not None
    if blocks is None and sparse is None:
        return None, budget, decision
    if blocks is not None and sparse is not None:
        raise OptionError(
            "tiles and 2:4 do not go together", where=f"--blocks {blocks} --sparse {sparse}", cure="give one of them"
        )
    text = str(blocks if blocks is not None else sparse)
    pattern, _ = parse(text, "--blocks" if sparse is None else "--sparse")
    if (pattern == TWO_OF_FOUR) != (sparse is not None):
        raise OptionError(
            f"'{text}' cannot be read",
            where="--sparse" if sparse is not None else "--blocks",
            cure="write `--sparse 2:4`, or `--blocks 32x32`",
        )
    importance, whole = decision.importance, None
    if sparse is None:
        if budget.flops is None or (budget.params, budget.bytes) != (None, None):
            raise OptionError("tiles have a budget of FLOPs", where=f"--blocks {text}", cure="give `--flops 0.5`")
        whole = Budget.parse("flops", budget.flops)
    of_tiles = importance is not None and _scores_tiles(importance)
    usual = ("lsp" if sparse is None else "obert") if data else "magnitude"
    recover = "none" if plain or not data else decision.recover or "auto"
    wish = TileGoal(
        text,
        whole,
        importance if of_tiles and importance else usual,
        recover,
        (freeze,) if isinstance(freeze, str) else tuple(freeze),
    )
    rest = replace(decision, importance=None if of_tiles else importance)
    if parse(recover, "--recover")[0] == "obs":  # slicing has no recovery of this name
        rest = replace(rest, recover="auto")
    if sparse is None:
        cut = wish.tiling.slice
        if cut == AUTO and not data:
            raise OptionError(
                "how much slicing takes before tiles is found with data, and there is none",
                where=wish.where,
                cure=f"give `--data`, or `--blocks '{pattern}{{slice=0.7}}'`",
            )
        return wish, budget if cut == AUTO else replace(budget, flops=None if cut == 1 else cut), rest
    if wish.tiling.slice != 1:
        raise OptionError(
            "2:4 takes its share whatever slicing leaves",
            where=wish.where,
            cure="give slicing's budget as `--flops 0.7`",
        )
    return wish, budget, rest


def _scores_tiles(importance: str) -> bool:
    name, _ = parse(importance, "--importance")
    found: Any = registry.lookup("criterion", name)
    return bool(getattr(found, "scores_tiles", False))
