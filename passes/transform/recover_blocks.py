"""``RecoverBlocks``: move the weights of the tiles that stay so that every layer does what the dense one did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ...data.batch import Calibration, sample_count
from ...data.memory import subsample_to_fit
from ...errors import OptionError, nearest
from ...ir.linear_layers import Matrix, sparse_layers
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.sparsity import Sparsity
from .recovery.agreement import Yardstick
from .recovery.choose import TOLERANCE, agree_between_ranks, split_in_folds
from .recovery.record import Recovery
from .recovery.tile_form import TileForm
from .sparsify_blocks import mask_tiles, masks_of, with_parameters

METHODS = ("auto", "ridge", "obs", "none")
FEW, STRONG = 50, 5.0  # below so many samples the ridge holds on to the weights it has


@dataclass(frozen=True)
class RecoverBlocks(Transform):
    """Update the kept entries of sparse weights on the dense program, so that zeroing the rest afterwards loses less.

    Runs before ``SparsifyBlocks``: entries that will be zeroed keep their values, facts are handed on. Layer by layer,
    in graph order, with inputs from what is already recovered, every row of tiles on its own::

        W'_I,K = W_I,K + [(G_KK + rel mean(diag G) I)^-1 B_K,I]^T     I: its outputs, K: the inputs that its tiles read

    with G, B the weighted, centred second moments of the inputs c and of what is missing, y - W c (see ``Recover``).

    method   ``ridge``  y: what the residual sum behind the layer wants; where it joins none, its dense output
             ``obs``    y: the layer's dense output, rows alike: what block OBS's updates of all tiles amount to
             ``auto``   ridge, obs or none: the best agreement with the dense outputs on held-out samples
    rel      ridge strength; by default 0.3 (obs: 0.01), 5 below 50 samples

    Law      error after <= before at every layer on the fit samples; what is zeroed later has no influence
    Cost     one run of each graph per candidate, k^3 / 3 per row of tiles that reads k inputs; memory 8 in^2 bytes
    Source   methods 8.1, 9.6; joint and sequential OBS updates agree
    """

    takes: ClassVar[tuple[str, ...]] = ("data",)
    needs: ClassVar[tuple[str, ...]] = ("axes", "groups", "plan")
    gives: ClassVar[tuple[str, ...]] = ("axes", "groups", "plan")

    method: str = "auto"
    rel: float | None = None
    held_out: float = 0.2
    seed: int = 0
    data: Calibration | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(
                f"unknown recovery of tiles '{self.method}'", where="--recover", cure=nearest(self.method, METHODS)
            )
        if self.rel is not None and not self.rel >= 0:
            raise OptionError("rel must not be negative", where=f"rel={self.rel}")
        if not 0 < self.held_out < 1:
            raise OptionError("held_out is a share between 0 and 1", where=f"held_out={self.held_out}")

    def run(self, program: Program) -> Program:
        return self.apply(program)[0]

    def apply(self, program: Program) -> tuple[Program, Recovery | None]:
        """(the program with fitted weights, what was fitted and what it was worth; None where nothing is zeroed)."""
        plan = program.need("plan")
        layers = list(sparse_layers(program, plan.blocks))
        if self.method == "none" or not layers:
            return program, None
        if self.data is None or not self.data.batches:
            raise OptionError(
                "recovery needs data",
                where=f"--recover {self.method}",
                why="it fits what stays to what the dense model does on calibration inputs",
                cure="give `--data`, or `--recover none`",
            )
        data, masks = subsample_to_fit(program, self.data), masks_of(program, plan.blocks)
        pruned = program.without_facts(exported=mask_tiles(program, masks))
        record, tensors = Recovery(self.method, self.method, samples=data.samples), dict[str, Tensor]()
        if self.method == "auto":
            record = self._choose_form(program, pruned, layers, data)
        if record.method != "none":
            found = self._form(record.method, data.samples).fit(program, pruned, layers, data.batches)
            tensors = found.tensors
            record = replace(
                found.recovery,
                asked=self.method,
                guard=record.guard,
                rejected=record.rejected,
                held_out=record.held_out,
            )
        record = replace(record, chosen=record.method)
        notes = (*program.notes, f"tiles: {record}")
        if not tensors:
            return program.but(notes=notes), record
        bound, whole = program.tensor_of_placeholder, program.tensors
        new = {}
        for placeholder, tensor in tensors.items():
            name = bound[placeholder]
            new[name] = tensor.where(masks[name], whole[name].to(tensor)) if name in masks else tensor
        exported = with_parameters(program, new)
        fitted = program.but(
            exported=exported,
            scores=None,
            axes=replace(program.need("axes")),
            groups=(*list(program.need("groups")),),
            plan=replace(plan),
            notes=notes,
        )
        return fitted, record

    def _form(self, method: str, samples: int) -> TileForm:
        usual = STRONG if samples < FEW else 0.3 if method == "ridge" else 0.01
        return TileForm(method, usual if self.rel is None else self.rel)

    def _choose_form(
        self, program: Program, pruned: Program, layers: Sequence[tuple[Matrix, Sparsity]], data: Calibration
    ) -> Recovery:
        """Which form to keep: fitted to a part of the samples, judged on the others."""
        folds = split_in_folds(program, data, self.held_out)
        ruler = Yardstick(program, folds[0][1], self.seed) if folds else None
        if ruler is None or not ruler.usable:
            why = {"": "too few samples to judge recovery on held-out ones, so nothing was recovered"}
            return Recovery("none", self.method, samples=data.samples, skipped=why)
        (rest, judged), base = folds[0], agree_between_ranks(ruler.measure(pruned))
        best, value, rejected = "none", base, dict[str, str]()
        guard: dict[str, Mapping[str, float]] = {"none": base.record()}
        for method in ("ridge", "obs"):
            found = self._form(method, sample_count(rest)).fit(program, pruned, layers, rest)
            now = agree_between_ranks(ruler.measure(pruned, found.tensors))
            guard[method] = now.record()
            why_not = now.veto(base, TOLERANCE)
            if why_not:
                rejected[method] = why_not
            elif now.is_better(value, TOLERANCE if value is base else 0.0):
                best, value = method, now
        return Recovery(
            best,
            self.method,
            samples=data.samples,
            held_out=sample_count(judged),
            folds=1,
            guard=guard,
            rejected=rejected,
        )
