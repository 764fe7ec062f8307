"""``Recover``: move the weights of what stays so that it does what the whole did. Closed form, no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...axis import Keep, kept_index
from ...data import Batch, Calibration
from ...errors import OptionError, nearest
from ...pipeline import Transform
from ...plan import CompressionPlan
from ...program import Program
from ...rebuild import copy_graph, rebuild
from .recovery.agreement import Yardstick
from .recovery.lockstep import Lockstep
from .recovery.moments import System
from .recovery.sites import Site, find_sites
from .resize import resize

METHODS = ("auto", "ridge", "refit", "bias", "scale", "none")
TOLERANCE = 0.002  # by how much a candidate may fall below no recovery and still count as equal (recovery.md 4)
SCALE_REL = 1e-2
FEW = 50  # samples; below, the ridge holds on to the weights it has
MANY = 1024
LARGEST = 8192  # inputs of a layer that is solved for: 512 MiB of moments; above, only its bias moves


@dataclass(frozen=True)
class Step:
    """What recovery did at one layer: weighted mean squared error of its target per row, before and after."""

    node: str
    parameter: str
    role: str  # reads: sums over a cut axis; makes: input refit of a projection that makes one
    weighted_by: str  # the norm behind the target: variance, power or nothing
    rows: int
    before: float
    after: float


@dataclass(frozen=True)
class Recovery:
    """What was done, as data for the report.

    method      that was kept;  asked: that was asked for
    steps       per layer, in graph order
    guard       candidate -> agreement with the dense outputs on held-out samples (``auto`` only)
    skipped     layer -> why it was left as it was
    """

    method: str
    asked: str
    rel: float
    refit_rel: float
    samples: int
    held_out: int
    steps: tuple[Step, ...] = ()
    guard: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "steps": [asdict(s) for s in self.steps]}

    def __str__(self) -> str:
        gained = [1 - s.after / s.before for s in self.steps if s.before > 0]
        share = f", {100 * sum(gained) / len(gained):.0f} % of the error of {len(gained)} layers" if gained else ""
        return f"recovery '{self.method}' on {self.samples} samples{share}"


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

    with G, B the weighted, centred second moments of the kept inputs c and of y - W c. The norm's weight is what makes
    it work on real models (one massive-activation token otherwise rules the fit), the residual-aware target what lets
    later layers repair earlier ones.

    method    ``ridge``  as above
              ``refit``  ridge, and projections that read the changed stream are refit to their dense outputs
              ``bias``   only ``b'``      ``scale``  one factor per kept unit (mask tuning) and ``b'``      ``none``
              ``auto``   none, bias, ridge and refit are tried; the best on held-out samples is kept. A candidate that
                         agrees less with the dense outputs than none does is rejected: never worse on that yardstick
    data      calibration batches, unlabelled
    rel       ridge strength; by default 0.5 (0.3 with refit), 5 below 50 samples
    refit_rel of the input refit; by default 0.3, 0.1 from 1024 samples
    held_out  share of the samples that ``auto`` judges on and does not fit
    results   one :class:`Recovery` per run is appended

    Law     error(ridge) <= error(bias) <= error(none) at every layer on the fit samples; a plan that cuts nothing
            leaves the weights bit-identical. A layer that keeps no input gets its bias alone; one without a bias is
            solved about zero; shared weights are left alone.
    Cost    one run of each graph per candidate, plus k^2 per row and k^3 / 3 per layer of k kept inputs; memory: 8 k^2
            bytes, and of every batch the values alive at one point of both graphs
    Source  recovery.md; the ridge to the original weights: Frantar and Alistarh 2022, arXiv:2208.11580; sequential
            with residual targets: K-prune, arXiv:2308.03449; bias: FLAP, arXiv:2312.11983; scales: arXiv:2204.09656
    """

    needs = ("axes", "groups", "plan")
    gives = ("axes", "groups", "plan")

    method: str = "auto"
    rel: float | None = None
    refit_rel: float | None = None
    held_out: float = 0.2
    seed: int = 0
    data: Calibration | None = field(default=None, repr=False)
    results: list[Recovery] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"unknown recovery '{self.method}'", where="--recover",
                              cure=nearest(self.method, METHODS))
        for name, value in (("rel", self.rel), ("refit_rel", self.refit_rel)):
            if value is not None and not value >= 0:
                raise OptionError(f"{name} must not be negative", where=f"{name}={value}")
        if not 0 < self.held_out < 1:
            raise OptionError("held_out is a share between 0 and 1", where=f"held_out={self.held_out}")

    def run(self, program: Program) -> Program:
        plan = program.need("plan")
        plan.check(program.group_by_name)
        kept = {g.axis: plan.kept(g) for g in program.need("groups") if g.name in plan.choices}
        keep = {axis: index for axis, index in kept.items() if len(index) < axis.size}
        if self.method == "none" or not keep:
            return program
        if self.data is None or not self.data.batches:
            raise OptionError("recovery needs data", where=f"--recover {self.method}",
                              why="it fits what stays to what the dense model does on calibration inputs",
                              cure="give --data, or --recover none")
        pruned = program.without_facts(exported=resize(program, keep, self.slug()))
        found = self._choose(program, pruned, keep) if self.method == "auto" else \
            self._fit(program, pruned, keep, self.data.batches, self.method)
        self.results.append(replace(found.recovery, asked=self.method))
        notes = (*program.notes, str(found.recovery))
        if not found.tensors:
            return program.but(notes=notes)
        exported = _written_back(program, keep, found.tensors)
        return program.but(exported=exported, scores=None, axes=replace(program.need("axes")),
                           groups=(*list(program.need("groups")),),
                           plan=CompressionPlan(plan.choices, plan.about), notes=notes)

    def _rel(self, samples: int, refit: bool) -> float:
        if self.rel is not None:
            return self.rel
        return 5.0 if samples < FEW else 0.3 if refit else 0.5

    def _refit_rel(self, samples: int) -> float:
        if self.refit_rel is not None:
            return self.refit_rel
        return 5.0 if samples < FEW else 0.3 if samples < MANY else 0.1

    def _choose(self, program: Program, pruned: Program, keep: Keep) -> _Fitted:
        """The candidate that agrees best with the dense outputs on held-out samples, ``none`` among them."""
        assert self.data is not None
        fit, held = split(program, self.data, self.held_out)
        none = _Fitted(Recovery("none", self.method, 0.0, 0.0, sum(b.size for b in fit), sum(b.size for b in held)), {})
        yardstick = Yardstick(program, held, self.seed) if held else None
        if yardstick is None or not yardstick.usable:
            why = {"": "too few samples to judge recovery on held-out ones, so nothing was recovered"}
            return replace(none, recovery=replace(none.recovery, skipped=why))
        base = yardstick.measure(pruned)
        guard, best, best_value = {"none": base.record()}, none, base.mixed
        for method in ("bias", "ridge", "refit"):
            candidate = self._fit(program, pruned, keep, fit, method)
            now = yardstick.measure(pruned, candidate.tensors)
            guard[method] = now.record()
            rejected = now.copies < base.copies - TOLERANCE
            if not rejected and now.mixed > best_value:
                best, best_value = candidate, now.mixed
        return replace(best, recovery=replace(best.recovery, guard=guard, held_out=sum(b.size for b in held)))

    def _fit(self, program: Program, pruned: Program, keep: Keep, batches: Sequence[Batch], method: str) -> _Fitted:
        """Walk both graphs from layer to layer and solve each as it comes."""
        samples = sum(b.size for b in batches)
        rel, refit_rel = self._rel(samples, method == "refit"), self._refit_rel(samples)
        found = find_sites(program, keep, pruned.graph, method == "refit")
        walk = Lockstep(program, pruned, keep, batches, found.sites)
        skipped, steps, changed = dict(found.skipped), [], {}
        for site in found.sites:
            inputs = 0 if site.empty else walk.tensors[site.weight].numel() // _outputs(walk.tensors[site.weight], site)
            how = method if inputs <= LARGEST else "bias"
            if how != method:
                skipped[site.node] = f"it has {inputs} inputs, more than {LARGEST}: its bias alone moved"
            moments = walk.collect(site, products=how != "bias")
            if not moments.rows or (site.empty and not site.bias):
                skipped[site.node] = "no rows to fit" if not moments.rows else "it keeps no input and has no bias"
                continue
            system = moments.finish(centred=bool(site.bias))
            step = rel if site.reads else refit_rel
            weight, bias = solve(system, site, walk.tensors[site.weight] if not site.empty else None, how, step)
            for placeholder, change in ((site.weight, weight), (site.bias, bias)):
                if change is not None:
                    old = walk.tensors[placeholder]
                    walk.tensors[placeholder] = changed[placeholder] = _moved(old, change, site, placeholder)
            before, after = system.error(), system.error(weight, bias)
            steps.append(Step(site.node, program.tensor_of_placeholder[site.weight], "reads" if site.reads else "makes",
                              site.norm, moments.rows, before, after))
        recovery = Recovery(method, self.method, rel, refit_rel if method == "refit" else 0.0, samples, 0,
                            tuple(steps), skipped=skipped)
        return _Fitted(recovery, changed)


