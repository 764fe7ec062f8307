"""``AgreementEvaluator``: how far a smaller program's outputs are from the dense one's, on samples kept for that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.batch import Batch, Calibration
from ..data.metrics import spearman
from ..ir.cost import CostModel
from ..ir.program import Program
from ..ir.signature import padding_mask

JUDGED = 64  # samples; enough to tell a percent, few enough to cost seconds
LEAST, WORK = 8, 2e12  # never fewer; multiply-accumulates of one run over them all
CHUNK = 16  # samples of a batch: outputs of language models are large
KEPT = 2**24  # dense logits held for the comparison, 64 MiB; longer outputs are thinned out


class AgreementEvaluator:
    """What the dense program makes of some batches; :meth:`of` says how much of it another program keeps.

    batches  with the inputs of ``dense``; labels are used where they are class numbers of its logits
    """

    def __init__(self, dense: Program, batches: Sequence[Batch]) -> None:
        self.dense, self.batches = dense, list(batches)
        self.samples = sum(b.size for b in self.batches)
        self._seen = [self._run(dense, batch) for batch in self.batches]
        self._labels = [
            _class_labels(batch, logits) for batch, (_, logits) in zip(self.batches, self._seen, strict=True)
        ]

    @property
    def accuracy(self) -> float | None:
        """Share of samples whose largest logit is their label, of the dense program; None without such labels."""
        return self._accuracy([logits for _, logits in self._seen])

    @property
    def chance(self) -> float | None:
        """Share of the dense program's most frequent answer: what a program agrees by that gives no other."""
        answers = [logits.argmax(1) for _, logits in self._seen if logits is not None]
        if not answers:
            return None
        counts = torch.cat(answers).bincount()
        return float(counts.max() / counts.sum())

    def of(self, program: Program) -> dict[str, float]:
        """Figures of ``program`` against the dense one; what does not apply is left out.

        top1        share of samples (or positions) with the dense program's largest logit
        kl          mean KL(dense || program) of the class probabilities, nats
        cosine      mean cosine between the outputs of both, one row per sample
        relational  Spearman correlation, over all pairs of samples, of how similar the outputs of the two are: 1 where
                    what is alike stays alike
        accuracy    share of samples whose largest logit is their label
        """
        from ..passes.transform.recovery.outputs import divergence, join_rows

        now = [self._run(program, batch) for batch in self.batches]
        found: dict[str, float] = {}
        pairs = [(a, b) for (_, a), (_, b) in zip(self._seen, now, strict=True) if a is not None and b is not None]
        if pairs:
            weights = [float(len(a)) for a, _ in pairs]
            found["top1"] = sum(float((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs) / sum(weights)
            found["kl"] = max(
                0.0,
                sum(w * float(divergence(a.double(), b.double())) for w, (a, b) in zip(weights, pairs, strict=True))
                / sum(weights),
            )
        if self._seen and self._seen[0][0] is not None:
            one, two = (join_rows([rows for rows, _ in side if rows is not None]) for side in (self._seen, now))
            found["cosine"] = float((one * two).sum(1).mean())
            if len(one) > 3:
                above = torch.triu(torch.ones(len(one), len(one), dtype=torch.bool), 1)
                found["relational"] = spearman((one @ one.T)[above], (two @ two.T)[above])
        share = self._accuracy([logits for _, logits in now])
        if share is not None:
            found["accuracy"] = share
        return found

    def _accuracy(self, logits: Sequence[Tensor | None]) -> float | None:
        if not self.batches or any(labels is None for labels in self._labels):
            return None
        right = sum(
            float((z.argmax(1) == labels).sum())
            for z, labels in zip(logits, self._labels, strict=True)
            if z is not None and labels is not None
        )
        return right / self.samples

    @torch.no_grad()
    def _run(self, program: Program, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """(one normalised row per sample of the first floating output [n, d], its logits [rows, classes])"""
        from ..passes.transform.recovery.outputs import class_rows, floating, run, unit

        flat = self.dense.flatten(batch.args, batch.kwargs)
        mask = padding_mask(self.dense, flat)
        outputs = floating(program, run(program, flat), batch.size)
        if not outputs:
            return None, None
        first = next((o for o in outputs if o.classes is not None), None)
        rows = unit((first or outputs[0]).value, mask)
        if first is None:
            return rows, None
        logits = class_rows(first, mask).cpu()
        most = max(KEPT // max(len(self.batches), 1), logits.shape[1])
        return rows, logits[:: -(-logits.numel() // most)].clone()


def _class_labels(batch: Batch, logits: Tensor | None) -> Tensor | None:
    """The labels, where each is a class of the logits and belongs to one sample."""
    labels = batch.labels
    if labels is None or logits is None or labels.is_floating_point() or labels.dim() != 1:
        return None
    if len(labels) != len(logits) or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        return None
    return labels.cpu()


def few(program: Program, data: Calibration) -> list[Batch]:
    """The first samples of ``data``, as many as ``program`` runs through in seconds on a few cores, in small batches.

    A graph captured at a fixed batch size takes whole batches only.
    """
    flops = max(CostModel(program)().flops, 1)
    count = min(JUDGED, max(LEAST, int(WORK // flops)))
    found: list[Batch] = []
    for batch in data.batches:
        left = count - sum(b.size for b in found)
        if left <= 0:
            break
        if program.fixed_batch:
            found.append(batch)
        else:
            found += [batch.pick(rows) for rows in torch.arange(min(batch.size, left)).split(CHUNK)]
    return found
