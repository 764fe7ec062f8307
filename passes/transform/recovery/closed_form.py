"""One candidate of recovery: walk both graphs from layer to layer and solve each as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ....data.batch import Batch, sample_count
from ....ir.axis import Keep
from ....ir.program import Program
from ....process.ranks import mine
from .lockstep import Lockstep
from .moments import System
from .record import Fitted, Recovery, Step
from .reduction import Reduction
from .shared import from_first
from .sites import Site, find_sites

SCALE_REL = 1e-2
FEW = 50  # samples; below, the ridge holds on to the weights it has
STRONG = 5.0  # ridge strength for few samples
MANY = 1024
LARGEST = 8192  # inputs of a layer that is solved for: 512 MiB of moments; above, only its bias moves
LIMIT, RETRIES = 1.0, 3  # a change of the weights beyond their own size makes the ridge ten times stronger, so often


@dataclass(frozen=True)
class ClosedForm:
    """How every layer is solved.

    method     ridge, refit, bias or scale (see ``Recover``)
    rel        ridge strength; None: 0.5 (0.3 with refit), 5 below 50 samples
    refit_rel  of the input refit; None: 0.3, 0.1 from 1024 samples, 5 below 50
    limited    at a layer whose weights would change by more than their own size (Frobenius norm), the ridge is made
               ten times stronger, up to three times
    solver     of the scales: ``ridge`` or ``lsmr`` (see ``System.scale``)
    beyond     a layer whose scales leave [-10, 10]: ``skip`` it, or ``stop`` there as the reference does
    readout    where the last sum is read at one position only (a class token), its rows count T/4 times as much

    Source     recovery.md section 3; anchored ridge: Frantar and Alistarh 2022, arXiv:2208.11580; targets that hold the
               student's residual: K-prune, arXiv:2308.03449; bias: FLAP, arXiv:2312.11983, whose code overwrites the
               bias where this adds to it; scales: Kwon et al. 2022, arXiv:2204.09656, section 4.3
    """

    method: str
    rel: float | None = None
    refit_rel: float | None = None
    limited: bool = True
    solver: str = "ridge"
    beyond: str = "skip"
    readout: bool = True

    def strengths(self, samples: int) -> tuple[float, float]:
        """(rel, refit_rel) for so many samples."""
        refit = self.method == "refit"
        rel = STRONG if samples < FEW else 0.3 if refit else 0.5
        refit_rel = STRONG if samples < FEW else 0.3 if samples < MANY else 0.1
        return (rel if self.rel is None else self.rel), (refit_rel if self.refit_rel is None else self.refit_rel)

    def fit(self, program: Program, pruned: Program, keep: Keep, batches: Sequence[Batch]) -> Fitted:
        """Weights of ``pruned`` (the sliced ``program``) that answer best for what is gone, on ``batches``.

        With several processes each passes all batches and works on its own share; all get the same result.
        """
        samples = sample_count(batches)
        rel, refit_rel = self.strengths(samples)
        merging = None if program.tokens is None else Reduction(program.tokens, pruned.graph)
        found = find_sites(program, keep, pruned.graph, self.method == "refit", merging.changed if merging else ())
        found = merging.fitting(found) if merging else found
        walk = Lockstep(
            program, pruned, keep, [batches[i] for i in mine(len(batches))], found.sites, self.readout, merging
        )
        skipped: dict[str, str] = dict(found.skipped)
        steps: list[Step] = []
        changed: dict[str, Tensor] = {}
        stopped = ""
        for site in found.sites:
            old = None if site.empty else walk.tensors[site.weight]
            how, inputs = self.method, walk.size(site)[0]
            if inputs > LARGEST:
                how = "bias"
                skipped[site.node] = f"it has {inputs} inputs, more than {LARGEST}: its bias alone moved"
            if stopped or (site.empty and not site.bias):
                skipped[site.node] = stopped or "it keeps no input and has no bias"
                walk.leave(site)
                continue
            if site.form == "depthwise":
                self._by_channel(program, site, walk, refit_rel, changed, steps)
                continue
            moments = walk.collect(site, products=how != "bias")
            if not moments.rows:
                skipped[site.node] = "no rows to fit"
                continue
            system = moments.finish(centred=bool(site.bias))
            solved = self._solve(system, site, old, how, rel if site.reads else refit_rel)
            if solved is None:
                skipped[site.node] = "its scales leave [-10, 10]: the system is nearly singular"
                stopped = f"the scales of {site.node} left [-10, 10]" if self.beyond == "stop" else ""
                continue
            _move(walk, site, solved.weight, solved.bias, changed)
            steps.append(_step(program, site, moments.rows, system, solved, old))
        recovery = Recovery(
            self.method,
            self.method,
            rel,
            refit_rel if self.method == "refit" else 0.0,
            samples,
            steps=tuple(steps),
            skipped=skipped,
        )
        return Fitted(recovery, changed)

    def _by_channel(
        self, program: Program, site: Site, walk: Lockstep, rel: float, changed: dict[str, Tensor], steps: list[Step]
    ) -> None:
        """Solve a depthwise convolution, a few taps per channel: from thousands of rows, so no strength is raised."""
        system = walk.collect_by_channel(site).finish(centred=bool(site.bias))
        if system is None:
            return
        old = walk.tensors[site.weight]
        change = system.ridge(rel)
        bias = system.bias(change) if site.bias else None
        _move(walk, site, change, bias, changed)
        name = program.tensor_of_placeholder[site.weight]
        moved = float(change.norm()) / max(float(old.double().norm()), 1e-30)
        before, after = system.error(), system.error(change, bias)
        steps.append(Step(site.node, name, "makes", site.norm, system.rows, before, after, rel, moved))

    def _solve(self, system: System, site: Site, weight: Tensor | None, how: str, rel: float) -> _Solved | None:
        """What changes at one layer; None: its scales are out of range."""
        movable = bool(site.bias)
        if how == "bias" or weight is None:
            return _Solved(None, system.bias() if movable else None)
        matrix = _matrix(weight, site)
        if how == "scale":
            columns = len(system.g) // max(len(site.unit), 1)
            unit = site.unit.repeat_interleave(columns).to(weight.device)
            scaled = system.scale(matrix, unit, SCALE_REL, self.solver)
            return None if scaled is None else _Solved(scaled, system.bias(scaled) if movable else None)
        change, rel = solve_bounded(system, matrix, rel, self.limited)
        return _Solved(change, system.bias(change) if movable else None, rel)


@dataclass(frozen=True)
class _Solved:
    """Changes of a layer, fp64: weight [o, k], bias [o]; None where it stays."""

    weight: Tensor | None
    bias: Tensor | None
    rel: float = 0.0

    def relative(self, old: Tensor | None) -> float:
        size = float(old.double().norm()) if old is not None else 0.0
        return float(self.weight.norm()) / size if self.weight is not None and size > 0 else 0.0


def solve_bounded(system: System, weight: Tensor, rel: float, limited: bool = True) -> tuple[Tensor, float]:
    """(change [o, k], the strength that was used): ten times stronger while the change exceeds the weight's size.

    Such a change says that inputs nearly repeat one another and that the fit lives on their small differences.
    """
    change, most = system.ridge(rel), LIMIT * float(weight.double().norm())
    for _ in range(RETRIES if limited and most > 0 else 0):
        if float(change.norm()) <= most:
            break
        rel = 10 * max(rel, 1e-3)
        change = system.ridge(rel)
    return change, rel


def _matrix(weight: Tensor, site: Site) -> Tensor:
    return weight.T if site.form == "transposed" else weight.flatten(1)


def _step(program: Program, site: Site, rows: int, system: System, solved: _Solved, old: Tensor | None) -> Step:
    """What was solved at one layer, for the record."""
    return Step(
        site.node,
        program.tensor_of_placeholder[site.weight],
        "reads" if site.reads else "makes",
        site.norm,
        rows,
        system.error(),
        system.error(solved.weight, solved.bias),
        solved.rel,
        solved.relative(old),
    )


def _move(walk: Lockstep, site: Site, weight: Tensor | None, bias: Tensor | None, changed: dict[str, Tensor]) -> None:
    """Move a site's tensors, in the walk and in ``changed``, in every process by what the first one found."""
    moves = {site.weight: weight, site.bias: None if bias is None else site.sign * bias}
    new = {p: _add_change(walk.tensors[p], by, site, p) for p, by in moves.items() if by is not None}
    walk.tensors.update(from_first(new))
    changed.update((p, walk.tensors[p]) for p in new)


def _add_change(old: Tensor, change: Tensor, site: Site, placeholder: str) -> Tensor:
    """The new tensor in the shape and dtype of the old one; the sum is made in fp64."""
    if placeholder == site.weight and site.form == "transposed":
        change = change.T
    return (old.double() + change.reshape(old.shape).to(old.device)).to(old.dtype)
