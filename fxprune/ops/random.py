"""Random token dropping: the baseline that a method has to beat."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .library import Shape, define
from .order import places, rank
from .reduction import check_counts, outline, sizes, unchanged, with_protected

_PRIME = 2**31 - 1  # squares of its residues fit in int64
_ROUNDS = 3


def drop_tokens(x: Tensor, size: Tensor | None, r: int, protected: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drop ``r`` unprotected tokens at random, the same for every image and every run.

    x          [batch, tokens, width]
    size       input tokens that each token stands for, None for ones; gathered along. [batch, tokens, 1]
    r          how many tokens go: 0 to tokens - protected - 1
    protected  the first so many tokens stay
    seed       which tokens go: a choice made once, when the op is called or traced
    returns    x' [batch, tokens - r, width] by position; their sizes; the place in x' of each token, -1 for those that
               went [batch, tokens]
    """
    tokens = x.shape[1]
    check_counts(tokens, r, protected, tokens - protected - 1)
    if r == 0:
        return unchanged(x, size)
    # Hashed positions as scores: a tensor of chosen positions would be a constant, which decomposition loses.
    draw = random.Random(seed)
    mixed = torch.arange(tokens, device=x.device)
    for _ in range(_ROUNDS):
        factor, shift = draw.randrange(1, _PRIME), draw.randrange(_PRIME)
        mixed = (mixed * factor + shift) % _PRIME
        mixed = mixed * mixed % _PRIME
    stays = rank(mixed[None, protected:]) < tokens - protected - r
    kept, place = places(with_protected(stays, protected), tokens - r)
    kept = kept[0]
    return x.index_select(1, kept), sizes(x, size).index_select(1, kept), place.repeat(x.shape[0], 1)


def drop_macs(x: Shape, size: Shape | None, r: int, protected: int, seed: int) -> int:
    """Nothing is multiplied."""
    return 0


DROP = define(
    "drop_tokens",
    "(Tensor x, Tensor? size, int r, int protected, int seed) -> (Tensor, Tensor, Tensor)",
    drop_tokens,
    drop_macs,
    outline,
)
