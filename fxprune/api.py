"""The whole tool as five functions: ``compile``, ``plan``, ``apply``, ``inspect`` and ``load``.

    MODEL -> load -> capture -> clean -> axes -> groups -> scores -> plan -> slice -> lower -> verify -> artefact
             `------------- inspect -----------'                   |
             `----------------------- plan ------------------------'`------------ apply -------------'
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from . import jobs, journal, ranks, registry
from .artifact import Artifact, build_report, check_destination, load
from .axis import Axis
from .cost import METRICS, Budget, CostModel
from .data import Calibration
from .errors import FxpruneError, InternalError, OptionError, VerifyError
from .events import Event, OnEvent, resumable, warn_only
from .group import DEFAULT_KINDS, Kind
from .load import Loaded  # here and not in a function: importing fxprune.load later would shadow the function `load`
from .measure import versions
from .pipeline import Pass, PassResult, Pipeline
from .plan import CompressionPlan
from .program import FACTS, Program
from .publish import write_error
from .rebuild import owning

__all__ = ["apply", "compile", "inspect", "load", "plan"]

Model = nn.Module | ExportedProgram | str | os.PathLike[str]
Amount = float | int | str | None
Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str] | None
PlanLike = CompressionPlan | str | os.PathLike[str]


def compile(
    model: Model, example_inputs: Inputs = None, *,
    flops: Amount = None, params: Amount = None, bytes: Amount = None, plan: PlanLike | None = None,
    target: str = "eager", data: Any = None, importance: str | None = None, out: str | os.PathLike[str] | None = None,
    prune: str | Sequence[str | Kind] | None = None, freeze: Sequence[str] = (), align: int | None = None,
    floor: float = 0.1, allow_empty: bool = False, samples: int = 128, seed: int = 0, recover: str = "none",
    checkpoint: str | os.PathLike[str] | None = None, trust_pickle: bool = False, on_event: OnEvent = warn_only,
) -> Artifact:
    """Make ``model`` smaller until it meets a budget, lower it to ``target`` and prove that the file computes it.

    model           an nn.Module (left as it was), an ExportedProgram, or what the command line takes: ``model.pt``,
                    ``model.pt2``, a Hugging Face folder, ``timm:NAME``
    example_inputs  a tensor, a tuple of positional inputs, a dict of keyword inputs (batch first), a shape such as
                    "1x3x224x224" or a file of tensors; asked of the model where it knows
    flops, params, bytes  exactly one of them, or ``plan``: a ratio of the dense cost (0.5) or an amount ("2.3G").
                    FLOPs are multiply-accumulates; bytes are those of parameters and buffers
    plan            a plan, or the path of one: apply it and search nothing
    target          ``eager`` (a .pt2) or ``onnx``
    data            calibration data: a path, a DataLoader, an iterable of batches; labels optional. Without any, the
                    criteria that need activations run on generated inputs, and warn
    importance      criterion; ``fisher`` when there is data, else ``l2``
    out             directory for the artefact, replaced as a whole; nothing is written without it
    prune           kinds of groups: "heads,ffn" or a sequence; heads, KV groups, FFN neurons and channels by default
    freeze          glob patterns of parameters or groups to leave alone
    align, floor, allow_empty   counts in multiples of ``align`` (the target's choice), at least a ``floor`` share per
                    layer, unless ``allow_empty``
    samples, seed   calibration samples, and the seed of everything random: same inputs, same plan
    recover         fit what stays to what the dense model does on the data: ``auto``, ``ridge``, ``refit``, ``bias``,
                    ``scale`` or ``none`` (see :class:`fxprune.passes.transform.recover.Recover`)
    on_event        called with every stage and warning; by default warnings become Python warnings

    Raises FxpruneError (what, where, why, cure); no file is left behind then.
    """
    if plan is not None:
        if (flops, params, bytes) != (None, None, None):
            raise OptionError("give a plan or a budget, not both", why="a plan decides already", cure="leave one away")
        if recover != "none":
            raise OptionError("a plan is applied without recovery", where=f"--recover {recover}",
                              why="applying a plan uses no data", cure="give a budget and data instead")
        return apply(model, plan, example_inputs, target=target, out=out, seed=seed, checkpoint=checkpoint,
                     trust_pickle=trust_pickle, on_event=on_event)
    work = _Work(target, out, seed, on_event, Limits(align, floor, allow_empty, freeze))
    budget, criterion = one_budget(flops, params, bytes), importance or default_criterion(data)
    wish = Wish(budget, criterion, kinds_of(prune), samples, recover)
    if recover != "none" and data is None:
        raise OptionError("recovery needs data", where=f"--recover {recover}",
                          why="it fits what stays to what the dense model does on it", cure="give --data")
    with resumable(out, on_event):
        work.open(model, example_inputs, checkpoint, trust_pickle, data, samples)
        return work.finish(work.recover(work.decide(wish), recover))


def plan(
    model: Model, example_inputs: Inputs = None, *,
    flops: Amount = None, params: Amount = None, bytes: Amount = None, target: str = "eager",
    data: Any = None, importance: str | None = None, out: str | os.PathLike[str] | None = None,
    prune: str | Sequence[str | Kind] | None = None, freeze: Sequence[str] = (), align: int | None = None,
    floor: float = 0.1, allow_empty: bool = False, samples: int = 128, seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None, trust_pickle: bool = False, on_event: OnEvent = warn_only,
) -> Program:
    """Decide what to remove and stop there: the dense program with its ``axes``, ``groups``, ``scores`` and ``plan``.

    Options as in :func:`compile`. With ``out`` the plan is also written there as JSON, to be read, edited and applied.
    """
    work = _Work(target, None, seed, on_event, Limits(align, floor, allow_empty, freeze))
    wish = Wish(one_budget(flops, params, bytes), importance or default_criterion(data), kinds_of(prune), samples)
    with resumable(out, on_event):
        work.open(model, example_inputs, checkpoint, trust_pickle, data, samples)
        program = work.decide(wish)
    if out is not None and ranks.rank() == 0:
        write_plan(program.need("plan"), Path(out))
    return program


def apply(
    model: Model, plan: PlanLike, example_inputs: Inputs = None, *,
    target: str = "eager", out: str | os.PathLike[str] | None = None, seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None, trust_pickle: bool = False, on_event: OnEvent = warn_only,
) -> Artifact:
    """Slice ``model`` as ``plan`` says: no data, no search, deterministic. An empty plan only lowers and verifies.

    plan    what :func:`plan` or an artefact holds, or the path of a plan.json; it fits every checkpoint of the same
            architecture. Raises PlanError naming the group where it does not

    Other options as in :func:`compile`.
    """
    chosen = _read_plan(plan)
    # The plan was made under limits of its own: here only what would break the model stands in its way.
    work = _Work(target, out, seed, on_event, Limits(align=1, floor=0.0, allow_empty=True))
    work.open(model, example_inputs, checkpoint, trust_pickle, None, 0)
    program = work.groups(c.kind for c in chosen.choices.values())
    chosen.check(program.group_by_name)
    return work.finish(program.but(plan=chosen))


def inspect(
    model: Model, example_inputs: Inputs = None, *,
    freeze: Sequence[str] = (), align: int | None = None, floor: float = 0.1, allow_empty: bool = False,
    checkpoint: str | os.PathLike[str] | None = None, trust_pickle: bool = False, on_event: OnEvent = warn_only,
) -> Program:
    """Find what can be pruned: the program with its ``axes`` and ``groups``, frozen ones with the reason.

    Options as in :func:`compile`.
    """
    work = _Work("eager", None, 0, on_event, Limits(align, floor, allow_empty, freeze))
    work.open(model, example_inputs, checkpoint, trust_pickle, None, 0)
    return work.groups()


@dataclass(frozen=True)
class Limits:
    """What a search may not cross, see :func:`compile`. ``align=None`` leaves it to the target."""

    align: int | None = None
    floor: float = 0.1
    allow_empty: bool = False
    freeze: Sequence[str] = ()

    def find_groups(self, granularity: int) -> Pass:
        """The pass that knows them. Raises OptionError for values out of range."""
        from .passes.analysis.find_groups import FindGroups

        return FindGroups(align=granularity if self.align is None else self.align, floor=self.floor,
                          allow_empty=self.allow_empty,
                          freeze=(self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze))


@dataclass(frozen=True)
class Wish:
    """What a search is to reach, and by which criterion. Unknown names are OptionErrors as soon as it is made."""

    budget: Budget
    criterion: str
    kinds: tuple[Kind | str, ...]
    samples: int
    recover: str = "none"

    def __post_init__(self) -> None:
        from .passes.search.search_plan import kinds_named
        from .passes.transform.recover import Recover

        kinds_named(self.kinds)
        Recover(method=self.recover)
        if self.samples < 1:
            raise OptionError("at least one sample is needed", where=f"--samples {self.samples}")
        self.needs_data  # noqa: B018  asks for the criterion by name

    @property
    def needs_data(self) -> bool:
        """Whether the criterion or the recovery runs the model."""
        from .passes.analysis.score_groups import criterion

        return criterion(self.criterion).needs_data or self.recover != "none"


@dataclass
class _Work:
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

    def __post_init__(self) -> None:
        # what is wrong with the request must not cost a minute of scoring first
        self.backend = registry.backend(self.target)
        self.find_groups = self.limits.find_groups(self.backend.granularity)
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
        from .data import load_data
        from .load import load as load_model

        self.given = not isinstance(model, str | os.PathLike)
        self.stage(f"load {type(model).__name__ if self.given else model}")
        with _silence():
            source: Any = model if self.given or str(model).startswith("timm:") else Path(str(model))
            loaded = load_model(source, checkpoint=checkpoint, input=inputs, trust_pickle=trust_pickle,
                                need_inputs=data is None)
            if data is not None:
                self.calibration = load_data(data, loaded, samples=samples, seed=self.seed)
                if not loaded.args and not loaded.kwargs:
                    first = self.calibration.batches[0]
                    loaded = dataclasses.replace(loaded, args=first.args, kwargs=first.kwargs)
        for note in loaded.notes:
            self.warn(note)
        self.source, self.name = loaded, loaded.name
        self.stage("capture the graph")
        with _silence():
            self.dense = capture(loaded.model, loaded.args, loaded.kwargs, name=loaded.name)

    def run(self, program: Program, *passes: Pass) -> Program:
        """Run passes and remember what they did."""
        have = tuple(f for f in FACTS if getattr(program, f) is not None)
        pipeline = Pipeline(passes, start=have, on_pass=lambda p, _: self.stage(f"{p.slug().replace('-', ' ')}"))
        self.passes += passes
        try:
            with _silence():
                return pipeline.run(program)
        except InternalError as error:
            raise InternalError(error.what, pipeline=self.pipeline) from error
        except FxpruneError:
            raise
        except Exception as error:
            raise InternalError(f"{type(error).__name__}: {error}", pipeline=self.pipeline) from error
        finally:
            self.results += pipeline.results

    def groups(self, kinds: Iterable[Kind | str] = ()) -> Program:
        """The cleaned program with its axes and groups. Query/key or value width among ``kinds`` unfuses qkv first."""
        from .passes.analysis.find_groups import FindGroups
        from .passes.analysis.propagate_axes import PropagateAxes
        from .passes.transform.clean import Clean
        from .passes.transform.fold_weights import FoldWeights
        from .passes.transform.inline import Inline
        from .passes.transform.unfuse import Unfuse
        from .passes.transform.unshare import Unshare

        assert self.dense is not None
        ready = [FoldWeights(), Unfuse()] if {str(Kind.QK), str(Kind.V)} & set(map(str, kinds)) else [FoldWeights()]
        program = self.run(self.dense, Clean(), Inline(), *ready, PropagateAxes(), FindGroups(), Unshare())
        if program.groups is None:  # a table was unshared: what is known about the graph is out of date
            return self.run(program, PropagateAxes(), self.find_groups)
        return self.run(program, self.find_groups)

    def decide(self, wish: Wish) -> Program:
        """The program with scores and a plan within the budget."""
        from .data import generate
        from .passes.analysis.importance.objective import without_foreign_labels
        from .passes.analysis.score_groups import ScoreGroups
        from .passes.search.search_plan import SearchPlan

        self.budget = wish.budget
        program = self.groups(wish.kinds)
        if wish.needs_data and self.calibration is None:
            assert self.source is not None
            self.warn(f"no data was given: '{wish.criterion}' scores on generated inputs, which are not what the model "
                      "will see; give --data (data=...) for a better choice")
            self.calibration = generate(self.source, samples=wish.samples, seed=self.seed)
        if wish.needs_data and self.calibration is not None and self.calibration.labelled:
            bare = without_foreign_labels(program, self.calibration)
            if not bare.labelled:
                self.warn(f"the labels in {bare.origin} are left out: no output of the model predicts them")
            self.calibration = bare
        data = self.calibration = self.calibration if wish.needs_data else None  # the report names what was used
        jobs.identify(lambda: journal.fingerprint(program, data, self.seed, [repr(wish)]))
        program = self.run(program, ScoreGroups(criterion=wish.criterion, data=data, seed=self.seed),
                           SearchPlan(wish.budget, kinds=wish.kinds))
        plan = program.need("plan")
        about = {**plan.about, "model": self.name, "pipeline": self.pipeline,
                 "data": data.origin if data else None, "samples": data.samples if data else 0, "versions": versions()}
        return program.but(plan=CompressionPlan(plan.choices, about))

    def recover(self, program: Program, method: str) -> Program:
        """The dense program with recovered weights for what the plan keeps; the record goes into the report."""
        from .passes.transform.recover import Recover

        if method == "none":
            return program
        one = Recover(method=method, data=self.calibration, seed=self.seed)
        program = self.run(program, one)
        self.recovery = one.results[0].record() if one.results else None
        return program

    def finish(self, program: Program) -> Artifact:
        """Slice, prove that slicing equals masking, report, and lower and save where ``out`` says."""
        from .passes.analysis.propagate_axes import PropagateAxes
        from .passes.transform.fold_indices import FoldIndices
        from .passes.transform.slice_axes import SliceAxes

        plan, model = program.need("plan"), CostModel(program)
        predicted = model(kept_counts(program))
        sliced = self.run(program, SliceAxes())
        self.stage("compare slicing with masking")
        masked = self._compare(program, sliced)
        small = self.run(sliced.without_facts(), FoldIndices())
        counted = CostModel(self.run(small, PropagateAxes()))()
        if (counted.flops, counted.params) != (predicted.flops, predicted.params):
            raise InternalError(f"the plan was to cost {predicted}, the result costs {counted}",
                                pipeline=self.pipeline)
        if self.given:
            small = owning(small, program)
        calibration = self.calibration
        report = build_report(
            small, name=self.name, target=self.target, dense=model(), compressed=counted, plan=plan,
            groups=program.need("groups"), budget=self.budget, pipeline=self.pipeline,
            passes=self.results, seed=self.seed, notes=list(dict.fromkeys([*self.notes, *small.notes])), masked=masked,
            importance=plan.about.get("criterion"), data=None if calibration is None else {
                "origin": calibration.origin, "samples": calibration.samples, "labelled": calibration.labelled,
                "generated": calibration.generated},
        )
        report |= {"recovery": self.recovery} if self.recovery is not None else {}
        artifact = Artifact(small, plan, report, self.backend)
        if self.out is not None and ranks.rank() == 0:
            self.stage(f"lower to {self.target}, verify and save")
            with _silence():
                artifact.save(Path(self.out))
        return artifact

    def _compare(self, program: Program, sliced: Program) -> dict[str, float]:
        """Largest relative difference between the sliced graph and the dense one with the same elements masked.

        Raises InternalError beyond the tolerance of the coarsest dtype: slicing is then wrong, and nothing is written.
        VerifyError where the model draws random numbers, so that nothing can be said.
        """
        from .parity import tolerance_of, why_random
        from .testing import masking_error

        with _silence():
            error, limit = masking_error(program, sliced, self.seed), tolerance_of(program)
        if not error <= limit:
            why, cure = why_random(program)
            if why:
                raise VerifyError("slicing cannot be compared with masking", where=self.name, why=why, cure=cure)
            raise InternalError(f"slicing differs from masking by {error:.1e} (relative, tolerance {limit:.0e})",
                                pipeline=self.pipeline)
        return {"max_rel": error, "tolerance": limit}


def one_budget(flops: Amount, params: Amount, bytes: Amount) -> Budget:
    """The one budget that is given. Raises OptionError for none, several, or one that makes no sense."""
    given = {name: value for name, value in zip(METRICS, (flops, params, bytes), strict=True) if value is not None}
    if len(given) != 1:
        raise OptionError("give exactly one budget", where=", ".join(f"--{n} {v}" for n, v in given.items()),
                          why=f"found {len(given)} of flops, params and bytes", cure="for example --flops 0.5")
    return Budget.parse(*next(iter(given.items())))


def default_criterion(data: Any) -> str:
    """The best that the inputs allow."""
    return "l2" if data is None else "fisher"


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


def kept_counts(program: Program) -> dict[Axis, int]:
    """How many elements the plan keeps of each axis it cuts."""
    choices = program.need("plan").choices
    return {g.axis: len(choices[g.name].keep) for g in program.need("groups") if g.name in choices}


def write_plan(plan: CompressionPlan, path: Path) -> None:
    """Write ``plan`` as JSON, whole or not at all."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(plan.to_json(), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        aside.unlink(missing_ok=True)


def _read_plan(plan: PlanLike) -> CompressionPlan:
    return plan if isinstance(plan, CompressionPlan) else CompressionPlan.read(os.fspath(plan))


@contextmanager
def _silence() -> Iterator[None]:
    """torch and the models warn while they are traced; what matters to the user is told through events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
