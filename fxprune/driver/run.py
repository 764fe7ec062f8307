"""A run: a model that was opened, and the passes that carry its program on. Values all of them; who adds a step gets a
new run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..artifact.files import check_destination
from ..data import memory
from ..data.batch import Calibration
from ..data.fixed_sizes import fit_sizes, open_dimensions
from ..errors import FxpruneError, InternalError, LoadError
from ..intake.given_inputs import to_device
from ..intake.load import Loaded
from ..ir.axis import Axis
from ..ir.flops import check_counts
from ..ir.group import Kind
from ..ir.pipeline import Pass, PassResult, Pipeline
from ..ir.program import FACTS, Program
from ..process.determinism import exact_products
from ..process.events import Transcript
from ..process.silence import silence
from ..request.request import Request
from ..target.clock import SharedClock
from .devices import place_on
from .hold_back import hold_back, share_to_hold_back
from .parts import appliers, drop_parts, finders_of, subtract_kinds
from .samples import LEAST, Amount, choose_amount

if TYPE_CHECKING:
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.transform.recover import Recover
    from ..passes.transform.rotate_width import RotateWidth

FEW = 2
"""Samples of the data on which the captured graph is held against the module."""
CPU = torch.device("cpu")
Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike[str]
Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str] | None


@dataclass(frozen=True)
class Opened:
    """A model as it came in, captured, with the data that it is judged and repaired by.

    data   what may be scored and fitted on;  held: samples of it that nothing is decided or fitted on
    share  of the data that was held back for that; 0 where the source held others
    given  the caller holds the model: its weights must stay the caller's
    amount of samples that were asked for of the data, and why so many
    home   where the model lies: the result goes there again, and is timed there. ``dense`` may lie elsewhere
    """

    dense: Program
    source: Loaded
    data: Calibration | None = None
    held: Calibration | None = None
    share: float = 0.0
    given: bool = False
    amount: Amount | None = None
    home: torch.device = CPU

    @property
    def name(self) -> str:
        """The model's name."""
        return self.source.name


def open_model(
    request: Request,
    tell: Transcript,
    model: Model,
    inputs: Inputs = None,
    *,
    checkpoint: Any = None,
    trust_pickle: bool = False,
    model_args: Any = None,
    data: Any = None,
) -> Opened:
    """Load model and data, capture the graph."""
    from ..data.held_out import hold_out
    from ..data.sources import load_data
    from ..intake.capture import capture
    from ..intake.load import load as load_model
    from .judge import JUDGED

    if request.out is not None:
        check_destination(Path(request.out))
    given = not isinstance(model, str | os.PathLike)
    tell.stage(f"load {type(model).__name__ if given else model}")
    with silence():
        source: Any = model if given or str(model).startswith("timm:") else Path(str(model))
        loaded = load_model(
            source,
            checkpoint=checkpoint,
            input=inputs,
            trust_pickle=trust_pickle,
            need_inputs=data is None,
            model_args=model_args,
        )
        if data is not None and not loaded.args and not loaded.kwargs:
            first = load_data(data, loaded, samples=LEAST, seed=request.seed).batches[0]
            loaded = loaded.with_inputs(*to_device(loaded.model, first.args, first.kwargs))
    for note in loaded.notes:
        tell.warn(note)
    tell.stage("capture the graph")
    with silence():
        dense = capture(loaded.model, loaded.args, loaded.kwargs, name=loaded.name)
    dense = dense.but(proof=(*loaded.proof, *dense.proof))
    loaded = dataclasses.replace(loaded, free=open_dimensions(dense))
    calibration = held = amount = None
    if data is not None:  # behind the graph, which says of which sizes it may be
        with silence():
            amount = choose_amount(request.samples, dense)
            calibration = load_data(data, loaded, samples=amount.samples, seed=request.seed)
            held = hold_out(data, loaded, samples=amount.samples, seed=request.seed, count=JUDGED)
        dense, calibration, held = _fitting(tell, dense, loaded, calibration, held)
    share = share_to_hold_back(request, dense, calibration, held)
    if share:
        calibration, held = hold_back(dense, calibration, share)
    home, dense = dense.device, place_on(tell, dense, request.device)
    if calibration is not None:
        calibration = memory.split_to_fit(dense, calibration)
    if dense.device.type == "cuda":
        calibration, held = (one and memory.pin_batches(one) for one in (calibration, held))
    return Opened(dense, loaded, calibration, held, share, given, amount, home)


def load_more(tell: Transcript, opened: Opened, data: Any, samples: int, seed: int) -> Calibration:
    """Other data of an opened model, in the sizes that its graph takes, in batches that memory holds."""
    from ..data.sources import load_data

    with silence():
        found, notes = fit_sizes(opened.dense, load_data(data, opened.source, samples=samples, seed=seed))
    for note in notes:
        tell.warn(note)
    return memory.split_to_fit(opened.dense, found)


