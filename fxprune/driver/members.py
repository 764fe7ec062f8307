"""Which neurons or channels stay: those with the best scores, or those that OBS names, whichever is nearer to dense
once it is repaired."""

from __future__ import annotations

from collections.abc import Sequence

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


def is_obs_nearer(
    scored: Program, ranked: Program, finders: Sequence[Pass], data: Calibration, seed: int
) -> tuple[bool, str]:
    """(whether the plan of ``ranked`` is to be taken, what was found): both plans repaired by ridge on one half of some
    samples and judged on the other. OBS stays unless it is farther by more than one standard error of the paired
    difference; also where there are too few samples to tell."""
    from ..passes.analysis.importance.damage import Reference, divergences
    from ..passes.analysis.importance.obs import first

    batches = first(data.batches, COMPARED)
    repair, judge = Calibration(tuple(batches[::2]), data.origin), batches[1::2]
    if not judge:
        return True, ""
    dense = Reference(scored)
    one, two = (
        divergences(dense, carry_out(fit_by_ridge(program, finders, repair, seed)), judge)
        for program in (scored, ranked)
    )
    more = two - one
    told = {
        "more": more.mean(),
        "error": more.std(correction=0) / len(more) ** 0.5,
        "one": one.mean(),
        "two": two.mean(),
    }
    agreed = {name: float(value) for name, value in ranks.agree(told).items()}
    nearer = agreed["more"] <= agreed["error"]
    said = f"divergence after repair: {agreed['one']:.3g} by scores, {agreed['two']:.3g} by OBS"
    return nearer, f"members by {'OBS' if nearer else 'their scores'} ({said})"
