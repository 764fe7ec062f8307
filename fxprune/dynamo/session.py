"""What ``torch.compile(model, backend="fxprune", options=...)`` was asked for, and what it has decided so far."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..driver.apply import PlanLike
from ..errors import OptionError, nearest
from ..ir.plan import CompressionPlan
from ..request.invocation import Invocation
from ..request.options import options_of
from ..request.request import Request

INNER = ("inductor", "eager", "aot_eager")
_CALLED = nn.Module._wrapped_call_impl.__code__


@dataclass(frozen=True)
class Options:
    """``options`` of ``torch.compile``: those of :func:`fxprune.compile` that a graph in a running model can take
    (``fxprune help dynamo`` lists them), and two of its own.

    asked     all others. data: calibration data of the whole model, not of a part behind a graph break; without any,
              the inputs of the first call are used, with a warning. plan: apply it (or the file it lies in) and search
              nothing: no data is read, nothing is recovered
    inner     what compiles the pruned graph: ``inductor``, ``aot_eager`` or ``eager``
    fallback  in training mode, with inputs that require gradients, and where a graph cannot be pruned: run the dense
              model (compiled by ``inner``) instead of raising an error
    """

    asked: Invocation
    inner: str
    fallback: bool

    @staticmethod
    def of(given: Mapping[str, Any] | None) -> Options:
        """The options, checked. Raises OptionError."""
        every = {one.name: one for one in options_of("dynamo").values()}
        known = {name: one for name, one in every.items() if not one.refused}
        for name in given or {}:
            if name not in known:
                raise OptionError(
                    f"the backend 'fxprune' has no option '{name}'",
                    where="torch.compile(options=...)",
                    why=every[name].refused if name in every else "",
                    cure="leave it away" if name in every else nearest(str(name), known),
                )
        values = {name: one.default for name, one in known.items()} | dict(given or {})
        if values["inner"] not in INNER:
            raise OptionError(
                f"unknown inner backend '{values['inner']}'",
                where="options['inner']",
                cure=nearest(str(values["inner"]), INNER),
            )
        if values["importance"] is None:  # there always is some data: the inputs of the first call
            values["importance"] = "trajectory"
        made = Options(Invocation.of("dynamo", values), values["inner"], values["fallback"])
        made.request  # noqa: B018  reads every name in it
        return made

    @property
    def request(self) -> Request:
        """What is to be made of every graph."""
        return self.asked.request

    @property
    def plan(self) -> PlanLike | None:
        """The plan that is given."""
        found: PlanLike | None = self.asked.decision.plan
        return found


@dataclass
class Session:
    """What one ``torch.compile`` call has decided: one plan and its weights, however many graphs dynamo makes of it.

    given    the ``options`` object itself: dynamo hands the same one to every compilation of one ``torch.compile``
    root     the model (weakly);  rooted: whether it is known
    plan     group -> what stays; grows with every graph that has groups of its own
    weights  tensors that recovery changed, by name, before slicing
    tensors  the model's tensors by name (weakly), to tell one model from another that shares its code
    whole    names of the tensors of a graph that stays whole -> why
    """

    given: Any
    root: Callable[[], nn.Module | None]
    rooted: bool
    plan: CompressionPlan = field(default_factory=CompressionPlan)
    kinds: tuple[str, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Callable[[], Tensor | None]] = field(default_factory=dict)
    whole: dict[frozenset[str], str] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def serves(self, given: Any, root: nn.Module | None, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a graph over these tensors belongs to this session."""
        same = all(self.tensors[n]() is t for n, t in tensors.items() if n in self.tensors)
        return given is self.given and self.root() is root and same

    @property
    def alive(self) -> bool:
        """Whether anybody can still call it."""
        return self.root() is not None if self.rooted else any(t() is not None for t in self.tensors.values())


_sessions: list[Session] = []


def session_for(given: Any, root: nn.Module | None, tensors: Mapping[str, Tensor]) -> Session:
    """The session that a graph over ``tensors`` belongs to; a new one where there is none."""
    _sessions[:] = [s for s in _sessions if s.alive]
    session = next((s for s in _sessions if s.serves(given, root, tensors)), None)
    if session is None:
        session = Session(given, (lambda: None) if root is None else weakref.ref(root), root is not None)
        _sessions.append(session)
    session.tensors |= {name: weakref.ref(t) for name, t in tensors.items()}
    return session


def session_of(model: Any) -> Session:
    """The last session of a model, or of what ``torch.compile`` made of it. Raises OptionError where there is none."""
    root = getattr(model, "_orig_mod", model)
    for session in reversed(_sessions):
        if session.root() is root:
            return session
    raise OptionError(
        "this model was not compiled by the backend 'fxprune', or was not called yet",
        where=type(root).__name__,
        cure="torch.compile(model, backend='fxprune', options={...}), call it",
    )


@dataclass(frozen=True)
class Call:
    """The call of the compiled model that a graph runs in: what dynamo itself does not hand on.

    root          the model; None where a function was compiled
    args, kwargs  what the caller passed to it
    """

    root: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        return list(pytree.tree_leaves((self.args, dict(self.kwargs))))

    @property
    def name(self) -> str:
        return "function" if self.root is None else type(self.root).__name__


def current_call() -> Call:
    """The innermost call of a compiled model on this thread's stack.

    Dynamo tells a backend which tensors a graph reads, by names relative to the frame it compiles; behind a graph break
    that frame belongs to some submodule. The names of a plan are relative to the model.
    """
    from torch._dynamo import OptimizedModule

    frame = sys._getframe()
    while frame is not None:
        here = frame.f_locals
        model = here.get("self")
        if isinstance(model, nn.Module):
            by_wrapper = frame.f_code is OptimizedModule.__call__.__code__ and isinstance(model, OptimizedModule)
            in_place = frame.f_code is _CALLED and model._compiled_call_impl is not None  # model.compile(...)
            if by_wrapper or in_place:
                return Call(getattr(model, "_orig_mod", model), tuple(here["args"]), dict(here["kwargs"]))
        frame = frame.f_back  # type: ignore[assignment]
    return Call()
