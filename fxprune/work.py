"""One run of the tool: limits, wishes, and the passes from a model to a verified artefact."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.export import ExportedProgram

from . import memory, ranks, registry
from .artifact import Artifact, check_destination
from .axis import Axis
from .block_wish import BlockWish
from .cost import Budget, CostModel
from .data import Calibration
from .errors import FxpruneError, InternalError, OptionError, VerifyError, nearest
from .events import Event, OnEvent
from .group import DEFAULT_KINDS, Kind
from .latency_decide import FILE, LatencyWish, Timekeeping, told
from .latency_table import LatencyTable
from .limits import Limits
from .load import Loaded
from .options import plain
from .pipeline import Pass, PassResult, Pipeline
from .program import FACTS, Program
from .rebuild import owning
from .token_wish import TokenWish, token_wish

if TYPE_CHECKING:
    from .latency_delivered import Stopwatch
    from .passes.analysis.importance.criterion import Criterion
    from .passes.transform.recover import Recover

MOST_ROUNDS = 20
MEMBERS = ("auto", "scores", "obs")
Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike[str]
Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str] | None


@dataclass(frozen=True)
class Wish:
    """What a search is to reach, and by which criterion. Unknown names are OptionErrors as soon as it is made.

    No budget: the token counts are explicit, and nothing else is cut.
    """

    budget: Budget | None
    criterion: str
    kinds: tuple[Kind | str, ...]
    samples: int
    recover: str = "none"
    rounds: int = 1
    head_scale: float | str = 1.0
    members: str = "auto"
    rearrange: int = 0
    tokens: TokenWish | None = None
    search: str = "auto"
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        from .passes.search.search_plan import SearchPlan, kinds_named

        kinds_named(self.kinds)
        if self.tokens is not None and self.rounds > 1:
            raise OptionError(
                "rounds and tokens do not go together",
                where=f"--rounds {self.rounds}",
                why="tokens are decided once, on the dense model",
                cure="leave one of them away",
            )
        if self.budget is not None and self.budget.metric == "latency" and self.rounds > 1:
            raise OptionError(
                "rounds and latency do not go together",
                where=f"--rounds {self.rounds}",
                why="what is measured is the dense model, not what a round leaves",
                cure="leave one away",
            )
        self.recovery  # noqa: B018  reads its name and options
        if self.samples < 1:
            raise OptionError("at least one sample is needed", where=f"--samples {self.samples}")
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise OptionError(f"rounds are between 1 and {MOST_ROUNDS}", where=f"--rounds {self.rounds}")
        if self.members not in MEMBERS:
            raise OptionError(
                f"unknown way to choose members '{self.members}'",
                where="--members",
                cure=nearest(self.members, MEMBERS),
            )
        if self.rearrange < 0:
            raise OptionError("rounds of rearrangement cannot be negative", where=f"--rearrange {self.rearrange}")
        self.made  # noqa: B018  reads the criterion's name and options
        SearchPlan(
            self.budget or Budget("flops", 1.0),
            method=self.search,
            head_scale=1.0 if self.head_scale == "auto" else self.scale,
        )
        if self.members == "obs" and not self.made.comparable:
            raise OptionError(
                f"the scores of '{self.made.name}' cannot say how many stay per group",
                where="--members obs",
                why="they only rank elements within a group",
                cure="use trajectory or fisher, or leave --members away",
            )

    @cached_property
    def made(self) -> Criterion:
        """The criterion itself."""
        from .passes.analysis.score_groups import criterion

        return criterion(self.criterion)

    @cached_property
    def recovery(self) -> Recover:
        """The recovery itself, without data: from ``name`` or ``name{option=value}``."""
        from .options import build, parse
        from .passes.transform.recover import Recover

        name, options = parse(self.recover, "--recover")
        made: Recover = build(Recover, {"method": name, **options}, f"recovery '{name}'", "--recover")
        return made

    @property
    def needs_data(self) -> bool:
        """Whether the criterion or the recovery runs the model."""
        by_groups = self.by_groups and (self.made.needs_data or self.by_obs or self.head_scale == "auto")
        return by_groups or self.recovery.method != "none" or (self.tokens is not None and self.tokens.needs_data)

    @property
    def group_kinds(self) -> tuple[Kind | str, ...]:
        """The kinds of groups that may be cut: all but tokens."""
        return tuple(k for k in self.kinds if str(k) != str(Kind.TOKEN))

    @property
    def by_groups(self) -> bool:
        """Whether groups take part at all."""
        return self.budget is not None and bool(self.group_kinds)

    def at(self, budget: Budget) -> Wish:
        """The same wish under another budget, with the same criterion and ranking: they remember what they found."""
        made = dataclasses.replace(self, budget=budget)
        made.__dict__.update(made=self.made, ranks=self.ranks)
        return made

    @cached_property
    def ranks(self) -> dict[str, Any]:
        """What the ranking by OBS remembers."""
        return {}

    @property
    def scale(self) -> float:
        """The head scale as a number. Raises OptionError when it is none."""
        try:
            return float(self.head_scale)
        except ValueError:
            raise OptionError(
                f"'{self.head_scale}' is no head scale", where="--head-scale", cure="write a number, or auto"
            ) from None

    @property
    def by_obs(self) -> bool:
        """Whether OBS says which neurons stay: it presumes that the others are fitted afterwards."""
        mixed = self.made.comparable and self.made.name != "obs" and not self.rearrange
        fitted = self.recovery.method not in ("none", "scale")
        return self.members == "obs" or (self.members == "auto" and mixed and fitted)


@dataclass
class Work:
    """One run: where it goes, who listens, and what has happened so far."""

    target: str
    out: str | os.PathLike[str] | None
    seed: int
    on_event: OnEvent
    limits: Limits
    name: str = ""
    budget: Budget | None = None
    dense: Program | None = None
    source: Loaded | None = None
    calibration: Calibration | None = None
    given: bool = False  # the caller holds the model: its weights must stay the caller's
    passes: list[Pass] = field(default_factory=list)
    results: list[PassResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recovery: dict[str, Any] | None = None
    blocks: BlockWish | None = None
    tiles: tuple[Pass, ...] = ()  # in place of ``blocks`` where the passes themselves are stated
    block_recovery: dict[str, Any] | None = None
    held: Calibration | None = None  # samples of the data that nothing was decided or fitted on
    held_back: float = 0.0  # the share of the data that these are, where it was asked for
    decided: Program | None = None  # dense weights, the plan and the scores: before recovery
    options: Mapping[str, Any] = field(default_factory=dict)  # what the caller asked for, by name
    timing: Timekeeping = field(default_factory=lambda: Timekeeping(LatencyWish()))

    def __post_init__(self) -> None:
        # what is wrong with the request must not cost a minute of scoring first
        table = self.blocks.tiling.table if self.blocks is not None else ""
        self.backend = registry.target(self.target, **({"table": table} if table else {}))
        self.find_groups = self.limits.find_groups(self.backend.granularity)
        if not 0 <= self.held_back < 1:
            raise OptionError("the share that is held out lies between 0 and 1", where=f"--held-out {self.held_back:g}")
        if self.out is not None:
            check_destination(Path(self.out))

    @property
    def pipeline(self) -> str:
        """The passes so far, as text that replays them."""
        return ",".join(map(str, self.passes))

    def stage(self, text: str) -> None:
        self.on_event(Event("stage", text))

    def warn(self, text: str) -> None:
        self.notes.append(text)
        self.on_event(Event("warning", text))

    def open(self, model: Model, inputs: Inputs, checkpoint: Any, trust_pickle: bool, data: Any, samples: int) -> None:
        """Load model and data, capture the graph."""
        from .capture import capture
        from .data import held_out, load_data
        from .load import load as load_model
        from .outcome import JUDGED

        self.given = not isinstance(model, str | os.PathLike)
        self.stage(f"load {type(model).__name__ if self.given else model}")
        with silence():
            source: Any = model if self.given or str(model).startswith("timm:") else Path(str(model))
            loaded = load_model(
                source, checkpoint=checkpoint, input=inputs, trust_pickle=trust_pickle, need_inputs=data is None
            )
            if data is not None:
                self.calibration = load_data(data, loaded, samples=samples, seed=self.seed)
                self.held = held_out(data, loaded, samples=samples, seed=self.seed, count=JUDGED)
                if not loaded.args and not loaded.kwargs:
                    first = self.calibration.batches[0]
                    loaded = dataclasses.replace(loaded, args=first.args, kwargs=first.kwargs)
        for note in loaded.notes:
            self.warn(note)
        self.source, self.name = loaded, loaded.name
        self.stage("capture the graph")
        with silence():
            self.dense = capture(loaded.model, loaded.args, loaded.kwargs, name=loaded.name)
        if self.held_back:
            self._hold_back(self.dense)
        if self.calibration is not None:
            self.calibration = memory.in_flight(self.dense, self.calibration)

    def _hold_back(self, dense: Program) -> None:
        """Keep a share of the calibration data from everything that decides or fits; the result is judged on it."""
        from .passes.transform.recovery.choose import split

        data = self.calibration
        rest, held = ([], []) if data is None else split(dense, data, self.held_back)
        if data is None or not held or not rest:
            raise OptionError(
                "there is too little data to hold some back",
                where=f"--held-out {self.held_back:g}",
                why="there is none" if data is None else f"{data.samples} samples in batches that cannot be divided",
                cure="give more; a sweep may --judge on other data",
            )
        self.calibration, self.held = (dataclasses.replace(data, batches=tuple(part)) for part in (rest, held))

    def run(self, program: Program, *passes: Pass) -> Program:
        """Run passes and remember what they did."""
        have = tuple(f for f in FACTS if getattr(program, f) is not None)
        pipeline = Pipeline(passes, start=have, on_pass=lambda p, _: self.stage(f"{p.slug().replace('-', ' ')}"))
        self.passes += passes
        try:
            with silence():
                return pipeline.run(program)
        except InternalError as error:
            raise InternalError(error.what, pipeline=self.pipeline) from error
        except Exception as error:
            if memory.ran_out(error):
                del self.passes[-len(passes) :]
                less, self.calibration = memory.with_smaller_batches(passes, self.calibration, error, self.warn)
                return self.run(program, *less)
            if isinstance(error, FxpruneError):
                raise
            raise InternalError(f"{type(error).__name__}: {error}", pipeline=self.pipeline) from error
        finally:
            self.results += pipeline.results

    def groups(self, kinds: Iterable[Kind | str] = (), tokens: bool = False, unmerge: bool = False) -> Program:
        """The cleaned program with its axes and groups. Query/key or value width among ``kinds`` unfuses qkv first.

        tokens   also where tokens may become fewer;  unmerge: and where they must be restored
        """
        from .passes.analysis.find_groups import FindGroups
        from .passes.analysis.find_token_sites import FindTokenSites
        from .passes.analysis.propagate_axes import PropagateAxes
        from .passes.transform.clean import Clean
        from .passes.transform.drop_masks import DropMasks
        from .passes.transform.fold_weights import FoldWeights
        from .passes.transform.inline import Inline
        from .passes.transform.unfuse import Unfuse
        from .passes.transform.unshare import Unshare

        assert self.dense is not None
        ready = [FoldWeights(), Unfuse()] if {str(Kind.QK), str(Kind.V)} & set(map(str, kinds)) else [FoldWeights()]
        program = self.run(self.dense, Clean(), Inline(), DropMasks(), *ready, PropagateAxes(), FindGroups(), Unshare())
        more = [FindTokenSites(unmerge=unmerge)] if tokens else []
        if program.groups is None:  # a table was unshared: what is known about the graph is out of date
            return self.run(program, PropagateAxes(), self.find_groups, *more)
        return self.run(program, self.find_groups, *more)

    def reduced(self, program: Program) -> Program:
        """The program with its plan's tokens reduced, its groups found again, and scores and the rest of the plan on
        them. A program whose plan reduces none is returned as it is."""
        from .passes.analysis.propagate_axes import PropagateAxes
        from .passes.transform.merge_tokens import MergeTokens, without_tokens

        plan = program.need("plan")
        if plan.tokens is None or plan.tokens.empty:
            return program
        # not part of the pipeline text: a trial of a plan is no step towards the result
        small = Pipeline((MergeTokens(), PropagateAxes(), self.find_groups), start=FACTS).run(program)
        return small.but(plan=without_tokens(plan), scores=program.scores)

    def recover(self, program: Program, wish: Wish) -> Program:
        """The dense program with recovered weights for what the plan keeps; the record goes into the report."""
        self.decided = program
        if wish.recovery.method == "none":
            return program
        reduced = None if program.tokens is None else self.reduced(program)
        one = dataclasses.replace(wish.recovery, data=self.calibration, seed=self.seed, results=[], reduced=reduced)
        program = self.run(program, one)
        self.recovery = one.results[0].record() if one.results else None
        return program

    def fitted(self, program: Program, data: Calibration, seed: int) -> Program:
        """The dense program with weights fitted by ridge to ``data``, to compare plans as recovery would leave them."""
        from .passes.transform.recover import Recover

        reduced = None if program.tokens is None else self.reduced(program)
        return Recover(method="ridge", data=data, seed=seed, reduced=reduced).run(program)

    def finish(self, program: Program, after: Sequence[Pass] = ()) -> Artifact:
        """Slice, prove that slicing equals masking, report, and lower and save where ``out`` says.

        after   passes that were asked for behind slicing
        """
        from .passes.analysis.propagate_axes import PropagateAxes
        from .passes.transform.fold_indices import FoldIndices
        from .passes.transform.merge_tokens import MergeTokens, without_tokens
        from .passes.transform.slice_axes import SliceAxes
        from .passes.transform.spell_out_tokens import SpellOutTokens
        from .report_facts import described
        from .sparsify import sparsified

        whole, plan, model = program, program.need("plan"), CostModel(program)
        if plan.tokens is not None and not plan.tokens.empty:
            program = self.run(program, MergeTokens(), PropagateAxes(), self.find_groups).but(plan=without_tokens(plan))
            program.need("plan").check(program.group_by_name)
        predicted = CostModel(program)(kept_counts(program))
        sliced = self.run(program, SliceAxes())
        self.stage("compare slicing with masking")
        masked = self._compare(program, sliced)
        small = self.run(sliced.without_facts(), FoldIndices(), SpellOutTokens())
        counted = CostModel(self.run(small, PropagateAxes()))()
        if (counted.flops, counted.params) != (predicted.flops, predicted.params):
            raise InternalError(f"the plan was to cost {predicted}, the result costs {counted}", pipeline=self.pipeline)
        for one in after:
            small = self.run(small, one)
            counted = CostModel(self.run(small, PropagateAxes()))()
        sparsity = None
        if self.blocks is not None or self.tiles or plan.blocks:
            small, plan, sparsity = sparsified(self, small, plan, model(), counted)
        if self.given:
            small = owning(small, whole)
        report, extras = described(self, whole, program, sliced, small, plan, counted, masked, sparsity)
        timed = told(self, whole)
        if timed is not None and self.timing.table is not None:
            report["latency"], extras[FILE] = timed, self.timing.table.to_json().encode()
        report["options"] = plain(self.options)
        artifact = Artifact(small, plan, report, self.backend.with_data(self.calibration), extras=extras)
        if self.out is not None and ranks.rank() == 0:
            self.stage(f"lower to {self.target}, verify and save")
            with silence():
                artifact.save(Path(self.out), measure=self.stopwatch(whole))
            for missing in (artifact.report["unfinished"] or {}).get("missing", ()):
                self.warn(f"not finished: {missing}")
        return artifact

    def stopwatch(self, whole: Program) -> Stopwatch:
        """What times the result beside the dense program, once it is written."""
        from .latency_delivered import Stopwatch
        from .latency_measure import lowerable

        by = str(self.options.get("command", "compile"))
        return Stopwatch(self.timing.wish, by, lowerable(self.decided or whole), self.timing.clock, self.on_event)

    def _compare(self, program: Program, sliced: Program) -> dict[str, float]:
        """Largest relative difference between the sliced graph and the dense one with the same elements masked.

        Raises InternalError beyond the tolerance of the coarsest dtype: slicing is then wrong, and nothing is written.
        VerifyError where the model draws random numbers, so that nothing can be said.
        """
        from .parity import tolerance_of, why_random
        from .testing import masking_error

        with silence():
            limit = tolerance_of(program)
            error = masking_error(program, sliced, self.seed, limit)
        if not error <= limit:
            why, cure = why_random(program)
            if why:
                raise VerifyError("slicing cannot be compared with masking", where=self.name, why=why, cure=cure)
            raise InternalError(
                f"slicing differs from masking by {error:.1e} (relative, tolerance {limit:.0e})", pipeline=self.pipeline
            )
        return {"max_rel": error, "tolerance": limit}


def default_criterion(data: Any) -> str:
    """The best that the inputs allow."""
    return "l2" if data is None else "trajectory"


def kinds_of(prune: str | Sequence[str | Kind] | None) -> tuple[Kind | str, ...]:
    """Kinds to prune from what the user wrote: plural or singular, and ``heads`` takes KV groups along.

    >>> [str(k) for k in kinds_of("heads,ffn")]
    ['head', 'kv', 'ffn']
    """
    if prune is None:
        return DEFAULT_KINDS
    words = prune.split(",") if isinstance(prune, str) else [str(p) for p in prune]
    known, kinds = {str(k) for k in Kind}, []
    for word in (w.strip().lower() for w in words):
        kind = word if word in known else word.removesuffix("s")
        kinds += ["head", "kv"] if word == "heads" else [kind if kind in known else word]
    return tuple(dict.fromkeys(kinds))


def kinds_and_tokens(
    prune: str | Sequence[str | Kind] | None, tokens: str | None, unmerge: bool
) -> tuple[tuple[Kind | str, ...], TokenWish | None]:
    """What ``--prune``, ``--tokens`` and ``--unmerge`` say together."""
    kinds = kinds_of(prune)
    return kinds, token_wish(tokens, kinds, unmerge)


def kept_counts(program: Program) -> dict[Axis, int]:
    """How many elements the plan keeps of each axis it cuts."""
    choices = program.need("plan").choices
    return {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}


@contextmanager
def silence() -> Iterator[None]:
    """torch and the models warn while they are traced; what matters to the user is told through events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