def _fitting(
    tell: Transcript, dense: Program, loaded: Loaded, data: Calibration, held: Calibration | None
) -> tuple[Program, Calibration, Calibration | None]:
    """(the graph, held against the module on some of the data too, the data and what is held back of it in the sizes
    that the graph takes)."""
    from ..intake.faithful import compare_on_data

    data, notes = fit_sizes(dense, data)
    if held is not None:
        try:
            held, _ = fit_sizes(dense, held)
        except LoadError:  # it does not fill a batch
            held = None
    first = data.batches[0]
    few = first if dense.fixed_batch else first.pick(torch.arange(min(first.size, FEW)))
    with silence():
        inputs = to_device(loaded.model, few.args, few.kwargs)
        link, said = compare_on_data(loaded.model, dense, *inputs)
    for note in [*notes, *said]:
        tell.warn(note)
    return dense.but(proof=(*dense.proof, *link)), data, held


@dataclass(frozen=True)
class Step:
    """A pass that ran, and what the pipeline measured of it; ``result.record`` is what the pass itself returned."""

    ran: Pass
    result: PassResult


@dataclass(frozen=True)
class Run:
    """A program on its way: what it is now, and the steps that brought it there.

    program      as it is now; the opened model's at first
    clock        that times what was asked for; the dense program is lowered to it once
    data         what passes score and fit on; in smaller batches once memory ran out
    find_groups  the pass that knows the limits: the request's, or the one that a pipeline states
    steps        so far, in order: the pipeline text of the report
    others       passes behind ``find_groups`` that find more to choose: of kinds that bring their own
    """

    request: Request
    opened: Opened
    tell: Transcript
    program: Program
    data: Calibration | None
    find_groups: FindGroups
    clock: SharedClock
    steps: tuple[Step, ...] = ()
    others: tuple[Pass, ...] = ()

    @classmethod
    def of(cls, request: Request, opened: Opened, tell: Transcript, clock: SharedClock | None = None) -> Run:
        """The run that begins with the opened model."""
        asked = request.latency
        clock = clock or SharedClock(asked.batch, asked.threads)
        return cls(request, opened, tell, opened.dense, opened.data, request.find_groups, clock)

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.request.seed

    @property
    def finders(self) -> tuple[Pass, ...]:
        """The passes that find what may be chosen, once axes are known."""
        return (self.find_groups, *self.others)

    @property
    def pipeline(self) -> str:
        """The passes so far, as text that replays them."""
        return ",".join(str(step.ran) for step in self.steps)

    @property
    def results(self) -> list[PassResult]:
        """What every pass did."""
        return [step.result for step in self.steps]

    @property
    def record(self) -> Any:
        """What the last pass returned beside the program; None where it returned nothing."""
        return self.steps[-1].result.record if self.steps else None

    def but(self, **changes: Any) -> Run:
        """The same run with some facts of its program replaced (see :meth:`Program.but`)."""
        return dataclasses.replace(self, program=self.program.but(**changes))

    def on(self, program: Program) -> Run:
        """The same run with another program: nothing that a pass did, so no step."""
        return dataclasses.replace(self, program=program)

    def through(self, *passes: Pass) -> Run:
        """The run behind these passes, each with what it takes of the run: the one way that a pass is carried out,
        whether options or a pipeline's text say so.

        Where memory runs out, it is tried again on batches of half the size, which the run then holds. An error that
        is nobody's fault but fxprune's comes with the pipeline that reproduces it.
        """
        run = self
        for one in passes:
            run = run._behind(run._supply(one))
        return run

    def _supply(self, one: Pass) -> Pass:
        """The pass with what it takes of the run."""
        from ..passes.search.choose_layers import find_stated

        given: dict[str, Any] = {"data": self.data} if "data" in one.takes else {}
        if "source" in one.takes:
            given["source"] = self.opened.source
        plan = self.program.plan
        if "reduced" in one.takes and plan is not None:
            searches = one.kind == "search"  # it decides about parts anew, but for layers that are stated
            parts = bool(find_stated(plan)) if searches else bool(appliers(plan))
            if parts or plan.tokens is not None:
                reduced = reduce_tokens(self.program, self.finders)
                if parts and searches:
                    reduced = reduced.but(plan=reduced.need("plan").with_elements(find_stated(plan)))
                given["reduced"] = drop_parts(reduced, self.finders if searches else ()) if parts else reduced
        return dataclasses.replace(one, **given) if given else one

    def _behind(self, one: Pass) -> Run:
        have = tuple(f for f in FACTS if getattr(self.program, f) is not None)
        pipeline = Pipeline((one,), start=have)
        text = ",".join(filter(None, [self.pipeline, str(one)]))
        self.tell.stage(one.slug().replace("-", " "))
        less, data = one, self.data
        try:
            with silence(), exact_products():
                program, (result,) = pipeline.apply(self.program)
        except InternalError as error:
            raise InternalError(error.what, pipeline=text) from error
        except Exception as error:
            if memory.ran_out(error):
                (less,), data = memory.with_smaller_batches((one,), self.data, error, self.tell.warn)
            elif isinstance(error, FxpruneError):
                raise
            else:
                raise InternalError(f"{type(error).__name__}: {error}", pipeline=text) from error
        if less is not one:  # out here the error is gone, and with its frames what the failed try held of the memory
            memory.give_back()
            return dataclasses.replace(self, data=data)._behind(less)
        return dataclasses.replace(self, program=program, steps=(*self.steps, Step(one, result)))


