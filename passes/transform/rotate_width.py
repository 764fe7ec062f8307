"""``RotateWidth``: a residual stream in the basis in which its last directions are hardly needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ...data.batch import Calibration
from ...ir.axis import Axis, atoms
from ...ir.group import Kind, PruneGroup
from ...ir.norms import row_norms
from ...ir.pipeline import Pipeline, Transform
from ...ir.program import Program
from ..analysis.find_groups import FindGroups
from ..analysis.propagate_axes import PropagateAxes
from .rotation.basis import principal_basis
from .rotation.rewrite import fold, untied_by
from .rotation.uses import NotRotatable, find_uses

NO_DATA = "there is no data to find its basis from"


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
        rotated: list[Rotation] = []
        after, tried = program, set[str]()
        while True:
            pending = [g for g in _streams(after) if g.name not in tried]
            if not pending:
                break
            group = pending[0]
            tried.add(group.name)
            try:
                turned, one = self._rotate(after, group)
            except NotRotatable as odd:
                skipped.append((group.name, str(odd)))
                continue
            turned = Pipeline((PropagateAxes(), FindGroups())).run(turned)
            known = {g.name for g in _streams(after, rotated=True)}
            name = next((g.name for g in _streams(turned, rotated=True) if g.name not in known), group.name)
            rotated.append(replace(one, group=name))
            after = turned
        told = [*map(_told, rotated), *(f"{name} stays in its own basis: {why}" for name, why in skipped)]
        record = Rotations(tuple(rotated), tuple(skipped))
        after = after.without_facts() if rotated else program
        return after.but(notes=tuple(dict.fromkeys([*program.notes, *told]))), record

    def _rotate(self, program: Program, group: PruneGroup) -> tuple[Program, Rotation]:
        """(the program with this stream rotated, what that did). Raises NotRotatable."""
        if group.frozen:
            raise NotRotatable(group.frozen)
        if self.data is None or not self.data.batches:
            raise NotRotatable(NO_DATA)
        uses = find_uses(program, group.axis)
        shared = [] if self.untie else untied_by(program, uses)
        if shared:
            raise NotRotatable(f"{', '.join(shared)} serves it at both ends, and would be two tensors")
        folded = fold(program, uses, self.slug())
        basis, energy = principal_basis(folded, self.data)
        curve = tuple(round(float(share), 6) for share in energy.cumsum(0))
        return folded.rotated(basis), Rotation(group.name, curve, folded.untied)


def _streams(program: Program, rotated: bool = False) -> Iterator[PruneGroup]:
    """The groups of widths over which a norm of rows runs, each once: those in a basis already, or the others."""
    axes = program.need("axes")
    normed: set[Axis] = set()
    for norm in row_norms(program.graph):
        dims = axes.dims.get(norm.source.name)
        if isinstance(dims, list) and (norm.width is not None) is rotated:
            normed.update(atoms(dims[-1]))
    yield from (g for g in program.need("groups") if g.kind is Kind.WIDTH and g.axis in normed)


def _told(one: Rotation) -> str:
    half = one.energy[(len(one.energy) - 1) // 2]
    said = f"{one.group} is in its principal basis: half of the directions hold {half:.1%} of what its norms read"
    for name, elements in one.untied:
        said += f"; '{name}' served the stream at both ends and is two tensors now, {elements:,} elements more"
    return said
