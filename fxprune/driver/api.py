"""The whole tool as five functions: ``compile``, ``plan``, ``apply``, ``inspect`` and ``load``.

MODEL -> load -> capture -> clean -> axes -> groups -> scores -> plan -> slice -> lower -> verify -> artefact
         `------------- inspect -----------'                   |
         `----------------------- plan ------------------------'`------------ apply -------------'
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..artifact.artifact import Artifact, load
from ..data.memory import memory_limit
from ..ir.group import Kind
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process import ranks
from ..process.events import OnEvent, Transcript, warn_only
from ..process.files import write_text
from ..process.jobs import resumable
from ..request.budget import one_budget
from ..request.invocation import Invocation
from ..request.limits import Align, Floor
from ..request.options import Amount
from ..request.request import Request
from ..target.clock import SharedClock
from .apply import PlanLike, apply_plan, lines_of, read_plan
from .decide import Decided
from .decide_among import carry_through, decide_among
from .decide_tiles import keep_everything, plan_tiles
from .finish import finish
from .replay import run_stated
from .run import Inputs, Model, Run, find_groups, open_model
from .stated import StatedPipeline, read_pipeline

__all__ = ["apply", "compile", "inspect", "load", "plan"]

Outcome = TypeVar("Outcome")


def compile(
    model: Model,
    example_inputs: Inputs = None,
    *,
    flops: Amount = None,
    params: Amount = None,
    bytes: Amount = None,
    plan: PlanLike | None = None,
    target: str = "eager",
    data: Any = None,
    importance: str | None = None,
    out: str | os.PathLike[str] | None = None,
    prune: str | Sequence[str | Kind] | None = None,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = None,
    allow_empty: bool = False,
    samples: int | str = "auto",
    seed: int = 0,
    recover: str | None = None,
    rounds: int = 1,
    head_scale: float | str = 1.0,
    members: str = "auto",
    rearrange: int = 0,
    tokens: str | None = None,
    unmerge: bool = False,
    blocks: str | None = None,
    sparse: str | None = None,
    search: str = "auto",
    pipeline: str | None = None,
    latency: Amount = None,
    latency_ms: Amount = None,
    batch: int = 1,
    threads: int = 0,
    latency_table: str | os.PathLike[str] | None = None,
    expect_latency: bool = False,
    seconds: float | None = None,
    fast: bool = False,
    memory: float | str | None = None,
    held_out: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Artifact:
    """Make ``model`` smaller until it meets a budget, lower it to ``target`` and prove that the file computes it.

    model           an nn.Module (left as it was), an ExportedProgram, or what the command line takes: ``model.pt``,
                    ``model.pt2``, a Hugging Face folder, ``timm:NAME``
    example_inputs  a tensor, a tuple of positional inputs, a dict of keyword inputs (batch first), a shape such as
                    "1x3x224x224" or a file of tensors; asked of the model where it knows
    flops, params, bytes  exactly one of them, or of the latencies, or ``plan``: a ratio of the dense cost (0.5) or an
                    amount ("2.3G"); none is needed where token counts are explicit. FLOPs are multiply-accumulates;
                    bytes are those of parameters and buffers
    plan            a plan, or the path of one: apply it and search nothing; with ``pipeline``: what its ``read-plan``
                    takes
    target          ``eager`` (a .pt2), ``onnx``, ``hf`` (the Hugging Face folder again), ``inductor`` (machine code),
                    ``trt`` (an engine) or ``triton`` (a .pt2 whose block-sparse layers call a kernel), with options as
                    ``trt{dtype=fp16}``. Where the machine lacks what a target needs, what could be written is, and
                    ``report["unfinished"]`` says the rest
    data            calibration data: a path, a DataLoader, an iterable of batches; labels optional. Without any, the
                    criteria that need activations run on generated inputs, and warn
    importance      criterion, also with options (``trajectory{mode=exact}``); ``trajectory`` with data, else ``l2``
    out             directory for the artefact, replaced as a whole; nothing is written without it
    prune           kinds: "heads,ffn,tokens" or a sequence; heads, KV groups, FFN neurons and channels by default
    freeze          glob patterns of parameters or groups to leave alone
    align, floor, allow_empty   counts in multiples of ``align`` (the target's choice; "auto": what the
                    target is measured to like), at least a ``floor`` share per
                    layer, unless ``allow_empty``; also for the groups that a pattern names: ``align=[8, "*.ffn=32"]``,
                    ``floor="blocks.*.mlp=0.3"``
    samples         of calibration data; ``auto``: 1024, or as many of 128 and more as a pass over them costs little
    seed            of everything random: same inputs, same plan
    recover         fit what stays to what the dense model does on the data: ``auto`` (default with data), ``ridge``,
                    ``refit``, ``bias``, ``scale``, ``tune`` or ``none`` (default without), also with
                    options (``scale{solver=lsmr}``), see :class:`fxprune.passes.transform.recover.Recover`
    rounds          score, cut a part, score again, so many times
    head_scale      factor on what heads are worth against neurons; ``auto`` tries a few on the data
    members         which neurons stay in a layer, once it is known how many: those with the best ``scores``, or those
                    that structured OBS chooses (``obs``, the default when there is recovery, and for channels where
                    that is as near to dense once it is repaired)
    rearrange       rounds of choosing members again by what they do together (PTF); needs ``fisher``
    tokens          how image tokens become fewer: ``tome`` (also ``prune``, ``ppt``, ``zero-tprune``, ``transform``,
                    ``random``) as many as the budget asks; ``tome:r=13``, ``ppt:r=50@3,6,9``: so many; ``off``. With
                    options, as ``tome{schedule=constant}``: those of the reducer, and
                    :class:`fxprune.request.tokens.TokenSearchOptions`
    unmerge         models that read or return every token get them back, as the one that took each in
    blocks          zero tiles inside the weights of linear layers until the budget of FLOPs is met: ``32x32``, with
                    options as ``32x32{slice=0.7,allocation=lsp}``, see :class:`fxprune.request.tiles.Tiling`.
                    ``importance`` may then name a criterion of tiles: ``lsp`` (default with data), ``magnitude``,
                    ``wanda``, ``obert``; ``recover`` may be ``obs``. What was not measured to be faster on the target
                    stays in a dense weight (``fxprune tune``)
    sparse          ``2:4``: zero two of every four inputs, after slicing to the budget if there is one
    search          ``auto``, ``two-class``, ``dynamic``, ``lagrangian``, ``exhaustive``, or a plugin's (see SearchPlan)
    pipeline        the passes themselves, as reports state them, instead of the options that decide: see
                    :mod:`fxprune.driver.replay`
    latency, latency_ms   a budget of time on the target as it runs here: a share of what the dense model takes, or
                    milliseconds of one call, at ``batch`` samples and ``threads`` CPU threads (0: the runtime's own).
                    Measured (see :mod:`fxprune.target.latency_table`), kept, and held against the plan itself
    latency_table   a recorded table instead of measuring: the same plan on every machine
    expect_latency  with another budget: measure, and report what to expect
    seconds         to time the written file beside the dense model's, at ``batch`` and ``threads``, for the report's
                    ``measured`` (see :mod:`fxprune.artifact.delivered`): about 2 by default, 0 leaves it out
    fast            every check, but neither that timing nor the report's page
    memory          what caches of calibration may take together ("8GiB"), and a batch on its way through the model:
                    batches become smaller, and recovery sees fewer samples, where more do not fit. Where memory runs
                    out all the same, batches are halved and the work goes on
    held_out        a share of ``data`` on which nothing is decided or fitted, as ``fxprune sweep`` holds it back; the
                    report then compares outputs on it
    checkpoint, trust_pickle, model_args   weights for ``timm:NAME``; whether to run code from pickles; and how a model
                    that goes by its name is built: ``"img_size=384,in_chans=1,num_classes=0"`` or a dict
    on_event        called with every stage and warning; by default warnings become Python warnings

    Raises FxpruneError (what, where, why, cure); no file is left behind then.
    """
    given = locals()
    if plan is not None and pipeline is None and data is None:
        Invocation.of("compile", given).request  # noqa: B018  may refuse what is given besides
        return _apply(Invocation.of("apply", {**given, "align": 1 if align is None else align}), on_event)
    invoked, tell = Invocation.of("compile", given), Transcript(on_event)
    request = invoked.request
    if pipeline is not None:
        return _replay(invoked, request, tell, finish_stated)
    if plan is not None:
        chosen = read_plan(plan)
        with memory_limit(memory), resumable(out, on_event), lines_of(chosen):
            return finish(apply_plan(open_run(invoked, request, tell), chosen, recover or "auto"))
    goal = request.goal
    with memory_limit(memory), resumable(out, on_event), SharedClock(batch, threads) as clock:
        run = open_run(invoked, request, tell, clock)
        if goal is None:
            return finish(keep_everything(run))
        return carry_through(decide_among(run, goal), lambda found: finish(found.recover(goal.recovery)))


def plan(
    model: Model,
    example_inputs: Inputs = None,
    *,
    flops: Amount = None,
    params: Amount = None,
    bytes: Amount = None,
    target: str = "eager",
    data: Any = None,
    importance: str | None = None,
    out: str | os.PathLike[str] | None = None,
    prune: str | Sequence[str | Kind] | None = None,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = None,
    allow_empty: bool = False,
    samples: int | str = "auto",
    seed: int = 0,
    rounds: int = 1,
    head_scale: float | str = 1.0,
    members: str = "auto",
    rearrange: int = 0,
    tokens: str | None = None,
    unmerge: bool = False,
    blocks: str | None = None,
    sparse: str | None = None,
    search: str = "auto",
    pipeline: str | None = None,
    latency: Amount = None,
    latency_ms: Amount = None,
    batch: int = 1,
    threads: int = 0,
    latency_table: str | os.PathLike[str] | None = None,
    expect_latency: bool = False,
    memory: float | str | None = None,
    held_out: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Program:
    """Decide what to remove and stop there: the dense program with its ``axes``, ``groups``, ``scores`` and ``plan``.

    Options as in :func:`compile`. With ``out`` the plan is also written there as JSON, to be read, edited and applied.
    """
    invoked, tell = Invocation.of("plan", locals()), Transcript(on_event)
    request = invoked.request
    if pipeline is not None:
        return _write_plan(_replay(invoked, request, tell, lambda made, _: plan_tiles(made)).run.program, out)
    goal = request.goal
    with memory_limit(memory), resumable(out, on_event), SharedClock(batch, threads) as clock:
        run = open_run(invoked, request, tell, clock)
        program = plan_tiles(keep_everything(run) if goal is None else decide_among(run, goal)).run.program
    return _write_plan(program, out)


def _write_plan(program: Program, out: str | os.PathLike[str] | None) -> Program:
    """The program, its plan written where that was asked for."""
    if out is not None and ranks.rank() == 0:
        write_plan(program.need("plan"), Path(out))
    return program


def apply(
    model: Model,
    plan: PlanLike,
    example_inputs: Inputs = None,
    *,
    target: str = "eager",
    out: str | os.PathLike[str] | None = None,
    align: Align = 1,
    seed: int = 0,
    batch: int = 1,
    threads: int = 0,
    seconds: float | None = None,
    fast: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Artifact:
    """Slice ``model`` as ``plan`` says: no data, no search, deterministic. An empty plan only lowers and verifies.

    plan    what :func:`plan` or an artefact holds, or the path of a plan.json; it fits every checkpoint of the same
            architecture. Raises PlanError naming the group where it does not, and the line where the plan is a file
    align   refuse counts that are no multiples of it; by default every count goes, and those that the target's kernels
            do not like are named

    Other options as in :func:`compile`.
    """
    return _apply(Invocation.of("apply", locals()), on_event)


def inspect(
    model: Model,
    example_inputs: Inputs = None,
    *,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = None,
    allow_empty: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    model_args: str | Mapping[str, Any] | None = None,
    on_event: OnEvent = warn_only,
) -> Program:
    """Find what can be pruned: the program with its ``axes``, ``groups`` and ``tokens``, frozen ones with the reason.

    Options as in :func:`compile`.
    """
    invoked = Invocation.of("inspect", locals())
    return find_groups(open_run(invoked, invoked.request, Transcript(on_event)), tokens=True).program


def _apply(invoked: Invocation, on_event: OnEvent) -> Artifact:
    chosen = read_plan(invoked.decision.plan)
    with lines_of(chosen):
        return finish(apply_plan(open_run(invoked, invoked.request, Transcript(on_event)), chosen))


def open_run(invoked: Invocation, request: Request, tell: Transcript, clock: SharedClock | None = None) -> Run:
    """The run that begins with the model and the data of a call; ``request`` is what is to be made of them."""
    source = invoked.source
    opened = open_model(
        request,
        tell,
        source.model,
        source.example_inputs,
        checkpoint=source.checkpoint,
        trust_pickle=source.trust_pickle,
        model_args=source.model_args,
        data=invoked.decision.data,
    )
    return Run.of(request, opened, tell, clock)


def finish_stated(decided: Decided, stated: StatedPipeline) -> Artifact:
    """The artefact of a pipeline that was run as far as slicing."""
    return finish(decided, stated.after)


def _replay(
    invoked: Invocation, request: Request, tell: Transcript, then: Callable[[Decided, StatedPipeline], Outcome]
) -> Outcome:
    """What ``then`` makes of the dense program with the plan that the stated passes make."""
    asked = invoked.decision
    stated = read_pipeline(asked.pipeline or "", one_budget(invoked.budget), request.seed, asked.plan)
    with memory_limit(asked.memory), resumable(invoked.writing.out, tell.on_event), lines_of(stated.plan):
        return then(run_stated(open_run(invoked, request, tell), stated), stated)


def write_plan(plan: CompressionPlan, path: Path) -> None:
    """Write ``plan`` as JSON, whole or not at all."""
    write_text(path, plan.to_json())
