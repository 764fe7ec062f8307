"""The whole tool as five functions: ``compile``, ``plan``, ``apply``, ``inspect`` and ``load``.

MODEL -> load -> capture -> clean -> axes -> groups -> scores -> plan -> slice -> lower -> verify -> artefact
         `------------- inspect -----------'                   |
         `----------------------- plan ------------------------'`------------ apply -------------'
"""

from __future__ import annotations

import inspect as inspection
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..artifact.artifact import Artifact, load
from ..data.memory import within
from ..errors import OptionError
from ..ir.cost import METRICS
from ..ir.group import Kind
from ..ir.plan import CompressionPlan
from ..ir.program import Program
from ..process import ranks
from ..process.events import OnEvent, Transcript, warn_only
from ..process.files import write_text
from ..process.jobs import resumable
from ..request.budget import Amount, budget_or_none, one_budget
from ..request.goal import Wish, default_criterion, kinds_and_tokens
from ..request.latency import LatencyWish, latency_wish
from ..request.limits import FLOOR, Align, Floor, Limits
from ..request.options import by_option
from ..request.request import Request
from ..request.tiles import Slicing, kinds_and_blocks, split_request
from ..target.clock import SharedClock
from .apply import PlanLike, apply_plan, lines_of, read_plan
from .decide import Decided, decide
from .decide_tiles import keep_everything, plan_tiles
from .finish import finish
from .replay import run_stated
from .run import Inputs, Model, Run, find_groups, open_model
from .stated import StatedPipeline, read_pipeline

__all__ = ["apply", "compile", "inspect", "load", "plan"]

