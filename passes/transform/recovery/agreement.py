"""The guard's yardstick: do the outputs still tell apart what the dense outputs tell apart? No labels needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....data.batch import Batch, sample_count
from ....data.metrics import spearman
from ....ir.program import Program
from ....ir.signature import padding_mask
from .outputs import class_rows, divergence, floating, join_rows, run, unit
from .views import noisy

NEIGHBOURS = 5  # nearest dense neighbours of a sample that are compared with it
FEWEST_PAIRS = 8  # below, ranks mean nothing
LOST = 0.5  # agreement below which nothing is left that copies, or the distance of probabilities, could protect
LOGITS = 2**25  # dense logits that are kept for the divergence: 128 MiB; longer outputs are thinned out


@dataclass(frozen=True)
class Agreement:
    """Spearman correlations of cosine similarities, dense against pruned; 1 is perfect.

    mixed   over near pairs, pairs of a sample and its noisy copy, and random pairs together
    copies  over the pairs of a sample and its noisy copy alone
    cosine  mean cosine between dense and pruned outputs, for people
    kl      mean KL divergence of the pruned class probabilities from the dense ones, nats, per sample (or position);
            None where no output is logits
    kept    per sample (or position) whether the answer, the class with the largest logit, is the dense one [rows];
            empty where no output is logits
    """

    mixed: float
    copies: float
    cosine: float
    kl: float | None = None
    kept: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)

    @property
    def answers(self) -> float | None:
        """Share of the dense answers that survive; None where no output is logits."""
        return float(self.kept.double().mean()) if len(self.kept) else None

    def record(self) -> dict[str, float]:
        found = {"mixed": round(self.mixed, 5), "copies": round(self.copies, 5), "cosine": round(self.cosine, 5)}
        found |= {} if self.kl is None else {"kl": round(self.kl, 7)}
        return found if self.answers is None else {**found, "answers": round(self.answers, 5)}

    def keeps_more(self, other: Agreement) -> int:
        """1 where more dense answers survive than in ``other``, -1 where fewer do, 0 where that cannot be said.

        Paired over the same rows: of those that only one of the two keeps, the difference must exceed the square root
        of their number, one standard error if it were chance (McNemar 1947).
        """
        if not len(self.kept) or len(self.kept) != len(other.kept):
            return 0
        gained = self.kept.double() - other.kept.double()
        more, error = float(gained.sum()), float(gained.abs().sum()) ** 0.5
        return 0 if abs(more) <= error else 1 if more > 0 else -1

    def is_better(self, other: Agreement, slack: float = 0.0) -> bool:
        """Whether this is to be preferred: by the answers that survive, and where these tell nothing by ``mixed``,
        which may then be lower by ``slack``."""
        more = self.keeps_more(other)
        return more > 0 or (more == 0 and self.mixed > other.mixed - slack)

    def spread(self, pairs: int) -> float:
        """Standard error of the copies' rank correlation over so many pairs, for large samples: (1 - r^2) / sqrt(n)."""
        return float((1 - self.copies**2) / max(pairs, 1) ** 0.5)

    def veto(self, none: Agreement, tolerance: float) -> str:
        """Why this must not be preferred to ``none``, or nothing.

        Answers that survive come first: where clearly more of them do, nothing else counts. Copies are a veto where
        ``none`` still tells samples apart: a model that has lost that (``LOST``) may well map a sample and its copy to
        the same wrong place, and nothing of it is worth protecting. So are class probabilities, where ``none`` has
        answers left: one that has lost them and hedges is nearer to any other than one that is right half the time.
        """
        more = self.keeps_more(none)
        if more < 0:
            return "fewer of the dense model's answers survive than without recovery"
        if more > 0:
            return ""
        if none.mixed >= LOST and self.copies < none.copies - tolerance:
            return "a sample and its noisy copy are told apart less well than without recovery"
        answers = 1.0 if none.answers is None else none.answers
        if self.kl is not None and none.kl is not None and self.kl > none.kl and answers >= LOST:
            return "its class probabilities are farther from the dense ones than without recovery"
        return ""


@dataclass(frozen=True)
class Compared:
    """Similarities of one output over pairs [p]: dense (want) and pruned (got), the last ``copies`` with noisy copies.

    cosines   between dense and pruned rows, [n]
    kl, kept  per sample, and per row of logits; at the first output only, [0] where there are no logits
    """

    want: Tensor
    got: Tensor
    copies: int
    cosines: Tensor
    kl: Tensor
    kept: Tensor


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
        self.dense, _, _ = self._outputs(dense, None, self.clean, learn=True)
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
        now, divergences, kept = self._outputs(pruned, tensors, self.clean)
        copies = [self._outputs(pruned, tensors, batches)[0] for batches in self.noisy]
        found = []
        for i, (a, b) in enumerate(zip(self.dense, now, strict=True)):
            first, second = self._pairs_of(a)
            want, got = (
                torch.cat([(x[first] * x[second]).sum(1), *((x * y[i]).sum(1) for y in others)])
                for x, others in ((a, self.dense_copies), (b, copies))
            )
            first_only = (divergences, kept) if i == 0 else (divergences[:0], kept[:0])
            found.append(Compared(want, got, len(a) * len(copies), (a * b).sum(1), *first_only))
        return found

    @torch.no_grad()
    def _outputs(
        self, program: Program, tensors: Mapping[str, Tensor] | None, batches: Sequence[Batch], learn: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """(per floating output one normalised row per sample [n, d], KL per sample of logits or nothing, fp64, and per
        row of logits whether the largest is the dense one).

        learn   keep the logits, which later runs are compared with
        """
        collected: list[list[Tensor]] = []
        divergences, kept = list[Tensor](), list[Tensor]()
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
                kept.append((self._logits[i].argmax(1) == each.argmax(1)).cpu())
        rows = [join_rows(parts) for parts in zip(*collected, strict=True)]
        nothing = torch.zeros(0, dtype=torch.float64)
        return rows, torch.cat(divergences) if divergences else nothing, torch.cat(kept) if kept else nothing.bool()


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
    kept = torch.cat([p.kept for outputs in folds for p in outputs])
    return Agreement(mixed, copies, mean, float(kl.mean()) if len(kl) else None, kept)


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
