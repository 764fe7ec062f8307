"""``RotateWidth``: a residual stream in the basis in which its last directions are hardly needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...data.batch import Calibration
from ...ir.axis import Axis, atoms
from ...ir.group import Kind, PruneGroup
from ...ir.norms import row_norms
from ...ir.pipeline import Transform
from ...ir.program import Program
from .rotation.basis import principal_bases
from .rotation.rewrite import find_untied, fold
from .rotation.uses import NotRotatable, Uses, find_uses

NO_DATA = "there is no data to find its basis from"
NOT_FINITE = "what is read of it is not finite on the data"


@dataclass(frozen=True)
class Rotation:
    """One stream that was rotated: its group's name, what share of the energy that norms read its first directions
    hold, and names and elements of tensors that became two. ``energy[i]``: of the first i + 1."""

    group: str
    energy: tuple[float, ...]
    untied: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rotations:
    """What was rotated, and why other streams were not (group -> reason)."""

    rotated: tuple[Rotation, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RotateWidth(Transform):
    """Rewrite every pre-norm residual stream in its principal basis. The outputs stay (up to rounding); in the new
    basis the last directions carry little, and cutting them equals masking them.

    Norms between the stream and its readers only rescale rows, so an orthogonal Q may stand on both sides of them:
    writers become Q^T C W (C takes the mean away, for layer norm), readers W diag(gamma) Q with W beta in their bias,
    and each norm x / sqrt(|x|^2 / D + eps), where D stays the width before cutting (``FuseNorms`` makes one op of it
    again). One Q for the whole stream: nothing is added at run time.

    What else touches the stream may be sums, moves, scales of writers (layer scale), tables (positions, class token),
    means over tokens. Anything else leaves it as it is, with the reason in the record and in ``program.notes``; so do
    post-norm streams, whose skip would need a product of its own.

    untie   also where a table and the layer that reads with the same weights become two (tied embeddings), at the cost
            of as many parameters again
    data    calibration batches: what the norms read is seen on them

    Needs ``axes`` and ``groups``. Law: the same function; applied twice it changes nothing
    Source  Ashkboos et al. 2024, SliceGPT (arXiv 2401.15024), section 3; one basis in place of one per block, and an
            exact norm
    """

    needs: ClassVar[tuple[str, ...]] = ("axes", "groups")
    takes: ClassVar[tuple[str, ...]] = ("data",)

    untie: bool = True
    data: Calibration | None = field(default=None, repr=False)

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, Rotations]:
        skipped: list[tuple[str, str]] = []
        found: list[tuple[PruneGroup, Uses]] = []
        for group in _streams(program):
            try:
                found.append((group, self._uses(program, group)))
            except NotRotatable as odd:
                skipped.append((group.name, str(odd)))
        rotated: list[Rotation] = []
        after = program
        while found:
            assert self.data is not None
            folded = fold(program, [uses for _, uses in found], self.slug())
            bases = principal_bases(folded, self.data)
            if len(bases) < len(found):
                skipped += [(group.name, NOT_FINITE) for group, _ in found if group.axis not in bases]
                found = [(group, uses) for group, uses in found if group.axis in bases]
                continue
            after = folded.rotate({axis: basis for axis, (basis, _) in bases.items()})
            for group, uses in found:
                curve = tuple(round(float(share), 6) for share in bases[group.axis][1].cumsum(0))
                rotated.append(Rotation(group.name, curve, tuple(find_untied(program, [uses]))))
            break
        told = [*map(_describe, rotated), *(f"{name} stays in its own basis: {why}" for name, why in skipped)]
        notes = tuple(dict.fromkeys([*program.notes, *told]))
        return after.but(notes=notes), Rotations(tuple(rotated), tuple(skipped))

    def _uses(self, program: Program, group: PruneGroup) -> Uses:
        """What touches the stream. Raises NotRotatable."""
        if group.frozen:
            raise NotRotatable(group.frozen)
        if self.data is None or not self.data.batches:
            raise NotRotatable(NO_DATA)
        uses = find_uses(program, group.axis)
        shared = [] if self.untie else [name for name, _ in find_untied(program, [uses])]
        if shared:
            raise NotRotatable(f"{', '.join(shared)} serves it at both ends, and would be two tensors")
        return uses


def _streams(program: Program) -> list[PruneGroup]:
    """The groups of widths over which a norm of rows runs that are in the model's own basis."""
    axes = program.need("axes")
    normed: set[Axis] = set()
    for norm in row_norms(program.graph):
        dims = axes.dims.get(norm.source.name)
        if isinstance(dims, list) and norm.width is None:
            normed.update(atoms(dims[-1]))
    return [g for g in program.need("groups") if g.kind is Kind.WIDTH and g.axis in normed]


def _describe(one: Rotation) -> str:
    half = one.energy[(len(one.energy) - 1) // 2]
    said = f"{one.group} is in its principal basis: half of the directions hold {half:.1%} of what its norms read"
    for name, elements in one.untied:
        said += f"; '{name}' served the stream at both ends and is two tensors now, {elements:,} elements more"
    return said
