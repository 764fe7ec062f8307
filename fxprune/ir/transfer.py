"""Batches on their way from memory to a GPU: pinned, and copied while it still computes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PINNED = 2**33
"""Bytes of calibration data that are pinned at most: pinned memory is taken from everybody else on the machine."""


def send(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``; itself where it lies there.

    To a GPU it goes on a stream of its own: kernels that were launched before need not end first, and who uses it next
    on the usual stream waits for this copy alone. From memory that is pinned (:func:`pin`) the caller does not wait.
    """
    if value.device == device:
        return value
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    side, usual = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        sent = value.to(device, non_blocking=True)
    usual.wait_stream(side)
    sent.record_stream(usual)  # its memory is not given to another copy before the kernels that read it are done
    return sent


def pin(value: Tensor) -> Tensor:
    """``value`` in memory that a GPU reads by itself; itself where there is no GPU, or it is no plain CPU tensor."""
    if (
        not torch.cuda.is_available()
        or value.device.type != "cpu"
        or value.layout != torch.strided
        or value.is_pinned()
    ):
        return value
    return value.pin_memory()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
