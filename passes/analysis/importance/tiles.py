"""What criteria of tiles share: they score the tiles of weights, and need BLOCK groups to do it."""

from __future__ import annotations

from ....errors import OptionError
from ....ir.linear_layers import BlockGroup
from ....ir.program import Program
from .criterion import Criterion, prunable


class TileCriterion(Criterion):
    """A criterion whose elements are the tiles of weights (``FindBlocks``), not heads or neurons."""

    scores_tiles = True


def tiles(program: Program, name: str) -> list[BlockGroup]:
    """The groups to score. Raises OptionError where the groups are none of tiles."""
    found = prunable(program)
    blocks = [g for g in found if isinstance(g, BlockGroup)]
    if len(blocks) != len(found):
        raise OptionError(
            f"'{name}' scores the tiles of weights",
            where=f"--importance {name}",
            why="heads and neurons are to be pruned here",
            cure="say which tiles: `--blocks 32x32`; `--importance l2` scores heads and neurons by their weights",
        )
    return blocks
