"""Recovery shared out over processes (threads here): each has its batches, all get the weights of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.blocks import Encoder
from support.recovering import analysed, planned, texts
from torch import Tensor

from fxprune.passes.transform.recovery.closed_form import ClosedForm
from fxprune.passes.transform.resize import resize
from fxprune.testing import keep_of


class Ranks:
    """``ranks.mine`` and ``ranks.add_up`` for threads that meet at every sum."""

    def __init__(self, count: int) -> None:
        self.count, self.local, self.barrier = count, threading.local(), threading.Barrier(count)
        self.slots: list[dict[str, Tensor]] = [{} for _ in range(count)]

    def mine(self, count: int) -> range:
        return range(self.local.rank, count, self.count)

    def add_up(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.slots[self.local.rank] = tensors
        self.barrier.wait(60)
        total = {n: torch.stack([s[n] for s in self.slots]).sum(0) for n in tensors}
        self.barrier.wait(60)
        return total

    def each(self, work: Callable[[], Any]) -> list[Any]:
        found: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                found[rank] = work()
            except BaseException as error:
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("batches", [5, 2])
def test_three_processes_find_what_one_finds(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two batches the third process has none and still takes part."""
    data = texts(16 * batches)
    program = planned(analysed(Encoder(depth=1), data))
    keep = keep_of(program, program.need("plan"))
    pruned = program.without_facts(exported=resize(program, keep))
    form = ClosedForm("refit", 0.3, 0.3)
    alone = form.fit(program, pruned, keep, data.batches)
    ranks = Ranks(3)
    for place, name in (("closed_form", "mine"), ("shared", "mine"), ("shared", "add_up")):
        monkeypatch.setattr(f"fxprune.passes.transform.recovery.{place}.{name}", getattr(ranks, name))
    together = ranks.each(lambda: form.fit(program, pruned, keep, data.batches))
    assert not [e for e in together if isinstance(e, BaseException)]
    for found in together:
        assert found.recovery == together[0].recovery
        assert [s.rows for s in found.recovery.steps] == [s.rows for s in alone.recovery.steps]
        assert found.tensors.keys() == alone.tensors.keys()
        for name, tensor in found.tensors.items():
            assert torch.equal(tensor, together[0].tensors[name])
            assert torch.allclose(tensor, alone.tensors[name], atol=1e-5)
