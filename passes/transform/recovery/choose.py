"""The guard: which candidate is kept, judged on samples that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ....data.batch import Batch, Calibration, sample_count
from ....ir.axis import Keep
from ....ir.program import Program
from .agreement import FEWEST_PAIRS, Agreement, Yardstick, pool
from .closed_form import STRONG, ClosedForm
from .record import Fitted, Recovery
from .shared import from_first
from .tune import Tuner

TOLERANCE = 0.002  # by how much the copies' agreement may fall below no recovery's and still count as equal
FEW_HELD = 30  # held-out samples; below, several folds are judged, each by a fit to the others
QUARTER = 4  # every fourth sample is judged, where that is not few
FOLDS, FOLD = 5, 4  # samples are cut into so many folds at most, of at least so many samples
TRIED = 3  # of these folds so many are judged
JUDGED = 60  # samples and copies that the ranks should rest on: the fewer samples, the more copies of each
MOST_COPIES = 8
FEW_FITTED = 150  # samples; below, a strong ridge is tried as well

Fold = tuple[list[Batch], list[Batch]]


@dataclass(frozen=True)
class Verdict:
    """What the guard found of the closed forms of one plan.

    about    the dense program with its plan, and the data: a verdict holds for these objects only
    settings of the guard
    fitted   the winner, fitted to the first fold's samples;  form: how, None where nothing is recovered;  chosen: its
             name in ``guard``
    guard    candidate -> agreement;  rejected: candidate -> why
    """

    about: tuple[object, object]
    settings: tuple[object, ...]
    folds: list[Fold]
    rulers: list[Yardstick]
    fitted: Fitted
    form: ClosedForm | None
    chosen: str
    guard: Mapping[str, Mapping[str, float]]
    rejected: Mapping[str, str]

    @property
    def usable(self) -> bool:
        """Whether there were enough samples to judge on."""
        return bool(self.guard)


@dataclass(frozen=True)
class Guard:
    """Tries none, bias, ridge and refit and keeps the one that agrees best with the dense outputs.

    Rule      where the output is logits, the candidate with clearly more of the dense answers (paired over the same
              samples, one standard error). Where these tell nothing, and for other outputs, the largest ``mixed``
              agreement, among those whose agreement on noisy copies is not more than 0.002 below that of no recovery
              and whose class probabilities are not farther from the dense ones, unless the model without recovery has
              lost its answers, so that neither says anything. A tie with no recovery (0.002 of ``mixed``) goes to the
              repaired one; none if there is none.
    Few       below 150 samples a ridge of strength 5 is tried beside the usual one, and up to 8 noisy copies per sample
              steady the ranks. Below 120 samples, of which 30 could be held out, these are cut into five folds, each
              judged by a fit to the others, their pairs ranked together; three are judged, and only refit is tried,
              unless a strength is given: that bounds the cost. So few copies may fall below no recovery's by one
              standard error. Over 63 plans (three transformers and a CNN, 32 and 64 samples, 0.6 to 0.3 of the MACs)
              the choices were as near to the best candidate as those of five candidates on all five folds: KL, or
              1 - agreement, on 512 other samples 5 % above it against 8 %, geometric means (tools/bench/few.py).
    After     the chosen form is fitted again to all samples: more rows, same form. The yardstick's figures are those
              of the fits that it judged.
    Source    recovery.md section 4, its rule for few samples and for logits ours
    """

    form: ClosedForm
    held_out: float
    seed: int
    tuner: Tuner | None = None

    def judge(self, program: Program, pruned: Program, keep: Keep, data: Calibration) -> Verdict:
        """The closed forms, each fitted and judged."""
        folds = split_in_folds(program, data, self.held_out)[:TRIED]
        several = len(folds) > 1
        rulers = yardsticks(program, folds, self.seed, sample_count(folds[0][1]) if len(folds) == 1 else data.samples)
        fitted_best, best_form, chosen = Fitted(Recovery("none", "auto", samples=data.samples), {}), None, "none"
        guard: dict[str, Mapping[str, float]] = {}
        rejected: dict[str, str] = {}
        if sum(r.count for r in rulers) < FEWEST_PAIRS:
            return Verdict((program, data), self.settings, folds, rulers, fitted_best, None, chosen, guard, rejected)
        base = agree_between_ranks(pool([r.compare(pruned) for r in rulers]))
        guard["none"], best = base.record(), base
        pairs = sum(r.samples * len(r.noisy) for r in rulers)
        allowed = max(TOLERANCE, base.spread(pairs)) if several else TOLERANCE
        for name, form in self._candidates(sample_count(folds[0][0]), several).items():
            fitted, compared = fitted_best, []
            for i, (ruler, (rest, _)) in enumerate(zip(rulers, folds, strict=True)):
                now = form.fit(program, pruned, keep, rest)
                compared.append(ruler.compare(pruned, now.tensors))
                fitted = now if i == 0 else fitted
            value = agree_between_ranks(pool(compared))
            guard[name] = value.record()
            why_not = value.veto(base, allowed)
            if why_not:
                rejected[name] = why_not
            elif value.is_better(best, TOLERANCE if best is base else 0.0):  # a tie with no recovery goes to recovery
                fitted_best, best_form, best, chosen = fitted, form, value, name
        return Verdict((program, data), self.settings, folds, rulers, fitted_best, best_form, chosen, guard, rejected)

    @property
    def settings(self) -> tuple[object, ...]:
        """What a verdict depends on beside program and data."""
        return replace(self.form, method="auto"), self.held_out, self.seed

    def holds(self, verdict: Verdict, program: Program, data: Calibration) -> bool:
        """Whether a verdict is what :meth:`judge` would find."""
        return verdict.about[0] is program and verdict.about[1] is data and verdict.settings == self.settings

    def finish(self, verdict: Verdict, program: Program, pruned: Program, keep: Keep, data: Calibration) -> Fitted:
        """The winner, after optimiser steps where these were asked for and help, else fitted again to all samples."""
        asked = "auto" if self.tuner is None else "tune"
        if not verdict.usable:
            blind = verdict.rulers and not any(ruler.dense for ruler in verdict.rulers)
            short = "no output to judge recovery by" if blind else "too few samples to judge recovery on held-out ones"
            why = {"": f"{short}, so nothing was recovered"}
            return Fitted(Recovery("none", asked, samples=data.samples, skipped=why), {})
        best, best_form, chosen = verdict.fitted, verdict.form, verdict.chosen
        folds, rulers, guard = verdict.folds, verdict.rulers, dict(verdict.guard)
        tuning = None
        if self.tuner is not None:
            tuned, tuning = self.tuner.run(program, pruned, keep, folds[0][0], best.tensors, rulers[0], TOLERANCE)
            guard["tune"] = tuning.best
            if tuning.kept:
                made = replace(best.recovery, method="tune", samples=sample_count(folds[0][0]))
                best, best_form, chosen = Fitted(made, tuned), None, "tune"
        if best_form is not None:
            exact = replace(best_form, rel=best.recovery.rel, refit_rel=best.recovery.refit_rel)
            best = exact.fit(program, pruned, keep, data.batches)
        return replace(
            best,
            recovery=replace(
                best.recovery,
                asked=asked,
                guard=guard,
                rejected=verdict.rejected,
                folds=len(folds),
                tuning=tuning,
                held_out=sum(sample_count(judged) for _, judged in folds),
                refitted=best_form is not None,
                chosen=chosen,
            ),
        )

    def _candidates(self, samples: int, several: bool) -> dict[str, ClosedForm]:
        """By name. On several folds strengths of refit alone, unless the strength is given."""
        methods = ("refit",) if several and self.form.rel is None else ("bias", "ridge", "refit")
        made = {method: replace(self.form, method=method) for method in methods}
        if samples < FEW_FITTED and self.form.rel is None:
            for method in methods[-2:]:
                rel, refit_rel = made[method].strengths(FEW_FITTED)
                made[method] = replace(made[method], rel=rel, refit_rel=refit_rel)
                strong = STRONG if self.form.refit_rel is None else self.form.refit_rel
                made[f"{method} rel={STRONG:g}"] = replace(made[method], rel=STRONG, refit_rel=strong)
        return made


def yardsticks(program: Program, folds: Sequence[Fold], seed: int, samples: int) -> list[Yardstick]:
    """One per fold; the fewer samples there are, the more noisy copies of each."""
    copies = max(1, min(MOST_COPIES, -(-JUDGED // max(samples, 1))))
    return [Yardstick(program, judged, seed + i, copies) for i, (_, judged) in enumerate(folds)]


def agree_between_ranks(value: Agreement) -> Agreement:
    """The same figures in every process."""
    kl = [] if value.kl is None else [value.kl]
    figures = torch.tensor([value.mixed, value.copies, value.cosine, *kl], dtype=torch.float64)
    said = from_first({"agreement": figures, "kept": value.kept.double()})
    mixed, copies, cosine, *kl = said["agreement"].tolist()
    return Agreement(mixed, copies, cosine, kl[0] if kl else None, said["kept"])


def split_in_folds(program: Program, data: Calibration, share: float) -> list[Fold]:
    """(to fit, to judge) once, or several times where one share of the samples would be too few to judge on.

    A graph captured at a fixed batch size takes whole batches only; with a single one there is no fold at all.
    """
    rest, held = split(program, data, share)
    if sample_count(held) >= FEW_HELD:
        return [(rest, held)]
    batches, total = list(data.batches), data.samples
    if program.fixed_batch:
        count = min(FOLDS, len(batches))
        return (
            [([b for i, b in enumerate(batches) if i % count != f], batches[f::count]) for f in range(count)]
            if count > 1
            else []
        )
    if total // QUARTER >= FEW_HELD:  # the last batches are few samples by the size of batches alone
        return [_fold(batches, 0, QUARTER)]
    count = min(FOLDS, total // FOLD)
    return [_fold(batches, f, count) for f in range(count)] if count > 1 else []


def _fold(batches: Sequence[Batch], fold: int, count: int) -> Fold:
    """Every ``count``-th sample is judged, the others are fitted."""
    rest: list[Batch] = []
    held: list[Batch] = []
    first = 0
    for batch in batches:
        of = (torch.arange(batch.size) + first) % count
        first += batch.size
        for home, index in ((rest, (of != fold).nonzero()[:, 0]), (held, (of == fold).nonzero()[:, 0])):
            if len(index):
                home.append(batch.pick(index))
    return rest, held


def split(program: Program, data: Calibration, share: float) -> Fold:
    """(to fit, to judge): the last batches where there are several, else the last samples of the one batch.

    A graph captured at a fixed batch size takes whole batches only; with a single one nothing is held out.
    """
    batches = list(data.batches)
    if len(batches) == 1:
        size = batches[0].size
        held = max(1, round(size * share))
        if held >= size or program.fixed_batch:
            return batches, []
        whole = torch.arange(size)
        return [batches[0].pick(whole[: size - held])], [batches[0].pick(whole[size - held :])]
    held = max(1, round(len(batches) * share))
    return batches[:-held], batches[-held:]
