"""Trajectory importance (OPTIN): what removing an element does to the features of later layers and to the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ....data.batch import Batch, Calibration, evenly
from ....data.memory import share
from ....data.metrics import spearman
from ....errors import InternalError, OptionError, nearest
from ....ir.group import DEFAULT_KINDS, Kind, PruneGroup
from ....ir.program import Program
from .criterion import Criterion, prunable
from .distance import Measure
from .exact import Removals
from .features import find_taps
from .mask_gradients import notes_on_samples
from .probes import FeatureProbes, output_probes
from .terms import PowersOfTen, Scores, balance, combine

Added: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Scores]
"""(feature term, output term) -> their weighted sum."""
WEIGHT, MAP_WEIGHT = 1.0, 3.0  # of the output term, beside related rows and beside mean feature maps
POWER_WEIGHT = 0.1  # lambda_c of the paper's language experiments, what the reference code calls 10
SPREAD, SHARE = 4, 8  # batches that samples are drawn from at most, samples of each at least
HEADS = (Kind.HEAD, Kind.KV, Kind.QUERY)
CHOICES = {
    "mode": ("hybrid", "exact", "probe"),
    "location": ("ffn", "norm", "inner"),
    "reduction": ("sum", "mean"),
    "lambda_mode": ("global_median", "fixed", "per_unit_pow10"),
    "taps": ("later", "from", "next", "own", "none"),
}


@dataclass(frozen=True)
class Trajectory(Criterion):
    """``I[i] = sum over taps z > layer of i of MD(F'_z, F_z) + lambda * KD``

    MD is the manifold distillation loss ``|| F' F'^T - F F^T ||_F^2`` of the rows (tokens) of a batch when element i is
    removed, F_z the output of the z-th feed-forward layer before its residual sum, found by analysis (``features``).
    KD is Hinton's ``tau^2 KL`` of the logits, or the squared change of an output that is no logits (``distance``).
    For networks of convolutions alone MD is the squared change of mean feature maps (A.10).

    mode        ``exact``: every element removed in turn, running again only what follows it (``exact``);
                ``probe``: all elements at once by random directions and backward passes (``probes``), a leading term;
                ``hybrid``: attention heads exactly (they are few, and their removal is far from infinitesimal),
                everything else by probes, brought to the scale of exact removal, and measured against it, on ``check``
                elements; after a search, ``refine`` scores the borderline elements exactly
    location    features are a layer's output (``ffn``), that of the norm that reads it (``norm``), or what its second
                linear layer reads (``inner``, the paper's IM-Dense)
    taps        ``later``: i+1..N, the last layer its own (the paper's best); ``from``: i..N; ``next``: i+1; ``own``: i;
                ``none``: the output alone (the paper's "logits only")
    normalised  rows of F have length one (a scale-free cosine map, robust to massive activations), else raw
    rows        rows of a batch that maps are made of, drawn once per layer (the reference code draws 768 anew for every
                element, which ranks elements on different rows); 0 for all
    reduction   ``sum`` over entries, or ``mean``; a scale only, which matters to a fixed lambda
    per_sample  of feature maps: square each sample's change, not that of the mean over samples
    temperature tau
    weight      lambda; by default 1 (see below), for feature maps 3: their change averaged over a batch says little of
                what the output loses (a small trained CNN kept 98 to 99 % of its digits right at half the MACs with 3
                or more, 77 to 84 % with 0.3). By ``lambda_mode`` ``global_median`` relative to the balance of medians,
                ``lambda = weight * median(MD per MAC) / median(KD per MAC)`` over the model, by ``fixed`` itself, by
                ``per_unit_pow10`` (default 0.1) a power of ten of every element's own, as the reference code has it
                (``PowersOfTen``); 0 leaves the features alone
    samples     samples that features and exact removals look at, drawn evenly from four batches that lie evenly in the
                data: a first batch may hold one class, or the longest sentences. Whole batches where the graph was
                captured at a fixed batch size
    probes      backward passes per batch for the features (each with a second, shorter one); a quarter of them for
                kinds that are not pruned by default, whose second passes are as long as the first
    output_probes  random directions per sample for the output, over all data
    rescore     elements nearest the cut of each group that ``refine`` scores exactly; 0 for none
    check       elements that calibrate the probes and measure their rank correlation
    memory      MiB that removals side by side may take

    lambda of rows  chosen on MiniLM with recovery behind it, by how well outputs on 384 held-out calibration sentences
                agreed with the dense ones (rank correlation of similarities, as recovery's guard has it). 1 was better
                than 0.3 by 0.0003 at 0.9 of the MACs, 0.001 at 0.75 and 0.5, 0.005 at 0.3 and 0.006 at 0.2 (there from
                0.934 to 0.950 for the worst draw of sentences: 0.3 had cut 5 heads of its last layer, all others 0 to
                2); 3 was worse than 1 by 0.002 at 0.5 and equal at 0.2

    Shapes   F_z is [rows, width]; padding rows (by an input called ..mask) are left out
    Unit     squared change of the relational map; comparable across groups
    Cost     exact: one suffix per element; probe: about 2 forward passes per probe and batch; hybrid: half a forward
             pass per head and checked element, and the probes
    Errors   OptionError for an unknown choice or a number out of range
    Source   OPTIN, arXiv:2403.17921, eq. 2 and 3. Left out on purpose: the reference code's index prior and head decay
             (they carry no information about an element; ``--head-scale`` weighs heads), its padding rows, and its
             temperature outside the softmax. Its lambda is an option.
             A layer's MD is divided by its squared number of rows (methods 4.2), so that the stages of a hierarchical
             encoder (Swin, SegFormer, Mask2Former's) weigh alike; the paper prunes their neurons only: ``--prune ffn``
    Law      zero for an element that no weight reads; relabelling elements relabels exact scores; the same seed, the
             same scores. A group whose removal also moves a norm's statistics (its ``exact`` is False) is masked in
             its sums alone, as by all criteria that mask
    """

    mode: str = "hybrid"
    location: str = "ffn"
    taps: str = "later"
    normalised: bool = True
    rows: int = 0
    reduction: str = "sum"
    per_sample: bool = False
    temperature: float = 4.0
    weight: float | None = None
    lambda_mode: str = "global_median"
    samples: int = 32
    probes: int = 10
    output_probes: int = 4
    rescore: int = 8
    check: int = 12
    memory: int = 128
    _found: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    name = "trajectory"
    unit = "map change"
    needs_data = True
    comparable = True

    def __post_init__(self) -> None:
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise OptionError(
                    f"trajectory has no {option} '{getattr(self, option)}'",
                    where=f"{option}=",
                    cure=nearest(str(getattr(self, option)), known),
                )
        least = {
            "samples": 1,
            "probes": 1,
            "output_probes": 1,
            "rescore": 0,
            "check": 0,
            "memory": 1,
            "weight": 0,
            "rows": 0,
        }
        for option, low in least.items():
            if getattr(self, option) is not None and not getattr(self, option) >= low:
                raise OptionError(
                    f"trajectory's {option} must be at least {low}",
                    where=f"{option}=",
                    why=f"it is {getattr(self, option)}",
                )
        if not self.temperature > 0:
            raise OptionError(
                "trajectory's temperature must be positive", where="temperature=", why=f"it is {self.temperature}"
            )
        if self.taps == "none" and self.weight == 0:
            raise OptionError(
                "trajectory has nothing to measure",
                where="taps=none,weight=0",
                why="the features are left out, and so is the output",
                cure="leave one of them away",
            )
        if self.mode == "hybrid" and 0 < self.check < 4:
            raise OptionError(
                "trajectory's check must be 0 or at least 4",
                where="check=",
                why="a rank correlation of fewer elements says nothing",
            )

    @property
    def measure(self) -> Measure:
        """What is measured."""
        shared = {f.name for f in fields(Measure)} & {f.name for f in fields(self)}
        return Measure(output=self.weight != 0, **{name: getattr(self, name) for name in shared})

    @property
    def _bytes(self) -> int:
        """What removals side by side may take."""
        return share(self.memory * 2**20, 0.25)

    def scores(self, program: Program, data: Calibration | None, seed: int) -> Scores:
        features, output = self.parts(program, data, seed)
        weight = self.weight_of(program)
        if self.lambda_mode == "per_unit_pow10" and weight:
            added: Added = PowersOfTen(1 / weight)
        else:
            median = self.lambda_mode == "global_median"
            added = partial(combine, factor=balance(program, features, output, weight) if median else weight)
        self._found.update(exported=program.exported, seed=seed, added=added)
        return added(features, output)

    def weight_of(self, program: Program) -> float:
        """lambda's weight: what was given, else by what the features are."""
        if self.weight is not None:
            return self.weight
        if self.lambda_mode == "per_unit_pow10":
            return POWER_WEIGHT
        taps = find_taps(program, self.location)
        return WEIGHT if not taps or taps[0].rows else MAP_WEIGHT

    def parts(self, program: Program, data: Calibration | None, seed: int) -> tuple[Scores, Scores]:
        """(feature term, output term) by group, before they are balanced."""
        batches = strip_labels(data)
        seen = self.select_samples(program, batches)
        exactly, guessed = self.split(program)
        self._found.clear()
        self._found["notes"] = notes = []
        removals = Removals(program, seen, self.measure, self._bytes)
        features, output = (
            {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)} for _ in range(2)
        )
        if guessed:
            names = [g.name for g in guessed]
            first = [g.name for g in guessed if g.kind in DEFAULT_KINDS] or names
            rest = [name for name in names if name not in first]
            for said, part, count in (("probes", first, self.probes), ("probes.rest", rest, -(-self.probes // 4))):
                if part:
                    job = f"trajectory.{said}"
                    features.update(FeatureProbes(program, seen, self.measure, count, seed, part, job).scores())
            if self.weight != 0:
                output.update(output_probes(program, batches, names, self.output_probes, seed, self.temperature))
        if self.mode == "hybrid" and guessed and self.check:
            notes += self._calibrate(removals, guessed, features, output, seed)
        if exactly:
            found = removals("trajectory.exact", {g: torch.arange(g.size) for g in exactly})
            features.update(found[0])
            output.update(found[1])
        notes += removals.notes
        return features, output

    def split(self, program: Program) -> tuple[list[PruneGroup], list[PruneGroup]]:
        """(groups scored exactly, groups scored by probes)."""
        groups = prunable(program)
        exactly = groups if self.mode == "exact" else [g for g in groups if g.kind in HEADS and self.mode == "hybrid"]
        return exactly, [g for g in groups if g not in exactly]

    def select_samples(self, program: Program, batches: Sequence[Batch]) -> list[Batch]:
        """``samples`` samples from all over the data; whole batches, as many as that takes, of a fixed size."""
        if program.fixed_batch:
            return evenly(batches, -(-self.samples // batches[0].size))
        spread = min(SPREAD, max(1, self.samples // SHARE))
        least = -(-self.samples // max(b.size for b in batches))  # where batches are small, of more of them
        chosen = evenly(batches, max(spread, least))
        share = -(-self.samples // len(chosen))
        return [b if b.size <= share else b.pick(torch.tensor(evenly(range(b.size), share))) for b in chosen]

    def _calibrate(
        self, removals: Removals, guessed: Sequence[PruneGroup], features: Scores, output: Scores, seed: int
    ) -> list[str]:
        """Bring both terms of the probes to the scale of exact removal, by the geometric mean of the ratios of checked
        elements: these vary far less than elements do, so that a dozen settle what a neuron is worth against a head."""
        wanted = sample(guessed, self.check, seed)
        exact = removals("trajectory.check", wanted)
        pairs = []
        for part, truth in zip((features, output), exact, strict=True):
            got = torch.cat([part[g.name][i] for g, i in wanted.items()])
            want = torch.cat([truth[g.name] for g in wanted])
            both = (got > 0) & (want > 0)
            ratio = float((want[both] / got[both]).log().mean().exp()) if both.any() else 1.0
            for g in guessed:
                part[g.name] = part[g.name] * ratio
            pairs.append((got * ratio, want))
        parts = [
            f"{spearman(*pair):.2f} ({what})"
            for pair, what, asked in zip(
                pairs, ("features", "output"), (self.taps != "none", self.weight != 0), strict=True
            )
            if asked
        ]
        return [f"trajectory: rank correlation of probe and exact on {len(pairs[0][0])} elements: {', '.join(parts)}"]

    def refine(self, program: Program, data: Calibration | None, seed: int) -> Scores:
        """Score vectors with the ``rescore`` elements nearest each group's cut scored exactly; others as they are.

        Only for groups that the plan cuts, that were scored by probes, and whose counts are worth the sum of scores.
        The balance is that of ``scores``, which is run again where this object has not scored this program.
        """
        guessed = [] if self.mode != "hybrid" else self.split(program)[1]
        scores, plan = program.need("scores"), program.need("plan")
        wanted = {}
        for group in guessed:
            kept = len(plan.kept(group))
            if self.rescore and kept < group.size and scores[group.name].curve is None:
                wanted[group] = borderline(scores[group.name].values, kept, self.rescore)
        if not wanted:
            return {}
        exact = self._choose_terms(program, data, seed)(*self._removals(program, data)("trajectory.refine", wanted))
        return {g.name: scores[g.name].values.double().index_put((i,), exact[g.name]) for g, i in wanted.items()}

    @property
    def measures_sets(self) -> bool:
        return self.mode != "probe"

    def together(
        self, program: Program, data: Calibration | None, seed: int, wanted: Mapping[PruneGroup, Sequence[Tensor]]
    ) -> Scores:
        """By exact removal, on the scale of ``scores``; with probes alone nothing is measured."""
        if not self.measures_sets or not wanted:
            return {}
        removals = self._removals(program, data)
        found = self._choose_terms(program, data, seed)(*removals.together("trajectory.together", wanted))
        self._found["notes"] = [*self._found["notes"], *removals.notes]
        return found

    def _removals(self, program: Program, data: Calibration | None) -> Removals:
        return Removals(program, self.select_samples(program, strip_labels(data)), self.measure, self._bytes)

    def _choose_terms(self, program: Program, data: Calibration | None, seed: int) -> Added:
        """How the terms are added, as for the scores of this program; these are made again where they are another's."""
        if self._found.get("exported") is not program.exported or self._found.get("seed") != seed:
            self.scores(program, data, seed)
        added: Added = self._found["added"]
        return added

    def notes(self, program: Program) -> Sequence[str]:
        exactly, guessed = self.split(program)
        kinds = [", ".join(dict.fromkeys(str(g.kind) for g in part)) or "none" for part in (exactly, guessed)]
        notes = [f"trajectory: mode {self.mode}; by exact removal: {kinds[0]}; by probes: {kinds[1]}"]
        notes += self._found.get("notes", [])
        if guessed:
            notes += notes_on_samples(program)
        found = find_taps(program, self.location)
        if not found:
            notes.append("trajectory importance found no layer to tap: scores are what the output loses")
        elif not found[0].rows:
            notes.append("trajectory importance: no feed-forward layers, features are the maps that convolutions read")
        return notes


def strip_labels(data: Calibration | None) -> list[Batch]:
    """The batches without their labels, which trajectories do not look at."""
    if data is None or not data.batches:
        raise InternalError("trajectory importance needs calibration data")
    return [replace(b, labels=None) for b in data.batches]


def sample(groups: Sequence[PruneGroup], count: int, seed: int) -> dict[PruneGroup, Tensor]:
    """``count`` elements, a seeded choice spread evenly over groups that are pruned by default (else over all)."""
    groups = [g for g in groups if g.kind in DEFAULT_KINDS] or list(groups)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator).tolist()[:count]
    chosen = {}
    for place, at in enumerate(sorted(order)):
        share = count // len(order) + (place < count % len(order))
        chosen[groups[at]] = torch.randperm(groups[at].size, generator=generator)[:share].sort().values
    return chosen


def borderline(values: Tensor, kept: int, count: int) -> Tensor:
    """Indices of the ``count`` elements around the cut: half of them the last that stay, half the first that go."""
    order = torch.argsort(values, descending=True, stable=True)
    low = max(0, min(kept - count // 2, len(order) - count))
    return order[low : low + count].sort().values