Made = TypeVar("Made")


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
    floor: Floor = FLOOR,
    allow_empty: bool = False,
    samples: int = 128,
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
    memory: float | str | None = None,
    held_out: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
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
    target          ``eager`` (a .pt2), ``onnx``, ``inductor`` (machine code), ``trt`` (an engine) or ``triton`` (a .pt2
                    whose block-sparse layers call a kernel), with options as ``trt{dtype=fp16}``. Where the machine
                    lacks what a target needs, what could be written is, and ``report["unfinished"]`` says the rest
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
    samples, seed   calibration samples, and the seed of everything random: same inputs, same plan
    recover         fit what stays to what the dense model does on the data: ``auto`` (default with data), ``ridge``,
                    ``refit``, ``bias``, ``scale``, ``tune`` or ``none`` (default without), also with
                    options (``scale{solver=lsmr}``), see :class:`fxprune.passes.transform.recover.Recover`
    rounds          score, cut a part, score again, so many times
    head_scale      factor on what heads are worth against neurons; ``auto`` tries a few on the data
    members         which neurons stay in a layer, once it is known how many: those with the best ``scores``, or those
                    that structured OBS chooses (``obs``, the default when there is recovery)
    rearrange       rounds of choosing members again by what they do together (PTF); needs ``fisher``
    tokens          how image tokens become fewer: ``tome`` (also ``prune``, ``ppt``, ``zero-tprune``, ``transform``,
                    ``random``) as many as the budget asks; ``tome:r=13``, ``ppt:r=50@3,6,9``: so many; ``off``. With
                    options, as ``tome{schedule=constant}``: those of the reducer, and
                    :class:`fxprune.request.tokens.Deciding`
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
    memory          what caches of calibration may take together ("8GiB"), and a batch on its way through the model:
                    batches become smaller, and recovery sees fewer samples, where more do not fit. Where memory runs
                    out all the same, batches are halved and the work goes on
    held_out        a share of ``data`` on which nothing is decided or fitted, as ``fxprune sweep`` holds it back; the
                    report then compares outputs on it
    on_event        called with every stage and warning; by default warnings become Python warnings

    Raises FxpruneError (what, where, why, cure); no file is left behind then.
    """
    asked = by_option("compile", locals())
    if plan is not None and pipeline is None:
        if (flops, params, bytes, latency, latency_ms) != (None,) * 5:
            raise OptionError("give a plan or a budget, not both", why="a plan decides already", cure="leave one away")
        if data is None:
            if recover not in (None, "none"):
                raise _no_data_to_recover(recover)
            return apply(
                model,
                plan,
                example_inputs,
                target=target,
                out=out,
                seed=seed,
                batch=batch,
                threads=threads,
                seconds=seconds,
                checkpoint=checkpoint,
                trust_pickle=trust_pickle,
                on_event=on_event,
            )
    tell = Transcript(on_event)
    if plan is not None or pipeline is not None:
        timing = _timed(batch, threads, seconds, latency_table)
        limits = Limits() if pipeline is not None else OF_A_PLAN
        request = Request(target, out, seed, limits, latency=timing, samples=samples, held_out=held_out, options=asked)
        if pipeline is not None:
            return _replay(model, example_inputs, request, tell, pipeline, data, finish_stated)
        assert plan is not None
        chosen = read_plan(plan)
        with within(memory), resumable(out, on_event), lines_of(chosen):
            run = _open(request, tell, model, example_inputs, data)
            return finish(apply_plan(run, chosen, recover or "auto"))
    if recover not in (None, "none") and data is None:
        raise _no_data_to_recover(recover)
    kinds, wished = kinds_and_tokens(prune, tokens, unmerge)
    kinds, blocks = kinds_and_blocks(kinds, blocks, sparse, flops)
    asking = Slicing(flops, params, bytes, importance, recover)
    zeros, rest = split_request(blocks, sparse, asking, data is not None, freeze)
    timing = latency_wish(batch, threads, latency_table, expect_latency, align, latency, latency_ms, zeros, seconds)
    goal = None
    if zeros is None or rest.slices or wished is not None:
        goal = Wish(
            budget_or_none(rest.flops, rest.params, rest.bytes, wished, latency, latency_ms),
            rest.importance or default_criterion(data),
            kinds,
            samples,
            rest.recover or ("none" if data is None else "auto"),
            rounds,
            head_scale,
            members,
            rearrange,
            wished,
            search,
        )
    limits = Limits(align, floor, allow_empty, freeze)
    request = Request(target, out, seed, limits, goal, zeros, timing, samples, held_out, asked)
    with within(memory), resumable(out, on_event), SharedClock(batch, threads) as clock:
        run = _open(request, tell, model, example_inputs, data, clock)
        return finish(keep_everything(run) if goal is None else decide(run, goal).recovered(goal.recovery))


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
    floor: Floor = FLOOR,
    allow_empty: bool = False,
    samples: int = 128,
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
    held_out: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    on_event: OnEvent = warn_only,
) -> Program:
    """Decide what to remove and stop there: the dense program with its ``axes``, ``groups``, ``scores`` and ``plan``.

    Options as in :func:`compile`. With ``out`` the plan is also written there as JSON, to be read, edited and applied.
    """
    asked = by_option("plan", locals())
    tell = Transcript(on_event)
    if pipeline is not None:
        timing = _timed(batch, threads, None, latency_table)
        request = Request(target, None, seed, latency=timing, samples=samples, held_out=held_out, options=asked)
        decided = _replay(model, example_inputs, request, tell, pipeline, data, lambda made, _: plan_tiles(made))
        return _written(decided.run.program, out)
    kinds, wished = kinds_and_tokens(prune, tokens, unmerge)
    kinds, blocks = kinds_and_blocks(kinds, blocks, sparse, flops)
    asking = Slicing(flops, params, bytes, importance, None)
    zeros, rest = split_request(blocks, sparse, asking, data is not None, freeze, plain=True)
    timing = latency_wish(batch, threads, latency_table, expect_latency, align, latency, latency_ms, zeros)
    goal = None
    if zeros is None or rest.slices or wished is not None:
        goal = Wish(
            budget_or_none(rest.flops, rest.params, rest.bytes, wished, latency, latency_ms),
            rest.importance or default_criterion(data),
            kinds,
            samples,
            "none" if data is None else "auto",
            rounds,
            head_scale,
            members,
            rearrange,
            wished,
            search,
        )
    limits = Limits(align, floor, allow_empty, freeze)
    request = Request(target, None, seed, limits, goal, zeros, timing, samples, held_out, asked)
    with within(memory), resumable(out, on_event), SharedClock(batch, threads) as clock:
        run = _open(request, tell, model, example_inputs, data, clock)
        program = plan_tiles(keep_everything(run) if goal is None else decide(run, goal)).run.program
    return _written(program, out)


def _written(program: Program, out: str | os.PathLike[str] | None) -> Program:
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
    seed: int = 0,
    align: Align = 1,
    batch: int = 1,
    threads: int = 0,
    seconds: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    on_event: OnEvent = warn_only,
) -> Artifact:
    """Slice ``model`` as ``plan`` says: no data, no search, deterministic. An empty plan only lowers and verifies.

    plan    what :func:`plan` or an artefact holds, or the path of a plan.json; it fits every checkpoint of the same
            architecture. Raises PlanError naming the group where it does not, and the line where the plan is a file
    align   refuse counts that are no multiples of it; by default every count goes, and those that the target's kernels
            do not like are named

    Other options as in :func:`compile`.
    """
    asked = by_option("apply", locals())
    chosen = read_plan(plan)
    limits = replace(OF_A_PLAN, align=align)
    request = Request(target, out, seed, limits, latency=_timed(batch, threads, seconds), options=asked)
    with lines_of(chosen):
        return finish(apply_plan(_open(request, Transcript(on_event), model, example_inputs, None), chosen))


def inspect(
    model: Model,
    example_inputs: Inputs = None,
    *,
    freeze: Sequence[str] = (),
    align: Align = None,
    floor: Floor = FLOOR,
    allow_empty: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    trust_pickle: bool = False,
    on_event: OnEvent = warn_only,
) -> Program:
    """Find what can be pruned: the program with its ``axes``, ``groups`` and ``tokens``, frozen ones with the reason.

    Options as in :func:`compile`.
    """
    asked = by_option("inspect", locals())
    request = Request(limits=Limits(align, floor, allow_empty, freeze), options=asked)
    return find_groups(_open(request, Transcript(on_event), model, example_inputs, None), tokens=True).program


# A plan was made under limits of its own: where it is applied, only what would break the model stands in its way.
OF_A_PLAN = Limits(align=1, floor=0.0, allow_empty=True)


def _open(
    request: Request, tell: Transcript, model: Model, inputs: Inputs, data: Any, clock: SharedClock | None = None
) -> Run:
    """The run that begins with the model, opened as the request's options say."""
    asked = request.options
    opened = open_model(
        request, tell, model, inputs, checkpoint=asked["checkpoint"], trust_pickle=asked["trust-pickle"], data=data
    )
    return Run.of(request, opened, tell, clock)


