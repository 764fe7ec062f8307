"""The seam to several processes: sums over all of them, and one solution for all of them.

Calibration batches are shared out by ``ranks.mine``; moments are plain sums and are added up by ``ranks.add_up``. The
solution is that of one process, so that all go on with the same bits whatever their hardware. With one process both
functions give back what they were given (the moments as sums about zero).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....process.ranks import add_up, mine
from .moments import Moments


def share_moments(moments: Moments, inputs: int, outputs: int) -> Moments:
    """The moments of the rows of all processes. Every process must call this for the same sites in the same order.

    inputs, outputs   k and o of the layer: a process without a batch still takes part
    """
    return Moments.of(add_up(moments.tensors(inputs, outputs)), moments.products)


def from_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as the one process has them that owns job 0 of one: a broadcast by adding zeros."""
    if len(mine(1)):
        return add_up(tensors)
    return add_up({name: torch.zeros_like(t) for name, t in tensors.items()})
