"""What the gradient criteria differentiate: a loss per sample, from labels or from the model's own output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import OutputKind
from torch.fx import Interpreter
from torch.nn import functional
from torch.utils import _pytree as pytree

from ....data.batch import Batch, Calibration
from ....errors import FxpruneError
from ....ir.program import Program
from ....ir.signature import padding_mask
from .criterion import CannotScore

IGNORED = -100  # the label that torch and transformers use for "no label here"


@dataclass(frozen=True)
class Target:
    """One output that a criterion without labels watches.

    value    logits with the classes last, else each sample's output standardised to zero mean and unit variance
    mask     [samples, positions] of those that count, where the output has positions and the input a mask
    """

    value: Tensor
    logits: bool
    mask: Tensor | None

    def count(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """``each`` (like ``value``; logits: one entry in place of the classes) without padding, and how many of its
        entries count in each sample. [samples]"""
        each, positions = _unpad(each, self.mask)
        width = 1 if self.logits else each[0].numel() / (each.shape[1] if each.dim() > 2 else 1)
        return each, positions * width if each.dim() > 2 else positions * 0 + width


def targets(program: Program, outputs: Sequence[Any], batch: Batch, samples: int) -> list[Target]:
    """What :func:`objectives` differentiates without labels: the logits if there are any, else every output."""
    named = _outputs_by_sample(program, outputs, samples)
    mask, heads = padding_mask(program, program.flatten(batch.args, batch.kwargs)), _logits(named)
    if heads:
        return [Target(t.movedim(_class_dim(t), -1).to(_wide(t)), True, mask) for t in heads]
    return [Target(_standardise(t), False, mask) for _, t in named]


def objectives(
    program: Program,
    outputs: Sequence[Any],
    batch: Batch,
    samples: int,
    seed: int,
    first: int,
    probes: int,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Scalars to differentiate, each a sum over samples, so that per-sample gradients do not depend on the batching.

    With labels, one: cross-entropy for integer labels (mean over a sample's positions; -100 is no label), squared
    error for float ones, on the output called ``logits``, else on the first 2-D floating output, else on the first.

    Without, ``probes`` of them, each a random direction whose squared gradient has the Fisher matrix as its mean:

    * logits (named ``logits`` or ``*_logits`` and 2-D, or 2-D in a model whose outputs have no names):
      ``s = sum_c e_c sqrt(p_c) log p_c``, e of random signs, p held fixed: ``E (ds/dm)^2 = sum_c p_c (dlog p_c/dm)^2``,
      the expectation over labels sampled from the model's own output of the squared gradient of their loss (the true
      Fisher, the curvature of the KL to that output), with less noise than sampling a label. With a ``temperature``
      tau, p is that of z / tau and s is tau times larger: half its squared gradient leads Hinton's tau^2 KL;
    * other outputs (embeddings, hidden states, feature maps, several at once): ``s = e . z / sqrt(dim z)``, z each
      sample's output standardised to zero mean and unit variance.

    Source   Kwon et al. 2022, arXiv:2204.09656, eq. 6 (labels); without labels the Fisher of the model's own
    distribution, as Kunstner et al. 2019, arXiv:1905.12558, tell it from the empirical one; the reference code needs
    labels, and squares gradients of batch means.

    Random signs belong to a sample (``first`` numbers the batch's first one), not to a batch. Padded positions, by an
    input whose name ends in ``mask`` and whose shape is the output's [batch, positions], do not count.
    """
    named = _outputs_by_sample(program, outputs, samples)
    if batch.labels is not None:
        return [_score_labels(_pick(named), batch.labels)]
    mask = padding_mask(program, program.flatten(batch.args, batch.kwargs))
    heads = _logits(named)
    if heads:
        return [
            torch.stack([_label_probe(t, mask, seed, first, p, i, temperature) for i, t in enumerate(heads)]).sum()
            for p in range(probes)
        ]
    return [
        torch.stack([_output_probe(t, mask, seed, first, p, i) for i, (_, t) in enumerate(named)]).sum()
        for p in range(probes)
    ]


def without_foreign_labels(program: Program, data: Calibration) -> Calibration:
    """``data`` without its labels where ``program`` is an encoder that predicts no such thing; else ``data`` itself.

    An encoder: no output is called logits, and the labels of the first batch fit none. Labels that do not fit a
    classifier are a mistake, which :func:`objectives` reports.
    """
    batch = data.batches[0] if data.batches else None
    if batch is None or batch.labels is None:
        return data
    inputs = program.arguments(program.flatten(batch.args, batch.kwargs))
    try:
        with torch.no_grad():
            outputs = list(Interpreter(program.exported.graph_module).run(*inputs))
    except Exception:  # scoring meets the same failure and names the node
        return data
    named = _name_outputs(program, outputs, batch.size)
    if not named or _logits(named):
        return data
    try:
        _score_labels(_pick(named), batch.labels)
    except FxpruneError:
        return replace(data, batches=tuple(replace(b, labels=None) for b in data.batches))
    return data


def _outputs_by_sample(program: Program, outputs: Sequence[Any], samples: int) -> list[tuple[str, Tensor]]:
    """:func:`_name_outputs`. Raises CannotScore where there are none."""
    named = _name_outputs(program, outputs, samples)
    if not named:
        raise CannotScore(
            "the model has no output to differentiate",
            where=program.name,
            why="no floating output has the samples as its first dimension",
            cure="use a criterion that needs no gradients, such as l2 or activation",
        )
    return named


