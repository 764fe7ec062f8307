"""Calibration batches, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.signature import samples_in

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """One batch: positional and keyword inputs as the model takes them, and labels [batch] or [batch, ...] or None."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples: the first dimension of the first tensor."""
        return samples_in(self.leaves)

    @property
    def leaves(self) -> list[Any]:
        """All inputs, those inside containers as well, in the order of the model's own."""
        return list(pytree.tree_leaves((tuple(self.args), dict(self.kwargs))))

    def pick(self, index: Tensor) -> Batch:
        """The samples at ``index`` [count]; what does not have one entry per sample stays whole."""
        size = self.size

        def part(value: Any) -> Any:
            whole = not isinstance(value, Tensor) or not value.dim() or len(value) != size
            return value if whole else value[index.to(value.device)]

        args, kwargs = pytree.tree_map(part, (tuple(self.args), dict(self.kwargs)))
        return Batch(args, kwargs, part(self.labels))


@dataclass(frozen=True)
class Calibration:
    """A few batches and where they came from. ``generated`` is True when nobody gave data: results say so loudly."""

    batches: tuple[Batch, ...]
    origin: str
    generated: bool = False

    @property
    def samples(self) -> int:
        """Number of samples over all batches (the first dimension of each batch's first tensor)."""
        return sample_count(self.batches)

    @property
    def labelled(self) -> bool:
        return all(b.labels is not None for b in self.batches)


def sample_count(batches: Iterable[Batch]) -> int:
    """Number of samples in all batches."""
    return sum(batch.size for batch in batches)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, evenly spaced, all of them where there are no more: a start alone may be of one kind.

    >>> evenly("abcdefgh", 4), evenly("ab", 3)
    (['b', 'd', 'f', 'h'], ['a', 'b'])
    """
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