def find_groups(
    run: Run,
    kinds: Iterable[Kind | str] = (),
    tokens: bool = False,
    unmerge: bool = False,
    basis: str = "",
    rotate: RotateWidth | None = None,
) -> Run:
    """The run behind clean-up and analysis: its program has axes and groups. Query/key or value width among ``kinds``
    unfuses qkv first, where the target takes any graph. What the target cannot express is frozen.

    tokens   also where tokens may become fewer;  unmerge: and where they must be restored
    basis    by what such widths are put in order, ``data`` or ``weights`` (see ``AlignHeads``); "": they stay. Without
             data it is by weights
    rotate   puts residual streams into their principal basis first
    """
    from ..passes.analysis.find_groups import FindGroups
    from ..passes.analysis.find_token_sites import FindTokenSites
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.align_heads import AlignHeads
    from ..passes.transform.clean import Clean
    from ..passes.transform.drop_masks import DropMasks
    from ..passes.transform.fold_weights import FoldWeights
    from ..passes.transform.inline import Inline
    from ..passes.transform.unfuse import Unfuse
    from ..passes.transform.unshare import Unshare

    backend = run.request.backend
    widths = backend.any_graph and bool({str(Kind.QK), str(Kind.V)} & set(map(str, kinds)))
    ready = [FoldWeights(), Unfuse()] if widths else [FoldWeights()]
    own = [FindGroups(), Unshare()] if backend.any_graph else []
    run = run.through(Clean(), Inline(), DropMasks(), *ready, PropagateAxes(), *own)
    if rotate is not None and backend.any_graph:
        known = run.program.groups is not None
        run = run.through(*([] if known else [PropagateAxes()]), run.find_groups, rotate)
    again = [PropagateAxes()] if run.program.groups is None else []  # a table was unshared: facts are out of date
    run = dataclasses.replace(run, others=finders_of(map(str, kinds)))
    run = run.through(*again, *run.finders)
    if widths and basis:
        run = run.through(AlignHeads("weights" if run.data is None else basis))
    sites = [FindTokenSites(unmerge=unmerge)] if tokens else []
    run = run.through(*backend.limits([*map(str, kinds)]), *sites)
    check_counts(run.program, run.pipeline)
    return run


def reduce_tokens(program: Program, finders: Sequence[Pass]) -> Program:
    """The program with its plan's tokens reduced, its groups found again, and scores and the rest of the plan on them.
    A program whose plan reduces none is returned as it is. No step of a run: a trial of a plan leads to no result.

    finders   see :attr:`Run.finders`
    """
    from ..passes.analysis.propagate_axes import PropagateAxes
    from ..passes.transform.merge_tokens import MergeTokens, without_tokens

    plan = program.need("plan")
    if plan.tokens is None or plan.tokens.empty:
        return program
    small = Pipeline((MergeTokens(), PropagateAxes(), *finders), start=FACTS).run(program)
    return small.in_bases_of(program).but(plan=without_tokens(plan), scores=program.scores)


def carry_out_parts(run: Run) -> Run:
    """The run behind the passes of kinds that bring their own: what the plan cuts of them is gone, and what is left to
    cut is found again."""
    from ..passes.analysis.propagate_axes import PropagateAxes

    plan = run.program.need("plan")
    for kinds, one in appliers(plan).items():
        plan = subtract_kinds(plan, kinds, run.program)
        found = run.through(one, PropagateAxes(), *run.finders)
        run = found.on(found.program.in_bases_of(run.program).but(plan=plan))
    return run


def recover(run: Run, how: Recover) -> Run:
    """The run with the dense program's weights recovered for what its plan keeps, where ``how`` asks for any."""
    if how.method == "none":
        return run
    return run.through(dataclasses.replace(how, seed=run.seed))


def fit_by_ridge(program: Program, finders: Sequence[Pass], data: Calibration, seed: int) -> Program:
    """The dense program with weights fitted by ridge to ``data``, to compare plans as recovery would leave them."""
    from ..passes.transform.recover import Recover

    reduced = drop_parts(reduce_tokens(program, finders))
    return Recover(method="ridge", data=data, seed=seed, reduced=reduced).run(program)


def count_kept(program: Program) -> dict[Axis, int]:
    """How many elements the plan keeps of each axis it cuts."""
    found: dict[Axis, int] = program.need("plan").sizes(program.need("groups"))
    return found
