"""How good a model is on data: by labels, or by what another model says.

By labels: ``top1``, ``f1`` (macro), ``spearman``, ``miou``. Without labels the dense model is the reference:
``agreement`` (share of samples with the same class; accuracy cannot fall by more than what disagrees), ``spearman`` of
a single number per sample, ``cosine`` of anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import OptionError, nearest

IGNORED = (-100, 255)
"""Labels that do not count: what torch's losses ignore, and what segmentation data sets write for "unknown"."""

LABELLED = ("top1", "f1", "spearman", "miou")
UNLABELLED = ("agreement", "spearman", "cosine")


def choose(outputs: Mapping[str, Tensor], labels: Tensor | None, wanted: str = "auto") -> tuple[str, str]:
    """(metric, name of the output that it reads) for outputs [n, ...] of one batch and labels [n, ...].

    wanted   a metric, or ``auto``: what the labels and the outputs allow

    Raises OptionError where no output fits.
    """
    floats = {k: v for k, v in outputs.items() if v.is_floating_point() and v.dim()}
    ordered = sorted(floats, key=lambda name: name != "logits")
    known = UNLABELLED if labels is None else LABELLED
    if wanted not in ("auto", *known):
        why = (
            "the data has no labels"
            if labels is None and wanted in LABELLED
            else "the data has labels"
            if labels is not None and wanted in UNLABELLED
            else ""
        )
        raise OptionError(
            f"the metric '{wanted}' cannot be computed",
            where="--metric",
            why=why,
            cure=nearest(wanted, ("auto", *known)),
        )
    for name in ordered:
        found = _fitting(floats[name], labels)
        if found and (wanted == "auto" or wanted == found or (wanted, found) in (("f1", "top1"), ("cosine", found))):
            return (found if wanted == "auto" else wanted), name
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in outputs.items())
    told = "no labels" if labels is None else f"labels {list(labels.shape)} {labels.dtype}"
    raise OptionError(
        "no metric fits these outputs",
        where=f"--metric {wanted}",
        why=f"outputs {shapes}; {told}",
        cure="give data whose labels the model predicts, or data without labels",
    )


def _fitting(output: Tensor, labels: Tensor | None) -> str:
    """The metric for one output, or ""."""
    single = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
    if labels is None:
        return "spearman" if single else "agreement" if output.dim() == 2 else "cosine"
    if labels.is_floating_point():
        return "spearman" if single and labels.numel() == len(output) else ""
    if labels.dim() == 3 and output.dim() == 4:
        return "miou"
    per_token = labels.dim() == 2 and output.dim() == 3 and output.shape[:2] == labels.shape
    return "top1" if (labels.dim() == 1 and output.dim() == 2 and not single) or per_token else ""


def score(metric: str, outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The metric over batches of one output and of the labels, or of the dense model's same output. Higher is better.

    >>> score("top1", [torch.tensor([[0.1, 0.9], [0.8, 0.2]])], [torch.tensor([1, 1])])
    0.5
    >>> score("agreement", [torch.tensor([[0.1, 0.9], [0.8, 0.2]])], [torch.tensor([[3.0, 4.0], [3.0, 2.0]])])
    1.0
    """
    outputs, references = [o.detach().cpu() for o in outputs], [r.detach().cpu() for r in references]
    if metric == "miou":
        return _miou(outputs, references)
    if metric == "spearman":
        return spearman(torch.cat([o.reshape(-1) for o in outputs]), torch.cat([r.reshape(-1) for r in references]))
    if metric == "cosine":
        pairs = [
            functional.cosine_similarity(o.flatten(1).double(), r.flatten(1).double())
            for o, r in zip(outputs, references, strict=True)
        ]
        return float(torch.cat(pairs).mean())
    said = torch.cat([o.argmax(-1).reshape(-1) for o in outputs])
    if metric == "agreement":
        return _mean(said == torch.cat([r.argmax(-1).reshape(-1) for r in references]))
    truth = torch.cat([r.reshape(-1) for r in references])
    counted = truth != IGNORED[0]
    said, truth = said[counted], truth[counted]
    if metric == "f1":
        return _f1(said, truth)
    return _mean(said == truth)


def divergence(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Kullback-Leibler divergence of the classes' probabilities from the dense model's, mean over samples, in nats.

    >>> divergence([torch.tensor([[0.0, 1.0]])], [torch.tensor([[0.0, 1.0]])])
    0.0
    """
    total = count = 0.0
    for one, two in zip(outputs, references, strict=True):
        got, want = (functional.log_softmax(t.detach().cpu().double().flatten(0, -2), -1) for t in (one, two))
        total += float(relative_entropy(want, got).sum())
        count += len(want)
    return max(0.0, total / max(count, 1.0))


def relative_entropy(want: Tensor, got: Tensor) -> Tensor:
    """KL(want || got) over the last dimension of two log probabilities, in nats. A class that is masked out (-inf in
    ``want``) has no share in it. [..]

    >>> low = float("-inf")
    >>> float(relative_entropy(torch.tensor([0.0, low]), torch.tensor([0.0, low])))
    0.0
    """
    return torch.where(want > float("-inf"), want.exp() * (want - got), 0.0).sum(-1)


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0


def _f1(said: Tensor, truth: Tensor) -> float:
    """Mean over the classes that occur (in either) of 2 tp / (2 tp + fp + fn)."""
    scores = []
    for one in torch.cat([said, truth]).unique().tolist():
        hit, claimed, true = (said == one) & (truth == one), said == one, truth == one
        scores.append(2 * float(hit.sum()) / float(claimed.sum() + true.sum()))
    return sum(scores) / len(scores) if scores else 0.0


def _miou(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """Intersection over union per class, over all pixels that count, mean over the classes that occur (in either).

    Logits [n, classes, h, w] of another size than the labels [n, H, W] are resized bilinearly, as they are for viewing.
    """
    classes = outputs[0].shape[1]
    inside, one, two = (torch.zeros(classes, dtype=torch.double) for _ in range(3))
    for output, label in zip(outputs, references, strict=True):
        if output.shape[-2:] != label.shape[-2:]:
            output = functional.interpolate(output.float(), label.shape[-2:], mode="bilinear", align_corners=False)
        said = output.argmax(1)
        counted = (label >= 0) & (label < classes) & (label != IGNORED[1])
        said, truth = said[counted], label[counted].long()
        one += torch.bincount(said, minlength=classes).double()
        two += torch.bincount(truth, minlength=classes).double()
        inside += torch.bincount(truth[said == truth], minlength=classes).double()
    union = one + two - inside
    return float((inside[union > 0] / union[union > 0]).mean()) if bool((union > 0).any()) else 0.0


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where one of them is constant.

    >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])), 6)
    1.0
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return min(1.0, max(-1.0, float(x @ y) / scale)) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, index, count = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[index]
