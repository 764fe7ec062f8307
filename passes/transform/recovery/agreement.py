"""The guard's yardstick: do the outputs still tell apart what the dense outputs tell apart? No labels needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Interpreter
from torch.nn import functional

from ....data import Batch
from ....program import Program
from .lockstep import padding

NEIGHBOURS = 5  # nearest dense neighbours of a sample that are compared with it
WORST_NOISE = 0.8  # largest share of replaced tokens, and of noise in the standard deviation of a float input


@dataclass(frozen=True)
class Agreement:
    """Spearman correlations of cosine similarities, dense against pruned; 1 is perfect.

    mixed   over near pairs, pairs of a sample and its noisy copy, and random pairs together
    copies  over the pairs of a sample and its noisy copy alone
    cosine  mean cosine between dense and pruned outputs, for people
    """

    mixed: float
    copies: float
    cosine: float

    def record(self) -> dict[str, float]:
        return {"mixed": round(self.mixed, 5), "copies": round(self.copies, 5), "cosine": round(self.cosine, 5)}


class Yardstick:
    """Held-out samples, their noisy copies, and what the dense program makes of them.

    Source: recovery.md section 4 (its rule predicted the order of two candidates in 95 % of 190 pairs).
    """

    def __init__(self, dense: Program, batches: Sequence[Batch], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.clean = list(batches)
        self.noisy = [noisy(dense, batch, generator) for batch in batches]
        self.dense, self.dense_copies = self._outputs(dense, None), self._outputs(dense, None, copies=True)
        count = len(self.dense[0]) if self.dense else 0
        self.first, self.second = _pairs(self.dense[0], generator) if count > 1 else (torch.zeros(0).long(),) * 2

    @property
    def usable(self) -> bool:
        """Whether there is enough to correlate."""
        return len(self.first) >= 8

    def measure(self, pruned: Program, tensors: Mapping[str, Tensor] | None = None) -> Agreement:
        """The agreement of ``pruned``; ``tensors`` replaces its weights, by placeholder."""
        found = []
        now, copies = self._outputs(pruned, tensors), self._outputs(pruned, tensors, copies=True)
        for a, a2, b, b2 in zip(self.dense, self.dense_copies, now, copies, strict=True):
            want, got = (torch.cat([(x[self.first] * x[self.second]).sum(1), (x * y).sum(1)])
                         for x, y in ((a, a2), (b, b2)))
            apart = len(self.first)
            found.append((spearman(want, got), spearman(want[apart:], got[apart:]), float((a * b).sum(1).mean())))
        mean = torch.tensor(found, dtype=torch.float64).mean(0)
        return Agreement(*(float(x) for x in mean))

    @torch.no_grad()
    def _outputs(self, program: Program, tensors: Mapping[str, Tensor] | None, copies: bool = False) -> list[Tensor]:
        """Per floating output one normalised row per sample. [n, d] each, fp64"""
        collected: list[list[Tensor]] = []
        specs = program.exported.graph_signature.output_specs
        for batch in self.noisy if copies else self.clean:
            flat = program.flatten(batch.args, batch.kwargs)
            values = program.arguments(flat)
            if tensors is not None:
                values = [tensors.get(n.name, v) for n, v in zip(program.placeholders(), values, strict=True)]
            outputs = Interpreter(program.exported.graph_module).run(*values)
            mask = padding(program, flat)
            rows = [_rows(o, mask) for o, s in zip(outputs, specs, strict=True)
                    if s.kind == OutputKind.USER_OUTPUT and isinstance(o, Tensor) and o.is_floating_point()
                    and o.dim() > 1 and len(o) == batch.size]
            collected.append(rows)
        return [torch.cat(parts) for parts in zip(*collected, strict=True)]


def noisy(program: Program, batch: Batch, generator: torch.Generator) -> Batch:
    """A copy of ``batch`` of which each sample lost a random share of its content.

    Token ids (integer inputs whose name ends in ``ids`` and that vary) are replaced by others of the batch, ends and
    padding excepted; floating inputs get normal noise of a random share of their standard deviation.
    """
    flat = program.flatten(batch.args, batch.kwargs)
    mask = padding(program, flat)
    changed: dict[int, Tensor] = {}
    for name, value in zip(program.user_inputs, flat, strict=True):
        if isinstance(value, Tensor) and value.dim() and len(value) == batch.size:
            if value.is_floating_point():
                changed[id(value)] = _shaken(value, generator)
            elif name.endswith("ids") and value.dim() == 2 and not bool((value == value[0, 0]).all()):
                changed[id(value)] = _replaced(value, mask, generator)

    def copy(value: Any) -> Any:
        return changed.get(id(value), value)

    return replace(batch, args=tuple(map(copy, batch.args)), kwargs={k: copy(v) for k, v in batch.kwargs.items()})


def _shaken(x: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(len(x), generator=generator) * WORST_NOISE
    noise = torch.randn(x.shape, generator=generator) * share.reshape(-1, *[1] * (x.dim() - 1))
    return x + (noise * x.float().std().cpu()).to(x)


def _replaced(ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    real = torch.ones(ids.shape, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.cpu().bool()
    inner = real.clone()
    inner[:, 0] = False
    inner[torch.arange(len(ids)), (real.long() * torch.arange(ids.shape[1])).argmax(1)] = False
    share = torch.rand(len(ids), 1, generator=generator) * WORST_NOISE
    hit = (torch.rand(ids.shape, generator=generator) < share) & inner
    pool = ids.cpu()[inner]
    if not len(pool):
        return ids
    drawn = pool[torch.randint(len(pool), ids.shape, generator=generator)]
    return torch.where(hit, drawn, ids.cpu()).to(ids)


def _rows(out: Tensor, mask: Tensor | None) -> Tensor:
    """One normalised row per sample: positions are averaged (padding excepted), channels of a map are kept. [n, d]"""
    x = out.double()
    if x.dim() == 4:
        x = x.mean((2, 3))
    elif x.dim() > 2:
        x = x.flatten(1, -2)
        keep = mask.to(x) if mask is not None and mask.shape == x.shape[:2] else x.new_ones(x.shape[:2])
        x = (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp_min(1)
    return functional.normalize(x, dim=1).cpu()


def _pairs(dense: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of near pairs (nearest dense neighbours) and as many random pairs."""
    count = len(dense)
    near = min(NEIGHBOURS, count - 1)
    similar = dense @ dense.T
    similar.fill_diagonal_(-2.0)
    first = torch.arange(count).repeat_interleave(near)
    second = similar.topk(near, 1).indices.flatten()
    step = torch.randint(1, count, (len(first),), generator=generator)
    return torch.cat([first, first]), torch.cat([second, (first + step) % count])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where one of them is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, index, count = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[index]
