"""One run of the tool: limits, wishes, and the passes from a model to a verified artefact."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.export import ExportedProgram

from .. import registry
from ..artifact.files import check_destination
from ..data import memory
from ..data.batch import Calibration
from ..errors import FxpruneError, InternalError, OptionError
from ..intake.load import Loaded
from ..ir.axis import Axis
from ..ir.cost import Budget
from ..ir.flops import check_counts
from ..ir.group import Kind
from ..ir.pipeline import Pass, PassResult, Pipeline
from ..ir.program import FACTS, Program
from ..process.events import Event, OnEvent
from ..process.silence import silence
from ..request.goal import Wish
from ..request.latency import LatencyWish, Timekeeping
from ..request.limits import Limits
from ..request.tiles import BlockWish

if TYPE_CHECKING:
    pass

Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike[str]
Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str] | None


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
        from ..data.sources import held_out, load_data
        from ..intake.capture import capture
        from ..intake.load import load as load_model
        from .judge import JUDGED

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
        from ..passes.transform.recovery.choose import split

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
        from ..passes.analysis.find_groups import FindGroups
        from ..passes.analysis.find_token_sites import FindTokenSites
        from ..passes.analysis.propagate_axes import PropagateAxes
        from ..passes.transform.clean import Clean
        from ..passes.transform.drop_masks import DropMasks
        from ..passes.transform.fold_weights import FoldWeights
        from ..passes.transform.inline import Inline
        from ..passes.transform.unfuse import Unfuse
        from ..passes.transform.unshare import Unshare

        assert self.dense is not None
        ready = [FoldWeights(), Unfuse()] if {str(Kind.QK), str(Kind.V)} & set(map(str, kinds)) else [FoldWeights()]
        program = self.run(self.dense, Clean(), Inline(), DropMasks(), *ready, PropagateAxes(), FindGroups(), Unshare())
        more = [FindTokenSites(unmerge=unmerge)] if tokens else []
        # where a table was unshared, what is known about the graph is out of date
        again = [PropagateAxes()] if program.groups is None else []
        program = self.run(program, *again, self.find_groups, *more)
        check_counts(program, self.pipeline)
        return program

    def reduced(self, program: Program) -> Program:
        """The program with its plan's tokens reduced, its groups found again, and scores and the rest of the plan on
        them. A program whose plan reduces none is returned as it is."""
        from ..passes.analysis.propagate_axes import PropagateAxes
        from ..passes.transform.merge_tokens import MergeTokens, without_tokens

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
        from ..passes.transform.recover import Recover

        reduced = None if program.tokens is None else self.reduced(program)
        return Recover(method="ridge", data=data, seed=seed, reduced=reduced).run(program)


def kept_counts(program: Program) -> dict[Axis, int]:
    """How many elements the plan keeps of each axis it cuts."""
    choices = program.need("plan").choices
    return {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}