@dataclass(frozen=True)
class _Fitted:
    """A candidate: the changed tensors of the pruned program by placeholder, and the record."""

    recovery: Recovery
    tensors: dict[str, Tensor]


def solve(system: System, site: Site, weight: Tensor | None, method: str, rel: float) -> tuple[Tensor | None,
                                                                                              Tensor | None]:
    """(change of the weight [o, k], change of the bias [o]) by ``method``, fp64; None where it stays."""
    movable = bool(site.bias)
    if method == "bias" or site.empty or weight is None:
        return None, system.bias() if movable else None
    if method == "scale":
        columns = len(system.g) // max(len(site.unit), 1)
        change = system.scale(_matrix(weight, site), site.unit.repeat_interleave(columns), SCALE_REL)
    else:
        change = system.ridge(rel)
    return change, system.bias(change) if movable else None


def split(program: Program, data: Calibration, share: float) -> tuple[list[Batch], list[Batch]]:
    """(to fit, to judge): whole batches where there are several, else the samples of the one batch.

    A graph captured at a fixed batch size takes whole batches only; with a single one nothing is held out.
    """
    batches = list(data.batches)
    if len(batches) == 1:
        inputs = [n.meta.get("val") for n in program.placeholders() if n.name in program.user_inputs]
        if any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], int) for v in inputs):
            return batches, []
        size = batches[0].size
        held = max(1, round(size * share))
        if held >= size:
            return batches, []
        return [_samples(batches[0], 0, size - held)], [_samples(batches[0], size - held, size)]
    held = max(1, round(len(batches) * share))
    return batches[:-held], batches[-held:]