def _no_data_to_recover(recover: str | None) -> OptionError:
    return OptionError(
        "recovery needs data",
        where=f"--recover {recover}",
        why="it fits what stays to what the dense model does on it",
        cure="give --data",
    )


def _timed(batch: int, threads: int, seconds: float | None, table: Any = None) -> LatencyWish:
    """For a run that does not search by time: how its result is timed, and the table to predict it by."""
    return LatencyWish(batch, threads, "" if table is None else str(table), seconds=seconds)


def finish_stated(decided: Decided, stated: StatedPipeline) -> Artifact:
    """The artefact of a pipeline that was run as far as slicing."""
    return finish(decided, stated.after)


def _replay(
    model: Model,
    inputs: Inputs,
    request: Request,
    tell: Transcript,
    pipeline: str,
    data: Any,
    then: Callable[[Decided, StatedPipeline], Made],
) -> Made:
    """What ``then`` makes of the dense program with the plan that the stated passes make."""
    asked = request.options
    stated_alone(asked)
    given = [asked[m] for m in METRICS]
    budget = one_budget(*given) if given != [None] * len(given) else None
    stated = read_pipeline(pipeline, budget, request.seed, asked.get("plan"))
    with within(asked["memory"]), resumable(asked["out"], tell.on_event), lines_of(stated.plan):
        return then(run_stated(_open(request, tell, model, inputs, data), stated), stated)


def write_plan(plan: CompressionPlan, path: Path) -> None:
    """Write ``plan`` as JSON, whole or not at all."""
    write_text(path, plan.to_json())


_BESIDE = {
    "command",
    "model",
    "input",
    "batch",
    "threads",
    "seconds",
    "checkpoint",
    "trust-pickle",
    "data",
    "samples",
    "seed",
    "target",
    "out",
    "pipeline",
    "memory",
    "flops",
    "params",
    "bytes",
    "plan",
    "latency-table",
    "held-out",
}


def stated_alone(asked: Mapping[str, Any]) -> None:
    """Raise OptionError where an option is given that the passes' own options say. asked: values by option"""

    def told(value: Any) -> str:  # as a report's options say it again: floor=0.1 comes as ("0.1",)
        return str(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value)

    usual = {name.replace("_", "-"): p.default for name, p in inspection.signature(compile).parameters.items()}
    for name in sorted(asked.keys() - _BESIDE):
        if told(asked[name]) != told(usual[name]) and asked[name] not in (None, [], (), "1"):
            raise OptionError(
                f"--pipeline and --{name} say the same thing",
                where="--pipeline",
                why="the pipeline states every pass with its own options",
                cure="leave one of them away",
            )
