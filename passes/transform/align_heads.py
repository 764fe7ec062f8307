"""``AlignHeads``: queries, keys and values in a basis whose last elements can go."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data.batch import Calibration
from ...errors import OptionError, nearest
from ...ir.choice import BASES
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from .alignment.basis import Basis, balance
from .alignment.grams import of_data, of_weights
from .alignment.sites import Site, find_sites
from .alignment.stored import Store
from .recovery.shared import from_first

CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True)
class Alignment:
    """What was done.

    basis       ``data``, or ``weights`` where there was none
    strengths   group -> the strength of each element, best first, as the root of the sum of their squares over heads
                (see ``Basis.strengths``). [width] fp64
    stays       group -> why its elements stay as they are
    """

    basis: str
    strengths: Mapping[str, Tensor]
    stays: Mapping[str, str]


@dataclass(frozen=True)
class AlignHeads(Transform):
    """Rewrite the weights of attention so that element i of each head's queries and keys, and of its values, is the
    i-th best direction. The outputs stay what they are; the graph's text does not change.

    Per head, for queries q, keys k and values v and any invertible T, S::

        q' = T q, k' = T^-T k             the products stay
        v' = S v, W_o' = W_o S^-1         the outputs stay

    are chosen by the closed form of ``balance``: from the grams of q and of k, centred within each sample (what is
    added to all keys moves no softmax); and of W_o and of what it reads, rows weighted by the norm behind as recovery
    weighs them, about the mean where a bias can make up for it. One index of a width then means as much in every head,
    so that cutting its tail costs little. With GQA a key head has one basis, the grams of its queries added up.

    basis   ``data``: grams over the calibration data, and as with ``weights`` where there is none; ``weights``: as if
            layers read white noise, behind a norm its weight and bias: the singular vectors of the products of weights

    A basis stays what it is, and the record and a note say why, where elements mean something by themselves: rotary
    positions turn them by pairs, a norm of queries and keys weighs them, something else reads them; or where a weight
    is computed or shared.

    Needs   ``axes`` and ``groups``; both are handed on, groups in order are ``ordered``, their ``basis`` says by what.
    Law     outputs stay to 1e-5 (fp32); applied again it changes nothing; the same data, the same bits
    Cost    one run of the data; 8 d^2 bytes per head; an SVD of d x d per head
    Source  bases.md 2; queries and keys as in A^3 (arXiv:2505.12942), without data as in Olica (arXiv:2506.08436)
    """

    takes: ClassVar[tuple[str, ...]] = ("data",)
    needs: ClassVar[tuple[str, ...]] = ("axes", "groups")
    gives: ClassVar[tuple[str, ...]] = ("axes", "groups")

    basis: str = "data"
    data: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise OptionError(f"unknown basis '{self.basis}'", where=self.slug(), cure=nearest(self.basis, BASES))

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, Alignment]:
        """(the program in its new basis, what was done)."""
        sites, stays = find_sites(program, program.need("groups"))
        data = self.data if self.basis == "data" and self.data is not None and self.data.batches else None
        by = BASES[data is None]
        notes = (*program.notes, *_describe(len(sites), stays, by))
        if not sites:
            return program.but(notes=notes) if stays else program, Alignment(by, {}, stays)
        bases = _bases(program, sites, data)
        changed = from_first(_rewritten(program, sites, bases))
        state, constants = dict(program.exported.state_dict), dict(program.exported.constants)
        for name, tensor in changed.items():
            home: dict[str, Any] = state if name in state else constants
            trained = isinstance(home[name], torch.nn.Parameter)
            home[name] = torch.nn.Parameter(tensor, home[name].requires_grad) if trained else tensor
        exported = rebuild(program.exported, copy_graph(program.exported), state_dict=state, constants=constants)
        ordered = {site.group.name for site in sites}
        groups = tuple(g.but(basis=by, ordered=True) if g.name in ordered else g for g in program.need("groups"))
        axes = replace(program.need("axes"))
        strengths = {
            site.group.name: torch.stack([b.strengths for b in heads]).square().sum(0).sqrt()
            for site, heads in zip(sites, bases, strict=True)
        }
        after = program.without_facts(exported=exported, notes=notes).but(axes=axes, groups=groups)
        return after, Alignment(by, strengths, stays)


def _bases(program: Program, sites: list[Site], data: Calibration | None) -> list[list[Basis]]:
    """Of every site, by head."""
    store = Store(program)
    none: list[list[list[Tensor] | None]] = [[None, None] for _ in sites]
    found = none if data is None else of_data(program, sites, data)
    bases = []
    for site, grams in zip(sites, found, strict=True):
        both = [
            of_weights(side, store, centred=site.is_centred(number)) if given is None else given
            for number, (side, given) in enumerate(zip(site.sides, grams, strict=True))
        ]
        bases.append([balance(one, two) for one, two in zip(*both, strict=True)])
    return bases


@torch.no_grad()
def _rewritten(program: Program, sites: list[Site], bases: list[list[Basis]]) -> dict[str, Tensor]:
    """Parameter -> its new value, of those that change."""
    store, changed = Store(program), dict[str, Tensor]()
    current = collections.ChainMap(changed, program.tensors)  # a layer may close one attention and open another
    for site, heads in zip(sites, bases, strict=True):
        for number, side in enumerate(site.sides):
            shifts = side.shifts(store)
            for whole in (side.vectors(store), *([] if shifts is None else [shifts])):
                for basis, head in zip(heads, side.rows, strict=True):
                    turn = (basis.left, basis.right)[number]
                    for rows in head:
                        part = whole.view(lambda t, rows=rows: t[rows])  # type: ignore[misc]
                        new = turn @ part.read(current)
                        for name in part.present():
                            if name not in changed:
                                changed[name] = program.tensors[name].detach().clone(memory_format=CONTIGUOUS)
                        part.write(changed, new)
    return changed


def _describe(count: int, stays: Mapping[str, str], by: str) -> list[str]:
    told = []
    if count:
        what = "the data" if by == "data" else "the weights alone"
        told.append(f"query/key and value widths in a basis that puts the best elements first, by {what}: {count}")
    reasons: dict[str, list[str]] = {}
    for name, why in stays.items():
        reasons.setdefault(why, []).append(name)
    return [*told, *(f"the basis of {', '.join(names)} stays what it is: {why}" for why, names in reasons.items())]
