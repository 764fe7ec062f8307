"""Which neurons or channels stay: those with the best scores, or those that OBS names, whichever is nearer to dense
once it is repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.batch import Calibration
from ..ir.group import Kind
from ..ir.pipeline import Pass
from ..ir.program import Program
from ..process import ranks
from .parts import carry_out
from .run import fit_by_ridge

COMPARED = 192  # samples: half of them repair, the others judge


def in_doubt(program: Program) -> bool:
    """Whether OBS is to be held against scores at all: where channels of convolutions may go.

    OBS supposes that what reads a channel makes up for it. Behind a channel of a compact network lie a depthwise
    convolution and two activations that clip, and its repair is damped: on EfficientNet-Lite0 at 0.75 of its MACs its
    choice lay at a KL of 0.55 from dense behind recovery, that of the scores at 0.36. On sentence encoders it gained.
    """
    return any(g.prunable and g.kind is Kind.CHANNEL for g in program.need("groups"))


@dataclass(frozen=True)
class Compared:
    """How far two results lie from dense, on samples that repaired neither.

    one, two   mean divergence of the outputs;  more: mean of the second's less the first's, sample by sample, and
               its standard error
    """

    one: float
    two: float
    more: float
    error: float

    @property
    def surely_nearer(self) -> bool:
        """Whether the second is nearer by more than a standard error."""
        return self.more < -self.error

    @property
    def surely_farther(self) -> bool:
        """Whether it is farther by more than a standard error."""
        return self.more > self.error

    def __str__(self) -> str:
        return f"divergence {self.one:.3g} and {self.two:.3g}, standard error of the difference {self.error:.2g}"


def compare_repaired(
    one: Program,
    two: Program,
    finders: Sequence[Pass],
    data: Calibration,
    seed: int,
    samples: int = COMPARED,
    fitted: bool = True,
) -> Compared | None:
    """Two plans of one model, each on its own graph, repaired by ridge on every other batch of some samples and
    compared on the rest. None where there are too few to tell.

    fitted   False: what stays is compared as it is
    """
    from ..passes.analysis.importance.damage import Reference, divergences
    from ..passes.analysis.importance.obs import first

    batches = first(data.batches, samples)
    repair, judge = Calibration(tuple(batches[::2]), data.origin), batches[1::2]
    if not judge:
        return None
    dense, found = Reference(one), []
    for program in (one, two):
        known = fit_by_ridge(program, finders, repair, seed) if fitted else program
        found.append(divergences(dense, carry_out(known), judge))
    more = found[1] - found[0]
    told = {
        "one": found[0].mean(),
        "two": found[1].mean(),
        "more": more.mean(),
        "error": more.std(correction=0) / len(more) ** 0.5,
    }
    return Compared(**{name: float(value) for name, value in ranks.agree(told).items()})


def is_obs_nearer(
    scored: Program, ranked: Program, finders: Sequence[Pass], data: Calibration, seed: int
) -> tuple[bool, str]:
    """(whether the plan of ``ranked`` is to be taken, what was found). OBS stays unless it is farther by more than one
    standard error of the paired difference; also where there are too few samples to tell."""
    found = compare_repaired(scored, ranked, finders, data, seed)
    if found is None:
        return True, ""
    said = f"divergence after repair: {found.one:.3g} by scores, {found.two:.3g} by OBS"
    return not found.surely_farther, f"members by {'their scores' if found.surely_farther else 'OBS'} ({said})"