def _samples(batch: Batch, start: int, stop: int) -> Batch:
    size = batch.size

    def part(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    return Batch(tuple(map(part, batch.args)), {k: part(v) for k, v in batch.kwargs.items()}, part(batch.labels))


def _outputs(weight: Tensor, site: Site) -> int:
    return weight.shape[1 if site.form == "transposed" else 0]


def _matrix(weight: Tensor, site: Site) -> Tensor:
    return weight.T if site.form == "transposed" else weight.flatten(1)


def _moved(old: Tensor, change: Tensor, site: Site, placeholder: str) -> Tensor:
    """The new tensor in the shape and dtype of the old one; the sum is made in fp64."""
    if placeholder == site.weight and site.form == "transposed":
        change = change.T
    return (old.double() + change.reshape(old.shape).to(old.device)).to(old.dtype)


@torch.no_grad()
def _written_back(program: Program, keep: Keep, changed: Mapping[str, Tensor]) -> Any:
    """The dense program with new values in the entries that stay."""
    exported, axes, bound = program.exported, program.need("axes"), program.tensor_of_placeholder
    state, constants = dict(exported.state_dict), dict(exported.constants)
    for placeholder, small in changed.items():
        name = bound[placeholder]
        home: dict[str, Any] = state if name in state else constants
        whole: Tensor = home[name].detach().clone()
        index = [kept_index(dim, keep).to(whole.device) for dim in axes.dims[placeholder]]
        whole[torch.meshgrid(*index, indexing="ij")] = small
        is_parameter = isinstance(home[name], torch.nn.Parameter)
        home[name] = torch.nn.Parameter(whole, home[name].requires_grad) if is_parameter else whole
    return rebuild(exported, copy_graph(exported), state_dict=state, constants=constants)
