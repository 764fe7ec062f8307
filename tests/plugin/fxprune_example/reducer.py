"""A token reducer, with the op that it inserts and that op's rule."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.extend import Reducer, check_counts, define, reduced, rule, sizes, unchanged


def crop_tokens(x: Tensor, size: Tensor | None, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the last ``r`` tokens. Static counts: (x', their sizes, every token's place or -1)."""
    tokens = x.shape[1]
    check_counts(tokens, r, protected, tokens - protected - 1)
    if r == 0:
        return unchanged(x, size)
    place = torch.arange(tokens, device=x.device)
    place = torch.where(place < tokens - r, place, -1).repeat(x.shape[0], 1)
    return x[:, : tokens - r].clone(), sizes(x, size)[:, : tokens - r].clone(), place


def crop_macs(x: tuple[int, ...], size: tuple[int, ...] | None, r: int, protected: int) -> int:
    """Nothing is multiplied."""
    return 0


SCHEMA = "(Tensor x, Tensor? size, int r, int protected) -> (Tensor, Tensor, Tensor)"
define("crop_tokens", SCHEMA, crop_tokens, crop_macs)
rule("fxprune::crop_tokens")(reduced)


@dataclass(frozen=True)
class Crop(Reducer):
    """The last tokens go."""

    name = "crop"
    merges = False

    def reduce(self, taps: Any, r: int) -> Any:
        return taps.op("crop_tokens", taps.x, taps.size, r, taps.protected)
