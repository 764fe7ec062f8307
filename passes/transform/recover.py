"""``Recover``: move the weights of what stays so that it does what the whole did. Closed form, no labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ...data.batch import Calibration
from ...data.memory import subsample_to_fit
from ...errors import InternalError, OptionError, nearest
from ...ir.axis import Axis
from ...ir.pipeline import Transform
from ...ir.plan import CompressionPlan
from ...ir.program import Program
from .recovery.choose import Guard, Verdict
from .recovery.closed_form import ClosedForm
from .recovery.record import Recovery
from .recovery.tune import Tuner
from .recovery.write_back import write_back
from .resize import resize

METHODS = ("auto", "tune", "ridge", "refit", "bias", "scale", "none")
SOLVERS, BEYOND = ("ridge", "lsmr"), ("skip", "stop")


@dataclass(frozen=True)
class Recover(Transform):
    """Update the weights of the kept elements, on the dense graph, so that slicing afterwards loses less.

    Runs *before* ``SliceAxes``, with the plan at hand: the dense graph keeps its shape and only the entries that will
    stay get new values (what will be cut keeps its old ones and no longer matters). So "sliced equals masked" holds as
    for any weights, every later pass is unaware of it, and the facts about the graph stay true: they are handed on.

    Per layer that sums over a cut axis, in graph order, with inputs from the already recovered pruned network::

        y_t  = A^-1 (z_t - rest_t)      z: the dense sum that the output goes into; rest: what the pruned one has there
        w_t  = 1 / var(z_t)             of the norm that reads z (RMS norm: 1 / mean z^2; none: 1); padding: 0
        W'   = W + [(G + rel mean(diag G) I)^-1 B]^T,   b' = mean(y) - W' mean(c)

    with G, B the weighted, centred second moments of the kept inputs c and of y - W c. A convolution without a bias has
    that of the batch norm behind it: its running mean moves. Depthwise convolutions behind what changed are refit
    channel by channel, to their own dense output. The norm's weight is what makes it work on real models (one
    massive-activation token otherwise rules the fit), the residual-aware target what lets later layers repair earlier
    ones.

    method    ``ridge``  as above
              ``refit``  ridge, and every other layer that reads what changed is refit too: to the sum that it goes
                         into where it joins a residual stream, else (projections, classifiers) to its dense output
              ``bias``   only ``b'``      ``scale``  one factor per kept unit (mask tuning) and ``b'``      ``none``
              ``auto``   none, bias, ridge and refit are tried; the one that keeps most of the dense answers on held-out
                         samples is kept, and none where recovery would lose some (see ``Guard``); the winner is then
                         fitted again to all samples
              ``tune``   auto, then ``steps`` optimiser steps of unlabelled distillation on all weights, kept where
                         they beat the closed form on the held-out samples (see ``Tuner``)
    data      calibration batches, unlabelled
    rel       ridge strength; by default 0.5 (0.3 with refit), 5 below 50 samples, and ten times that, and again, at a
              layer whose weights would change by more than their own size. A strength that is given is used as it is
    refit_rel of the input refit; by default 0.3, 0.1 from 1024 samples
    held_out  share of the samples that ``auto`` and ``tune`` judge on
    solver, beyond   of ``scale``: ``ridge`` or ``lsmr``; ``skip`` or ``stop`` (see ``System.scale``). The reference
              never scales the attention of layer 0 and takes a less pruned model for its teacher: we scale every
              layer, towards the dense one
    readout   rows that are read behind the last sum (a class token) count T/4 times as much there (methods A.3); on a
              small trained ViT (three plans at two sizes) it lowered the KL to the dense logits each time, by 0 to 9 %
    steps, lr of ``tune``
    reduced   the program with its plan's tokens reduced and parts dropped, its axes and groups: what is then cut and
              fitted, to the dense one with the same tokens merged (see ``Lockstep``). Weights then make up for merged
              tokens, too
    verdict   what ``auto`` and ``tune`` find of the closed forms, from :meth:`judge`: on the same program object and
              data it is not looked for again

    On MiniLM and STS-B at 0.3 of the MACs refitting layers whose own axes are whole (the last layer's attention) is
    worth 0.1 to 0.2 points over refitting only those that make a cut axis.

    Law     error(ridge) <= error(bias) <= error(none) at every layer on the fit samples; a plan that cuts nothing
            leaves the weights bit-identical. A layer that keeps no input gets its bias alone; one without a bias is
            solved about zero; shared weights are left alone.
    Cost    of a closed form: one run of each graph, whatever its depth, once more the layers it solves (2.2 to 2.9
            forward passes of the calibration set in all, counted), plus k^2 per row and k^3 / 3 per layer of k kept
            inputs; memory: 8 k^2 bytes, and of every batch the values alive at one point of both graphs. ``auto`` tries
            three of them, five below 150 samples (9 to 17 passes with judging), and below 120 samples two of them on
            three folds (about 22, more below 50 samples): two passes per layer that sums over a cut axis from 11 such
            layers on, which are six transformer blocks.
            ``tune``: per step one dense run and one pruned run with its gradient, of one batch
    Source  recovery.md; the ridge to the original weights: Frantar and Alistarh 2022, arXiv:2208.11580; sequential
            with residual targets: K-prune, arXiv:2308.03449; bias: FLAP, arXiv:2312.11983; scales: arXiv:2204.09656
    """

    takes = ("data", "reduced")
    needs = ("axes", "groups", "plan")
    gives = ("axes", "groups", "plan", "tokens")

    method: str = "auto"
    rel: float | None = None
    refit_rel: float | None = None
    held_out: float = 0.2
    solver: str = "ridge"
    beyond: str = "skip"
    readout: bool = True
    steps: int = Tuner.steps
    lr: float = Tuner.lr
    seed: int = 0
    data: Calibration | None = field(default=None, repr=False)
    reduced: Program | None = field(default=None, repr=False, compare=False)
    verdict: Verdict | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(
                f"unknown recovery '{self.method}'", where="--recover", cure=nearest(self.method, METHODS)
            )
        for name, value in (("rel", self.rel), ("refit_rel", self.refit_rel)):
            if value is not None and not value >= 0:
                raise OptionError(f"{name} must not be negative", where=f"{name}={value}")
        if not 0 < self.held_out < 1:
            raise OptionError("held_out is a share between 0 and 1", where=f"held_out={self.held_out}")
        for option, word, known in (("solver", self.solver, SOLVERS), ("beyond", self.beyond, BEYOND)):
            if word not in known:
                raise OptionError(f"unknown {option} '{word}'", where="--recover scale", cure=nearest(word, known))
        if self.steps < 1 or not self.lr > 0:
            raise OptionError(
                "tuning needs at least one step and a learning rate above zero",
                where="--recover tune",
                why=f"steps={self.steps}, lr={self.lr}",
            )

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, Recovery | None]:
        """(the program with fitted weights, what was fitted and its worth; None where the plan cuts nothing)."""
        plan = program.need("plan")
        plan.check(program.group_by_name)
        keep = _keep(program, plan)
        if self.method == "none" or not (keep or _rebuilds(program, plan)):
            return program, None
        if self.data is None or not self.data.batches:
            raise OptionError(
                "recovery needs data",
                where=f"--recover {self.method}",
                why="it fits what stays to what the dense model does on calibration inputs",
                cure="give `--data`, or `--recover none`",
            )
        data, pruned = subsample_to_fit(program, self.data), self._prune(program)
        if self.method in ("auto", "tune"):
            guard, verdict = self._guard, self.verdict
            if verdict is None or not guard.holds(verdict, program, data):
                verdict = guard.judge(program, pruned, keep, data)
            found = guard.finish(verdict, program, pruned, keep, data)
        else:
            found = self._form.fit(program, pruned, keep, data.batches)
        record = replace(found.recovery, asked=self.method)
        notes = (*program.notes, str(found.recovery))
        if not found.tensors:
            return program.but(notes=notes), record
        exported = write_back(program, keep, found.tensors)
        tokens = None if program.tokens is None else replace(program.tokens)
        fitted = program.but(
            exported=exported,
            scores=None,
            axes=replace(program.need("axes")),
            groups=(*list(program.need("groups")),),
            plan=replace(plan),
            tokens=tokens,
            notes=notes,
        )
        return fitted, record

    def judge(self, program: Program) -> Verdict:
        """What ``auto`` and ``tune`` find of the closed forms on the data: given as ``verdict``, they need not look."""
        assert self.data is not None
        keep = _keep(program, program.need("plan"))
        return self._guard.judge(program, self._prune(program), keep, subsample_to_fit(program, self.data))

    @property
    def _form(self) -> ClosedForm:
        return ClosedForm(
            self.method, self.rel, self.refit_rel, self.rel is None, self.solver, self.beyond, self.readout
        )

    @property
    def _guard(self) -> Guard:
        tuner = Tuner(self.steps, self.lr, self.seed) if self.method == "tune" else None
        return Guard(self._form, self.held_out, self.seed, tuner)

    def _prune(self, program: Program) -> Program:
        """What the plan leaves, before anything is fitted."""
        plan, base = program.need("plan"), program
        if _rebuilds(program, plan):
            if self.reduced is None:
                raise InternalError("a plan that reduces tokens or drops parts is recovered on the reduced program")
            base = self.reduced
        return base.without_facts(exported=resize(base, _keep(base, plan), self.slug()))


def _rebuilds(program: Program, plan: CompressionPlan) -> bool:
    """Whether the plan does more than slice: then what it leaves is another graph."""
    if plan.tokens is not None and not plan.tokens.empty:
        return True
    return any(not g.sliced and len(plan.kept(g)) < g.size for g in program.need("groups"))


def _keep(program: Program, plan: CompressionPlan) -> dict[Axis, Tensor]:
    """Kept elements by the program's own axes."""
    return dict(plan.keep(program.need("groups")))
