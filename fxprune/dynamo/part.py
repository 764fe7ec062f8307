"""``torch.compile(model, backend="fxprune", options={"flops": 0.5, "data": loader})``: prune, then compile.

The first call calibrates, decides and slices; what runs from then on is the pruned graph, compiled by ``inner``. Dynamo
recompiles for other sizes; every such graph gets the plan and the weights that the first one got, and nothing is scored
again. Where the model breaks into several graphs, each is pruned to the budget on its own, or left whole and reported.
The model itself stays as it was: its weights are copied where they are kept, and only read.

Everything happens when a graph first runs, not while dynamo compiles: errors then reach the caller as what they are.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..artifact.artifact import Artifact
from ..data.memory import memory_limit
from ..driver.apply import give_plan, read_plan, tell_of_basis
from ..driver.decide import decide
from ..driver.finish import finish
from ..driver.run import Opened, Run, find_groups
from ..errors import BudgetInfeasible, FxpruneError, NothingToPrune, OptionError, PlanError
from ..intake.load import Loaded
from ..ir.plan import Choice, CompressionPlan
from ..ir.program import Program
from ..process.events import Transcript, warn_only
from ..process.jobs import resumable
from .calibration import calibration_of, warn
from .graph import (
    Slot,
    bind_module,
    names_of,
    numbers_in,
    program_of,
    refuse_writes,
    slots_of,
    trains,
    user_slots,
    with_tensors,
)
from .session import INNER, Call, Options, Session, current_call, session_for, session_of

__all__ = ["INNER", "Options", "backend", "plan_of", "report_of"]

_building = threading.RLock()


def backend(
    gm: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend as dynamo calls it; users name it: ``torch.compile(model, backend="fxprune", options={...})``.

    options   see :class:`Options`
    mode      not understood: say ``inner`` in the options
    """
    return Part(gm, slots_of(gm, inputs), options, mode)


def plan_of(compiled: Any) -> CompressionPlan:
    """The plan that a compiled model runs by; its groups carry the names that :func:`fxprune.plan` gives them.

    compiled  what ``torch.compile`` returned, or the model. Raises OptionError before the first call.
    """
    return session_of(compiled).plan


def report_of(compiled: Any) -> list[dict[str, Any]]:
    """One entry per graph that dynamo made, in the order of their first calls:

    status   ``pruned`` or ``whole``; ``why`` it is whole
    reused   whether the plan was there already
    cost     as in an artefact's report, of a pruned graph;  notes: what else to know
    sizes    shapes of the tensors it was made for;  open: their dimensions that may vary

    compiled  what ``torch.compile`` returned, or the model. Raises OptionError before the first call.
    """
    return [dict(report) for report in session_of(compiled).reports]


