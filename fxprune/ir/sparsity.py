"""``Sparsity``: which entries of one weight stay, in tiles or two of every four."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import OptionError, PlanError

TWO_OF_FOUR = "2:4"
Tile = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Sparsity:
    """What stays of one weight seen as a matrix [out, in], whichever way round it is stored.

    pattern  ``32x32``: tiles of 32 outputs by 32 inputs, or ``2:4``: two of every four neighbouring inputs of an output
    shape    (out, in)
    kept     bool [ceil(out / BN), ceil(in / BK)]: True where a tile stays; with 2:4 a tile is a single weight
    order    the inputs, where they were put in another order first (and what makes them with them), else ()
    """

    kind: ClassVar[str] = "block"
    pattern: str
    shape: tuple[int, int]
    kept: Tensor
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.order and sorted(self.order) != list(range(self.shape[1])):
            raise PlanError(
                "the order of the inputs is none",
                where=f"{self.pattern} of {list(self.shape)}",
                why=f"it must name each of {self.shape[1]} inputs once",
            )
        want = grid(self.shape, self.tile)
        if tuple(self.kept.shape) != want or self.kept.dtype != torch.bool:
            raise PlanError(
                "the tiles do not fit the weight",
                where=f"{self.pattern} of {list(self.shape)}",
                why=f"{list(self.kept.shape)} tiles, expected {list(want)}",
            )

    @property
    def tile(self) -> Tile:
        return tile_of(self.pattern)

    @property
    def tiles(self) -> int:
        return self.kept.numel()

    @property
    def whole(self) -> bool:
        """Whether nothing goes, and nothing moves."""
        return bool(self.kept.all()) and not self.order

    @property
    def density(self) -> float:
        """Share of the entries that stay; tiles at ragged borders count for what they hold."""
        areas = tile_areas(self.shape, self.tile)
        return float(areas[self.kept].sum()) / float(areas.sum())

    def mask(self) -> Tensor:
        """True where an entry stays. [out, in] bool"""
        return spread(self.kept, self.shape, self.tile)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sparsity)
            and torch.equal(self.kept, other.kept)
            and (self.pattern, self.shape, self.order) == (other.pattern, other.shape, other.order)
        )

    def to_dict(self, bare: bool = False) -> dict[str, Any]:
        """Plain data for a plan: kept tiles by number, row by row; single weights as bits in base64. bare: no kind"""
        keep: Any = self.kept.flatten().nonzero()[:, 0].tolist() if self.pattern != TWO_OF_FOUR else _bits(self.kept)
        order = {"order": list(self.order)} if self.order else {}
        kind = {} if bare else {"kind": self.kind}
        return {**kind, "pattern": self.pattern, "shape": list(self.shape), "keep": keep, **order}

    @staticmethod
    def from_dict(entry: Any, where: str) -> Sparsity:
        """What :meth:`to_dict` made. Raises PlanError at ``where`` for anything else."""
        if not isinstance(entry, Mapping) or not {"pattern", "shape", "keep"} <= entry.keys():
            raise PlanError("the plan is malformed", where=where, why="an entry needs pattern, shape and keep")
        pattern, shape, keep = entry["pattern"], entry["shape"], entry["keep"]
        sizes = isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and s > 0 for s in shape)
        if not isinstance(pattern, str) or not sizes:
            raise PlanError(
                "the plan is malformed", where=where, why="pattern must be a string, shape two positive integers"
            )
        try:
            rows, columns = grid((shape[0], shape[1]), tile_of(pattern))
        except OptionError as error:
            raise PlanError("the plan is malformed", where=where, why=error.what) from None
        kept = (
            _from_bits(keep, rows * columns, where)
            if pattern == TWO_OF_FOUR
            else _from_indices(keep, rows * columns, where)
        )
        order = entry.get("order", [])
        if not isinstance(order, list) or not all(type(i) is int for i in order):
            raise PlanError("the plan is malformed", where=where, why="order must be a list of integers")
        try:
            return Sparsity(pattern, (shape[0], shape[1]), kept.view(rows, columns), tuple(order))
        except PlanError as error:
            raise PlanError(error.what, where=where, why=error.why) from None


def tile_of(pattern: str) -> Tile:
    """``32x16`` -> (32, 16) and ``2:4`` -> (1, 1). Raises OptionError for anything else.

    >>> tile_of("32x16")
    (32, 16)
    """
    if pattern == TWO_OF_FOUR:
        return 1, 1
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", pattern)
    if found is None or "0" in found.groups():
        raise OptionError(
            f"'{pattern}' is no tile", where=f"--blocks {pattern}", cure="write outputs x inputs, for example 32x32"
        )
    return int(found[1]), int(found[2])


def grid(shape: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """How many tiles cover a matrix.

    >>> grid((100, 64), (32, 32))
    (4, 2)
    """
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def tile_areas(shape: tuple[int, int], tile: Tile) -> Tensor:
    """Entries in each tile, fewer at ragged borders. [rows, columns] int64"""
    rows, columns = grid(shape, tile)
    high = torch.full((rows,), tile[0])
    wide = torch.full((columns,), tile[1])
    high[-1] = shape[0] - (rows - 1) * tile[0]
    wide[-1] = shape[1] - (columns - 1) * tile[1]
    return high[:, None] * wide[None, :]


def tile_sums(matrix: Tensor, tile: Tile) -> Tensor:
    """Sum of every tile. [.., out, in] -> [.., rows, columns]"""
    rows, columns = grid((matrix.shape[-2], matrix.shape[-1]), tile)
    padded = functional.pad(matrix, (0, columns * tile[1] - matrix.shape[-1], 0, rows * tile[0] - matrix.shape[-2]))
    return padded.reshape(*matrix.shape[:-2], rows, tile[0], columns, tile[1]).sum((-3, -1))


def spread(values: Tensor, shape: tuple[int, int], tile: Tile) -> Tensor:
    """Every entry of a matrix of ``shape`` with the value of its tile. [rows, columns] -> [out, in]"""
    return values.repeat_interleave(tile[0], 0)[: shape[0]].repeat_interleave(tile[1], 1)[:, : shape[1]]


def two_of_four(values: Tensor) -> Tensor:
    """True at the two largest of every four neighbours along the last dimension (the first of equals wins). [out, in]

    Where fewer than four are left over at the end, all of the first two stay, or the larger ones.
    """
    columns = values.shape[-1]
    padded = functional.pad(values, (0, -columns % 4), value=-torch.inf).unflatten(-1, (-1, 4))
    order = padded.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return kept.flatten(-2)[..., :columns]


def is_two_of_four(weight: Tensor) -> bool:
    """Whether every four inputs of every output hold two zeros at least; what is left over at the end is not asked."""
    whole = weight[:, : weight.shape[1] // 4 * 4]
    return whole.numel() > 0 and bool(((whole != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def _bits(kept: Tensor) -> str:
    flat = functional.pad(kept.flatten().to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return base64.b64encode(bytes((flat * weights).sum(1).tolist())).decode("ascii")


def _from_bits(text: Any, count: int, where: str) -> Tensor:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise PlanError("the plan is malformed", where=where, why="keep must be base64 text") from None
    if len(raw) != -(-count // 8):
        raise PlanError("the plan is malformed", where=where, why=f"keep holds {8 * len(raw)} bits, expected {count}")
    bytes_ = torch.tensor(list(raw), dtype=torch.int64)
    bits = (bytes_[:, None] >> torch.arange(7, -1, -1)) & 1
    return bits.flatten()[:count].bool()


def _from_indices(keep: Any, count: int, where: str) -> Tensor:
    if not isinstance(keep, list) or not all(type(i) is int for i in keep):
        raise PlanError("the plan is malformed", where=where, why="keep must be a list of integers")
    if any(b <= a for a, b in itertools.pairwise(keep)):
        raise PlanError("kept tiles must be sorted and unique", where=where)
    if keep and (keep[0] < 0 or keep[-1] >= count):
        raise PlanError(
            "a kept tile is out of range", where=where, why=f"tiles must be 0..{count - 1}, found {keep[0]}..{keep[-1]}"
        )
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.tensor(keep, dtype=torch.long)] = True
    return kept
