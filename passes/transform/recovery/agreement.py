"""The guard's yardstick: do the outputs still tell apart what the dense outputs tell apart? No labels needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data.batch import Batch, sample_count
from ....data.metrics import spearman
from ....ir.program import Program
from ....ir.signature import padding_mask
from .outputs import class_rows, divergence, floating, joined, run, unit
from .views import noisy

NEIGHBOURS = 5  # nearest dense neighbours of a sample that are compared with it
FEWEST_PAIRS = 8  # below, ranks mean nothing
LOST = 0.5  # mixed agreement below which nothing is left that copies could protect
LOGITS = 2**25  # dense logits that are kept for the divergence: 128 MiB; longer outputs are thinned out


@dataclass(frozen=True)
class Agreement:
    """Spearman correlations of cosine similarities, dense against pruned; 1 is perfect.

    mixed   over near pairs, pairs of a sample and its noisy copy, and random pairs together
    copies  over the pairs of a sample and its noisy copy alone
    cosine  mean cosine between dense and pruned outputs, for people
    kl      mean KL divergence of the pruned class probabilities from the dense ones, nats, per sample (or position);
            None where no output is logits
    """

    mixed: float
    copies: float
    cosine: float
    kl: float | None = None

    def record(self) -> dict[str, float]:
        found = {"mixed": round(self.mixed, 5), "copies": round(self.copies, 5), "cosine": round(self.cosine, 5)}
        return found if self.kl is None else {**found, "kl": round(self.kl, 7)}

    def spread(self, pairs: int) -> float:
        """Standard error of the copies' rank correlation over so many pairs, for large samples: (1 - r^2) / sqrt(n)."""
        return float((1 - self.copies**2) / max(pairs, 1) ** 0.5)

    def veto(self, none: Agreement, tolerance: float) -> str:
        """Why this must not be preferred to ``none``, or nothing.

        Copies are a veto where ``none`` still tells samples apart. A model that has lost that (``LOST``) may well map a
        sample and its copy to the same wrong place, and nothing of it is worth protecting.
        """
        if none.mixed >= LOST and self.copies < none.copies - tolerance:
            return "a sample and its noisy copy are told apart less well than without recovery"
        if self.kl is not None and none.kl is not None and self.kl > none.kl:
            return "its class probabilities are farther from the dense ones than without recovery"
        return ""


@dataclass(frozen=True)
class Compared:
    """Similarities of one output over pairs [p]: dense (want) and pruned (got), the last ``copies`` with noisy copies.

    cosines   between dense and pruned rows, [n];  kl: see below, at the first output only
    """

    want: Tensor
    got: Tensor
    copies: int
    cosines: Tensor
    kl: Tensor  # per sample; [0] where there are no logits


class Yardstick:
    """Held-out samples, their noisy copies, and what the dense program makes of them.

    copies   noisy copies per sample: more steady the ranks when samples are few
    Source   recovery.md section 4 (its rule predicted the order of two candidates in 95 % of 190 pairs)
    """

    def __init__(self, dense: Program, batches: Sequence[Batch], seed: int, copies: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.clean = list(batches)
        self.noisy = [[noisy(dense, batch, generator) for batch in batches] for _ in range(copies)]
        self.samples = sample_count(self.clean)
        self._logits: list[Tensor] = []
        self.dense, _ = self._outputs(dense, None, self.clean, learn=True)
        self.dense_copies = [self._outputs(dense, None, batches)[0] for batches in self.noisy]
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of samples: texts and pictures may differ
        for output in self.dense:
            if len(output) not in self.pairs and len(output) > 1:
                self.pairs[len(output)] = _pairs(output, generator)

    @property
    def count(self) -> int:
        """Pairs of samples that are correlated, at the first output."""
        return len(self._pairs_of(self.dense[0])[0]) if self.dense else 0

    def _pairs_of(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs.get(len(output), (torch.zeros(0).long(),) * 2)

    @property
    def usable(self) -> bool:
        """Whether there is enough to correlate."""
        return self.count >= FEWEST_PAIRS

    def measure(self, pruned: Program, tensors: Mapping[str, Tensor] | None = None) -> Agreement:
        """The agreement of ``pruned``; ``tensors`` replaces its weights, by placeholder."""
        return pool([self.compare(pruned, tensors)])

    def compare(self, pruned: Program, tensors: Mapping[str, Tensor] | None = None) -> list[Compared]:
        """What :func:`pool` makes an agreement of, one entry per output."""
        now, divergences = self._outputs(pruned, tensors, self.clean)
        copies = [self._outputs(pruned, tensors, batches)[0] for batches in self.noisy]
        found = []
        for i, (a, b) in enumerate(zip(self.dense, now, strict=True)):
            first, second = self._pairs_of(a)
            want, got = (
                torch.cat([(x[first] * x[second]).sum(1), *((x * y[i]).sum(1) for y in others)])
                for x, others in ((a, self.dense_copies), (b, copies))
            )
            found.append(
                Compared(want, got, len(a) * len(copies), (a * b).sum(1), divergences if i == 0 else divergences[:0])
            )
        return found

    @torch.no_grad()
    def _outputs(
        self, program: Program, tensors: Mapping[str, Tensor] | None, batches: Sequence[Batch], learn: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """(per floating output one normalised row per sample [n, d], KL per sample of logits or nothing), fp64.

        learn   keep the logits, which later runs are compared with
        """
        collected: list[list[Tensor]] = []
        divergences: list[Tensor] = []
        for i, batch in enumerate(batches):
            flat = program.flatten(batch.args, batch.kwargs)
            mask = padding_mask(program, flat)
            outputs = floating(program, run(program, flat, tensors), batch.size)
            collected.append([unit(o.value, mask) for o in outputs])
            logits = next((o for o in outputs if o.classes is not None), None)
            if logits is None or batches is not self.clean:
                continue
            each = class_rows(logits, mask)
            each = each[:: -(-each.numel() // max(LOGITS // len(self.clean), each.shape[1]))]
            if learn:
                self._logits.append(each.clone())
            else:  # weighted by the batch's samples when the batches are averaged
                divergences.append(divergence(self._logits[i].double(), each.double()).cpu().expand(batch.size))
        rows = [joined(parts) for parts in zip(*collected, strict=True)]
        return rows, torch.cat(divergences) if divergences else torch.zeros(0, dtype=torch.float64)


def pool(folds: Sequence[Sequence[Compared]]) -> Agreement:
    """One agreement from the pairs of all folds together (pairs never cross a fold): mean over outputs."""
    found = []
    for parts in zip(*folds, strict=True):
        want, got, cut = (
            torch.cat([t for p in parts for t in pick(p)])
            for pick in (
                lambda p: (p.want,),
                lambda p: (p.got,),
                lambda p: (torch.arange(len(p.want)) >= len(p.want) - p.copies,),
            )
        )
        cosine = float(torch.cat([p.cosines for p in parts]).mean())
        found.append((spearman(want, got), spearman(want[cut], got[cut]), cosine))
    mixed, copies, mean = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    kl = torch.cat([p.kl for outputs in folds for p in outputs])
    return Agreement(mixed, copies, mean, float(kl.mean()) if len(kl) else None)


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