@dataclass
class Built:
    """A graph ready to run on one set of the model's tensors; ``run`` is None where it stays whole."""

    tensors: tuple[Callable[[], Tensor | None], ...]
    versions: tuple[int, ...]
    user: tuple[int, ...]
    run: Callable[..., Any] | None = None

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are its tensors: dynamo may run one graph for two models of the same class."""
        return all(ref() is t for ref, t in zip(self.tensors, tensors, strict=True))


class Part:
    """One graph of dynamo's, pruned when it first runs."""

    def __init__(self, gm: GraphModule, slots: tuple[Slot, ...], given: Any, mode: str | None = None) -> None:
        self.gm, self.slots, self.given, self.mode = gm, slots, given, mode
        self.options: Options | None = None
        self.built: list[Built] = []
        self.trains, self.number = trains(gm), numbers_in(gm)
        self.bound = tuple(i for i, s in enumerate(slots) if s.kind == "bound")
        self.dense: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> Any:
        """Outputs as dynamo expects them. Raises FxpruneError, or runs the dense model where ``fallback`` says so."""
        options = self.options = self.options or self._options()
        try:
            call = current_call()
            self._refuse(call, values)
            built = self._ready(options, call, values)
        except FxpruneError as error:
            if not options.fallback:
                raise
            warn(f"the dense model runs: {error.what}" + (f" ({error.why})" if error.why else ""))
            return self._whole(options, values)
        if built.run is None:
            return self._whole(options, values)
        return pytree.tree_leaves(built.run(*(values[i].detach() for i in built.user)))

    def _options(self) -> Options:
        if self.mode is not None:
            raise OptionError(
                f"the backend 'fxprune' has no mode '{self.mode}'",
                where="torch.compile(mode=...)",
                cure="leave it away; options={'inner': 'inductor'} says what compiles the pruned graph",
            )
        return Options.of(self.given)

    def _whole(self, options: Options, values: Sequence[Any]) -> Any:
        """The graph as dynamo made it, compiled by ``inner``; gradients flow."""
        if self.dense is None:
            self.dense = _compile(self.gm, options.inner, None)
        return self.dense(*values)

    def _refuse(self, call: Call, values: Sequence[Any]) -> None:
        """Raise OptionError for a call that asks for gradients: what was pruned cannot give them to the model."""
        cure = (
            "options={'fallback': True} runs the dense model then; to fine-tune what is left, use "
            "fxprune.compile(...).module"
        )
        if self.trains or (call.root is not None and call.root.training):
            raise OptionError(
                "the backend 'fxprune' does not compile a model in training mode",
                where=call.name + (f", node {self.trains}" if self.trains else ""),
                why="it prunes what the model computes in evaluation",
                cure=f"model.eval() first; {cure}",
            )
        passed = (
            call.leaves
            if call.root is not None
            else [v for v, s in zip(values, self.slots, strict=True) if s.kind == "user"]
        )
        asked = next((t for t in passed if isinstance(t, Tensor) and t.requires_grad), None)
        if asked is not None and torch.is_grad_enabled():
            raise OptionError(
                "the backend 'fxprune' computes no gradients",
                where=f"{call.name}, an input {list(asked.shape)}",
                why="it was passed with requires_grad=True",
                cure=f"call it under torch.no_grad(), or pass x.detach(); {cure}",
            )

    def _ready(self, options: Options, call: Call, values: Sequence[Any]) -> Built:
        bound = [values[i] for i in self.bound]
        for built in self.built:
            if built.serves(bound):
                if built.versions != _versions(bound):
                    raise OptionError(
                        "the weights of the model changed after it was pruned",
                        where=call.name,
                        why="the pruned graph holds copies of what they were",
                        cure="torch._dynamo.reset(), and torch.compile again with a new options dict",
                    )
                return built
        with _building:
            built = self._build(options, call, values)
        self.built = [b for b in self.built if all(t() is not None for t in b.tensors)] + [built]
        return built

    def _build(self, options: Options, call: Call, values: Sequence[Any]) -> Built:
        names = names_of(self.slots, values, call.root)
        tensors = {names[s.name]: v for s, v in zip(self.slots, values, strict=True) if s.name in names}
        session = session_for(self.given, call.root, tensors)
        mine = user_slots(self.slots, names)
        user = tuple(i for i, s in enumerate(self.slots) if s in mine)
        bound = [values[i] for i in self.bound]
        built = Built(tuple(map(weakref.ref, bound)), _versions(bound), user)
        report: dict[str, Any] = {
            "status": "whole",
            "why": "",
            "reused": bool(session.plan.choices),
            "notes": [],
            "sizes": [list(values[i].shape) for i in user],
            "open": [list(s.dims) for s in mine],
        }
        whole = frozenset(tensors)
        try:
            if whole in session.whole:  # as it was found at other sizes
                raise NothingToPrune(session.whole[whole])
            artifact = self._prune(options, session, report, names, values, [values[i] for i in user], call)
        except (NothingToPrune, BudgetInfeasible, PlanError) as error:
            if _covers(call.root, tensors):
                raise
            report["why"] = error.what + (f": {error.why}" if error.why else "")
            known = whole in session.whole or options.plan is not None
            session.whole[whole] = report["why"]
            if not known and any(isinstance(t, nn.Parameter) and t.dim() > 1 for t in tensors.values()):
                warn(f"a graph of {call.name}, which is more than one, stays whole: {report['why']}")
        else:
            report |= {
                "status": "pruned",
                "cost": artifact.report["cost"],
                "notes": [*report["notes"], *artifact.report["notes"]],
            }
            built.run = _compile(artifact.module.requires_grad_(False), options.inner, any(s.dims for s in mine))
        session.reports.append(report)
        return built

    def _prune(
        self,
        options: Options,
        session: Session,
        report: dict[str, Any],
        names: Mapping[str, str],
        values: Sequence[Any],
        inputs: Sequence[Tensor],
        call: Call,
    ) -> Artifact:
        number = self.number or next((s.source for s in self.slots if s.kind == "number"), "")
        if number or not inputs or not names:
            why = (
                f"'{number}' is a number and no tensor"
                if number
                else "it takes no tensor of the call"
                if not inputs
                else "it reads no tensor of the model"
            )
            raise NothingToPrune("this graph cannot be pruned", where=call.name, why=why)
        with _plainly():
            copies = [t.detach().clone() for t in inputs]
            module, mine = bind_module(self.gm, self.slots, names, values), user_slots(self.slots, names)
            dense = program_of(module, mine, copies, call.name)
            refuse_writes(dense)
            source = Loaded(module, call.name, tuple(copies), input_names=tuple(dense.user_inputs))
            run = Run.of(options.request, Opened(dense, source, given=True), Transcript(warn_only))
            with memory_limit(options.asked.decision.memory), resumable(None, warn_only):
                found = _apply_known_plan(run, session, options, report, call.root)
                if found is not None:
                    return found
                return _search(replace(run, data=calibration_of(options, source, mine, inputs, call)), session, options)


