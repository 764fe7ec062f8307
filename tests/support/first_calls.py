"""Modules that make a table at their first call and keep it, in every place where people keep one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 32
TABLES: dict[int, Tensor] = {}
TABLE: Tensor | None = None


def make_table(width: int) -> Tensor:
    return torch.linspace(0, 1, width)


@functools.lru_cache
def remembered_table(width: int) -> Tensor:
    return make_table(width)


class Holder:
    """An object of the user's own that makes its table when asked."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def get(self, width: int) -> Tensor:
        if self.table is None:
            self.table = make_table(width)
        return self.table


class Slots:
    """The same without a ``__dict__``."""

    __slots__ = ("table",)

    def get(self, width: int) -> Tensor:
        if not hasattr(self, "table"):
            self.table = make_table(width)
        return self.table


class KeepsATable(nn.Module):
    """Two layers behind a table that is added to the input [batch, WIDTH]; subclasses say where it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x + self.table(x.shape[-1]))))

    def table(self, width: int) -> Tensor:
        raise NotImplementedError


class InAnAttribute(KeepsATable):
    kept: Tensor | None = None

    def table(self, width: int) -> Tensor:
        if self.kept is None:
            self.kept = make_table(width)
        return self.kept


class InADict(KeepsATable):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def table(self, width: int) -> Tensor:
        return self.kept.setdefault(width, make_table(width))


class InAList(KeepsATable):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def table(self, width: int) -> Tensor:
        self.kept.append(make_table(width))
        return self.kept[0]


class InAnObject(KeepsATable):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def table(self, width: int) -> Tensor:
        return self.holder.get(width)


class InSlots(KeepsATable):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Slots()

    def table(self, width: int) -> Tensor:
        return self.holder.get(width)


class InItsClass(KeepsATable):
    kept: Tensor | None = None

    def table(self, width: int) -> Tensor:
        if InItsClass.kept is None:
            InItsClass.kept = make_table(width)
        return InItsClass.kept


class InItsFile(KeepsATable):
    def table(self, width: int) -> Tensor:
        global TABLE
        if TABLE is None:
            TABLE = make_table(width)
        return TABLE


class InADictOfItsFile(KeepsATable):
    def table(self, width: int) -> Tensor:
        return TABLES.setdefault(width, make_table(width))


class InACachedFunction(KeepsATable):
    def table(self, width: int) -> Tensor:
        return remembered_table(width)


class InACachedMethod(KeepsATable):
    @functools.lru_cache(None)  # noqa: B019  as people write it
    def table(self, width: int) -> Tensor:
        return make_table(width)


class InACachedProperty(KeepsATable):
    @functools.cached_property
    def kept(self) -> Tensor:
        return make_table(WIDTH)

    def table(self, width: int) -> Tensor:
        return self.kept


class InADefault(KeepsATable):
    def table(self, width: int, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006  as people write it
        return kept.setdefault(width, make_table(width))


class InABufferThatWaits(KeepsATable):
    kept: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)

    def table(self, width: int) -> Tensor:
        if self.kept is None:
            self.kept = make_table(width)
        return self.kept


class InANewBuffer(KeepsATable):
    kept: Tensor

    def table(self, width: int) -> Tensor:
        if not hasattr(self, "kept"):
            self.register_buffer("kept", make_table(width))
        return self.kept


class CountsItsCalls(KeepsATable):
    """A number, a tensor and a buffer that grow with every call."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.number, self.plain = 0, torch.zeros(1)
        self.register_buffer("calls", torch.zeros(1))

    def table(self, width: int) -> Tensor:
        self.number += 1
        self.plain += 1
        self.calls += 1
        return make_table(width)


class MergesWhenEvaluated(KeepsATable):
    """A low-rank update that ``eval`` adds to the weight in place and ``train`` takes away again."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.merged = nn.Parameter(torch.randn(2 * WIDTH, WIDTH)), False

    def train(self, mode: bool = True) -> MergesWhenEvaluated:
        if mode == self.merged:
            self.a.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x) if self.merged else self.a(x) + x @ self.update.T
        return self.b(torch.relu(hidden))


class WritesIntoItsInput(KeepsATable):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        return self.b(torch.relu(self.a(x)))


class Listens(KeepsATable):
    """A hook, as people write them to look at features, keeps what it hears in a list of its closure."""

    def __init__(self) -> None:
        super().__init__()
        heard: list[Any] = []
        self.a.register_forward_hook(lambda module, inputs, output: heard.append(output))
        self.heard = heard

    def table(self, width: int) -> Tensor:
        return make_table(width)


PLACES: tuple[type[KeepsATable], ...] = (
    InAnAttribute,
    InADict,
    InAList,
    InAnObject,
    InSlots,
    InItsClass,
    InItsFile,
    InADictOfItsFile,
    InACachedFunction,
    InACachedMethod,
    InACachedProperty,
    InADefault,
    InABufferThatWaits,
    InANewBuffer,
    CountsItsCalls,
    MergesWhenEvaluated,
    WritesIntoItsInput,
    Listens,
)
