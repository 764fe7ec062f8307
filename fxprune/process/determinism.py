"""The same numbers at every run: seeded generators, and products that do not round to ten bits on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def seed_generators(seed: int) -> Iterator[None]:
    """torch's global generators begin at ``seed`` in every such block; the caller's, those of GPUs included, are left
    as they were."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products and convolutions of a GPU in fp32 while the block lasts.

    cuDNN takes TF32 by itself: 10 bits, which moves outputs by 1e-3, more than what a proof or a fit may be off. What
    the caller chose by torch's newer switches (``fp32_precision``) is left alone: the older ones cannot be read then.
    """
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if torch.cuda.is_available() else ()
    try:
        before = [one.allow_tf32 for one in switches]
    except RuntimeError:
        before = []
    if not any(before):
        yield
        return
    try:
        for one in switches:
            one.allow_tf32 = False
        yield
    finally:
        for one, value in zip(switches, before, strict=True):
            one.allow_tf32 = value