def _search(run: Run, session: Session, options: Options) -> Artifact:
    """Decide and recover; the session keeps the plan and the weights for the graphs to come."""
    goal = options.request.goal
    assert goal is not None
    decided = decide(run, goal, rewrite=False)  # its weights are for other graphs, too
    recovered = decided.recover(goal.recovery)
    artifact = finish(recovered)
    plan, before = decided.unfitted.need("plan"), decided.unfitted.tensors
    after = recovered.run.program.tensors
    session.weights |= {n: t for n, t in after.items() if n not in before or t is not before[n]}
    session.kinds = tuple(map(str, goal.kinds))
    session.plan = replace(plan, choices={**session.plan.choices, **plan.choices})
    return artifact


def _apply_known_plan(
    run: Run, session: Session, options: Options, report: dict[str, Any], root: nn.Module | None
) -> Artifact | None:
    """The plan that is there already, on this graph; None where it says nothing about it and is still to be made."""
    plan = session.plan
    if options.plan is not None:
        plan = read_plan(options.plan)
        if plan.tokens is not None or plan.blocks:
            raise OptionError(
                "the backend 'fxprune' applies plans of heads, neurons and channels",
                where="options['plan']",
                why="this one also merges tokens or zeroes tiles",
                cure="use fxprune.apply, and run its module",
            )
    elif not plan.choices:
        return None
    known = find_groups(run, session.kinds or plan.kinds, basis=plan.basis)
    tell_of_basis(run, plan)
    here = _part_of(plan, known.program, bool(session.weights), report, root)
    if plan.choices and not here.choices:
        if report["notes"]:  # its layers are here, and none of them can be cut as the plan says
            raise NothingToPrune(
                "nothing that the plan cuts can be cut in this graph", where=run.opened.name, why=report["notes"][0]
            )
        if options.plan is None:
            return None
        raise NothingToPrune(
            "the plan says nothing about this graph",
            where=run.opened.name,
            why="its groups lie in other graphs of the model",
        )
    here.check(known.program.group_by_name)
    report["reused"] = options.plan is None
    artifact = finish(give_plan(known.on(with_tensors(known.program, session.weights)), here))
    session.plan = replace(plan, choices={**session.plan.choices, **here.choices})
    return artifact


def _part_of(
    plan: CompressionPlan, program: Program, recovered: bool, report: dict[str, Any], root: nn.Module | None
) -> CompressionPlan:
    """What ``plan`` says about the groups of this graph. What it cuts and this graph cannot is told, or an error.

    recovered  the weights were fitted to what the plan removes: a group that it cuts must then be cut here as well
    """
    groups, tensors = program.group_by_name, list(program.tensors)
    known = [] if root is None else [n for n, _ in root.named_parameters()]
    here: dict[str, Choice] = {}
    for name, choice in plan.elements.items():
        owner = name.rpartition(":")[0] + "."
        group, cut = groups.get(name), len(choice.keep) < choice.size
        read = any(n.startswith(owner) for n in tensors)
        if group is None and not read:
            if known and not any(n.startswith(owner) for n in known):
                here[name] = choice  # no such layer anywhere: the check that follows says so
            continue
        why = group.frozen if group is not None else "it is no group of this graph"
        if why and cut:
            if recovered:
                raise PlanError(
                    "this graph needs whole what the plan cuts",
                    where=f"group '{name}'",
                    why=why,
                    cure="freeze it: options={'freeze': [...]}",
                )
            report["notes"].append(f"'{name}' stays whole in this graph: {why}")
            warn(report["notes"][-1])
        if why:
            continue
        here[name] = choice
    return replace(plan, choices=here)


def _covers(root: nn.Module | None, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the graph is the whole model: nothing to prune is an error then, and no part left whole."""
    mine = {id(t) for t in tensors.values()}
    return root is None or all(id(p) in mine for p in root.parameters())


def _compile(module: nn.Module, inner: str, opened: bool | None) -> Callable[..., Any]:
    """``module`` by ``inner``. opened: whether sizes may vary; None leaves it to dynamo."""
    if inner == "eager":
        return module
    compiled: Callable[..., Any] = torch.compile(module, backend=inner, dynamic=opened or None)
    return compiled


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each tensor was written in place; -1 for those made in inference mode, which do not count."""
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


@contextmanager
def _plainly() -> Iterator[None]:
    """Gradients can be had, whatever the caller switched off: scoring needs them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