def _name_outputs(program: Program, outputs: Sequence[Any], samples: int) -> list[tuple[str, Tensor]]:
    """(name or '', tensor) of every floating user output with one row per sample."""
    specs = program.exported.graph_signature.output_specs
    user = [o for o, spec in zip(outputs, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
    spec = program.exported.call_spec.out_spec
    names = [""] * len(user)
    if spec is not None and spec.num_leaves == len(user):
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(user))), spec))
        names = [str(path[0].key) if path and isinstance(path[0], pytree.MappingKey) else "" for path, _ in paths]
    return [
        (name, o)
        for name, o in zip(names, user, strict=True)
        if isinstance(o, Tensor) and o.is_floating_point() and o.dim() > 0 and len(o) == samples
    ]


def _pick(named: Sequence[tuple[str, Tensor]]) -> Tensor:
    by_name = [t for name, t in named if name == "logits"]
    flat = [t for _, t in named if t.dim() == 2]
    return (by_name or flat or [t for _, t in named])[0]


def _logits(named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """Outputs that are logits over at least two classes."""
    chosen = [t for name, t in named if name == "logits"]
    if not chosen:
        chosen = [t for name, t in named if name.endswith("_logits") and t.dim() == 2]
    if not chosen and not any(name for name, _ in named):
        chosen = [t for _, t in named if t.dim() == 2][:1]
    return [t for t in chosen if t.dim() > 1 and t.shape[_class_dim(t)] > 1]


def _class_dim(logits: Tensor) -> int:
    """Classes come last in [batch, class] and [batch, token, class], second in [batch, class, height, width]."""
    return 1 if logits.dim() > 3 else logits.dim() - 1


def _score_labels(out: Tensor, labels: Tensor) -> Tensor:
    labels = labels.to(out.device)
    if labels.is_floating_point():
        if labels.shape != out.shape and labels.numel() == out.numel():
            labels = labels.reshape(out.shape)
        if labels.shape != out.shape:
            raise _misfit(out, labels)
        wide = _wide(out)
        return (out.to(wide) - labels.to(wide)).reshape(len(out), -1).square().mean(1).sum()
    classes = next((d for d in (out.dim() - 1, 1) if out.dim() > 1 and labels.shape == _without(out, d)), None)
    if classes is None:
        raise _misfit(out, labels)
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= out.shape[classes]))
    if wrong.any():
        raise FxpruneError(
            "a label is out of range",
            where="calibration labels",
            why=f"found {int(labels[wrong][0])}, the model has {out.shape[classes]} classes",
            cure="use the labels the model was trained with, or leave them out",
        )
    logits = out.movedim(classes, 1).to(_wide(out))
    each = functional.cross_entropy(logits, labels.long(), reduction="none", ignore_index=IGNORED)
    counted = (labels != IGNORED).reshape(len(labels), -1).sum(1).clamp(min=1)
    return (each.reshape(len(labels), -1).sum(1) / counted).sum()


def _without(out: Tensor, dim: int) -> torch.Size:
    return torch.Size([s for i, s in enumerate(out.shape) if i != dim])


def _misfit(out: Tensor, labels: Tensor) -> FxpruneError:
    return FxpruneError(
        "the labels do not fit the model's output",
        where="calibration labels",
        why=f"labels are {labels.dtype} {list(labels.shape)}, the output is {list(out.shape)}",
        cure="give one class per sample (or per position), or leave the labels out",
    )


def _label_probe(
    logits: Tensor, mask: Tensor | None, seed: int, first: int, probe: int, which: int, temperature: float
) -> Tensor:
    log_p = functional.log_softmax(logits.movedim(_class_dim(logits), -1).to(_wide(logits)) / temperature, dim=-1)
    log_p = torch.where(log_p > float("-inf"), log_p, 0.0)  # a class that is masked out is no direction to look in
    weight = log_p.detach().exp().sqrt() * _signs(log_p, seed, first, probe, which)
    each = (weight * log_p).sum(-1)
    each, counted = _unpad(each[..., None], mask)
    return temperature * (each.flatten(1).sum(1) / counted.sqrt()).sum()


def _output_probe(out: Tensor, mask: Tensor | None, seed: int, first: int, probe: int, which: int) -> Tensor:
    signs = _signs(out, seed, first, probe, which).to(_wide(out))
    z = _standardise(out)
    each, counted = _unpad(z * signs if z.dim() > 1 else (z * signs)[:, None], mask)
    width = each[0].numel() / (each.shape[1] if each.dim() > 2 else 1)
    return (each.flatten(1).sum(1) / (counted * width if each.dim() > 2 else counted * 0 + width).sqrt()).sum()


def _standardise(out: Tensor) -> Tensor:
    """Each sample to zero mean and unit variance over all its entries; a single number stays as it is."""
    z = out.to(_wide(out))
    if z[0].numel() <= 1:
        return z
    flat = z.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-6)).reshape(z.shape)


def _unpad(each: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``each`` [batch, positions, ..] with padding zeroed, and the positions that count in each sample. [batch]"""
    positions = each.shape[1] if each.dim() > 2 else 1
    if mask is None or each.dim() < 3 or mask.shape != each.shape[:2]:
        return each, each.new_full((len(each),), float(positions)).detach()
    mask = mask.to(each.device)
    return each * mask.reshape(*mask.shape, *[1] * (each.dim() - 2)), mask.sum(1).clamp(min=1).to(each.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _signs(like: Tensor, seed: int, first: int, probe: int, which: int) -> Tensor:
    """Random signs in the shape of ``like``, drawn per sample."""
    rows = []
    for sample in range(first, first + len(like)):
        generator = torch.Generator().manual_seed(hash((seed, sample, probe, which)) % 2**63)
        rows.append(torch.randint(0, 2, like.shape[1:], generator=generator, dtype=torch.int8))
    return (torch.stack(rows) * 2 - 1).to(like.device, like.dtype)
