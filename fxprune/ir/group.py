"""Prune groups: what can be removed together, and where that reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from .axis import Axis, Dim


class Kind(str, Enum):
    """What a group's elements are. Only a name for policy and people: slicing never looks at it."""

    HEAD = "head"  # attention heads; a whole KV group under GQA/MQA is KV
    KV = "kv"
    QUERY = "query"  # query heads inside each KV group (the same ones in every group)
    QK = "qk"  # width of queries and keys
    V = "v"  # width of values
    QKV = "qkv"  # width shared by queries, keys and values (fused projections)
    FFN = "ffn"
    CHANNEL = "channel"
    WIDTH = "width"  # residual width and other axes under a norm's statistics
    EXPERT = "expert"
    BLOCK = "block"
    LAYER = "layer"
    TOKEN = "token"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


DEFAULT_KINDS = (Kind.HEAD, Kind.KV, Kind.FFN, Kind.CHANNEL)
"""Pruned when the user does not say otherwise: cutting them is exact and keeps every tensor's meaning."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer that a group's elements index.

    ``dim`` is the whole expression of that dimension, so one group may sit in it as the inner factor of a product
    and inside two segments of a sum at once.
    """

    parameter: str
    position: int
    dim: Dim


@dataclass(frozen=True)
class OpUse:
    """A product with a weight that a group passes through, and what cannot be done there: why, or "".

    recovery     the weight cannot be moved to make up for what is gone
    cost         its multiply-accumulates are in no budget
    importance   no criterion that runs the model sees removals here
    """

    node: str
    op: str
    recovery: str = ""
    cost: str = ""
    importance: str = ""


@dataclass(frozen=True)
class PruneGroup:
    """``size`` interchangeable elements that live and die together.

    name         unique and stable: the parameter slot that best names it, e.g. ``blocks.0.mlp.fc1.weight[0]``
    axis         the leaf axis (None for groups read back from a plan)
    slots        every parameter or buffer dimension it reaches
    exact        cutting it equals masking it; False where a norm's statistics then run over the kept elements
    frozen       why it must not be cut, or "" when it may
    macs         multiply-accumulates that one element costs in the dense program at its example shapes
    nodes        graph nodes that contract it (its consumers), for people
    granularity  kept counts are multiples of this, or the full size
    floor        the smallest kept count a search may choose
    uses         the products with a weight that it passes through, and what is not known of them
    """

    name: str
    kind: Kind
    size: int
    axis: Axis
    slots: tuple[Slot, ...] = ()
    exact: bool = True
    frozen: str = ""
    macs: int = 0
    nodes: tuple[str, ...] = ()
    granularity: int = 1
    floor: int = 1
    uses: tuple[OpUse, ...] = ()

    @property
    def prunable(self) -> bool:
        return not self.frozen and self.size > 1

    def levels(self) -> list[int]:
        """Kept counts that a plan may choose, ascending; the last one is ``size``."""
        step = self.granularity
        counts = [k for k in range(0, self.size, step) if k >= self.floor]
        return [*counts, self.size]

    def but(self, **changes: object) -> PruneGroup:
        return replace(self, **changes)  # type: ignore[arg-type]
