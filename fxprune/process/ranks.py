"""Several processes on one run (``torchrun --nproc-per-node N -m fxprune compile ...``) that share its long work.

Every rank runs the whole program and reaches the same results; what :func:`run_jobs` does is shared.
Nothing is shared before :func:`start_ranks`: a script with a process group of its own, which calls fxprune on one of
its ranks, must not wait for the others.

Whatever the ranks say to each other begins with one exchange of small packets that names the step and carries failures.
So a rank that fails anywhere is heard by the others at their next step, and none waits for one that is gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import FxpruneError, InternalError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

MEET = timedelta(minutes=5)  # for all ranks to arrive
WAIT = timedelta(hours=2)  # for the slowest job, and for the one rank that lowers and writes
_END = "end of the run"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Ranks:
    """The group that was started: ``own`` when the process group is ours to end, ``left`` once a rank went away."""

    rank: int
    world: int
    group: Any
    gpu: bool  # tensors on a GPU are added up there
    own: bool
    left: bool = False


_ranks: _Ranks | None = None


def rank() -> int:
    """Number of this process among those that share the run, from 0."""
    return _ranks.rank if _ranks is not None else 0


def world() -> int:
    """How many processes share the run."""
    return _ranks.world if _ranks is not None else 1


def mine(count: int) -> list[int]:
    """Which of the jobs 0..count-1 are this rank's: every ``world()``-th one, from ``rank()`` on."""
    return list(range(rank(), count, world()))


def find_launched_rank() -> int | None:
    """This process's rank by the environment that torchrun makes; None without it, and for a lone process."""
    try:
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return number if count > 1 and all(v in os.environ for v in _VARIABLES) else None


def speaks() -> bool:
    """Whether this process writes files and talks to people: one alone, or the first of many."""
    return _ranks.rank == 0 if _ranks is not None else not find_launched_rank()


def start_ranks() -> bool:
    """Meet the other ranks, if there are any: those of torchrun, or of the process group that is there already.

    Returns whether work is shared now. CPU tensors travel by gloo, those on a GPU by nccl where each rank has a GPU of
    its own. Every rank must call it. Raises FxpruneError when the others do not arrive.
    """
    global _ranks
    import torch
    from torch import distributed as dist

    if _ranks is not None:
        return True
    there = dist.is_available() and dist.is_initialized()
    if not there and find_launched_rank() is None:
        return False
    if not dist.is_available():
        raise OptionError(
            "this torch cannot share work over processes",
            where="torch.distributed",
            cure="start fxprune without torchrun",
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    gpu = torch.cuda.is_available() and dist.is_nccl_available() and beside <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        if gpu:
            torch.cuda.set_device(local)
        if not there:
            dist.init_process_group(backend, timeout=MEET)
        group = dist.new_group(backend=backend, timeout=WAIT)  # not the caller's group: their messages never mix
    except (RuntimeError, ValueError) as error:
        raise FxpruneError(
            "the ranks did not find each other",
            why=_first_line(error),
            where="torch.distributed",
            cure="start all of them with torchrun, on hosts that reach MASTER_ADDR",
        ) from error
    if dist.get_world_size() > 1:
        _ranks = _Ranks(dist.get_rank(), dist.get_world_size(), group, gpu, own=not there)
    return _ranks is not None


def stop_ranks() -> None:
    """Share no more. Ends the process group if :func:`start_ranks` made it."""
    global _ranks
    from torch import distributed as dist

    ranks, _ranks = _ranks, None
    if ranks is not None and ranks.own:
        with contextlib.suppress(RuntimeError):  # a rank that went away cannot say goodbye
            dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A run that ends for all ranks alike: started, shared, and left only when every rank is done.

    An error of any rank is raised by all, so that all have the same exit code and the first can tell it. Ctrl-C reaches
    every rank by itself and waits for none.
    """
    start_ranks()
    try:
        try:
            yield
        except Exception as error:
            _leave(error)
            raise
        _leave(None)
    finally:
        stop_ranks()


def _leave(error: Exception | None) -> None:
    if _ranks is None or _ranks.left:
        return
    try:
        exchange(_END, failure=error)
    except LostRank:
        pass  # what was to be done is done, or has failed already
    except Exception:
        if error is None:
            raise


class LostRank(FxpruneError):
    """Another rank of the same run ended or cannot be reached."""


def exchange(
    step: str,
    tensors: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
    failure: Exception | None = None,
) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What every rank said at this step, in rank order: (tensors, about). A barrier.

    step     names the place in the program. Ranks that meet at different steps are a bug, and raise InternalError
    failure  what went wrong here since the last step: raised again here, and with the same words by the other ranks
    """
    from .packets import pack, unpack

    if _ranks is None:
        if failure is not None:
            raise failure
        return [(dict(tensors or {}), dict(about or {}))]
    said = {
        "step": step,
        "about": dict(about or {}),
        "failure": None if failure is None else _describe_failure(failure),
    }
    heard = [unpack(p) for p in _gather(_ranks, pack(tensors or {}, said))]
    steps = [facts["step"] for _, facts in heard]
    _ranks.left = _ranks.left or (_END in steps and step != _END)
    if failure is not None:
        raise failure
    for number, (_, facts) in enumerate(heard):
        if facts["failure"] is not None:
            raise _retold(facts["failure"], number)
    if set(steps) != {step}:
        _ranks.left = True
        raise InternalError(f"the ranks are out of step: {'; '.join(steps)}")
    return [(held, facts["about"]) for held, facts in heard]


def add_up(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum over ranks of each tensor, in float64 (integers in int64), then in its own dtype; as it is when alone.

    All ranks get the same bits. They may differ from those of one process in the last place, for the order of the sum
    differs; ``run_jobs`` keeps even that.
    """
    import torch
    from torch import distributed as dist

    if _ranks is None:
        return dict(tensors)
    shapes = [[n, str(t.dtype), *t.shape] for n, t in tensors.items()]
    exchange(f"add up {shapes}")
    total = {}
    for name, t in tensors.items():
        wide = torch.float64 if t.is_floating_point() else t.dtype if t.is_complex() else torch.int64
        held = t.detach().to(t.device if _ranks.gpu else "cpu", wide, copy=True, memory_format=torch.contiguous_format)
        with _reachable():
            dist.all_reduce(held, group=_ranks.group)
        total[name] = held.to(t.device, t.dtype)
    return total


def agree(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first rank's tensors, on every rank: to go on with the same bits. As they are when alone."""
    if _ranks is None:
        return dict(tensors)
    first = exchange(f"agree on {list(tensors)}", tensors if _ranks.rank == 0 else None)[0][0]
    return {name: first[name].to(t.device) for name, t in tensors.items()}


# ------------------------------------------------------------ bytes and words


def _gather(ranks: _Ranks, packet: bytes) -> list[bytes]:
    """The packets of all ranks, in rank order. torch's own object gathering would unpickle what it receives."""
    import torch
    from torch import distributed as dist

    with _reachable():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
        dist.all_gather(sizes, torch.tensor([len(packet)]), group=ranks.group)
        longest = max(int(s) for s in sizes)
        sent = torch.frombuffer(bytearray(packet) + bytes(longest - len(packet)), dtype=torch.uint8)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(ranks.world)]
        dist.all_gather(found, sent, group=ranks.group)
    return [f[: int(s)].numpy().tobytes() for f, s in zip(found, sizes, strict=True)]


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if _ranks is not None:
            _ranks.left = True
        raise LostRank(
            "another rank ended, or cannot be reached",
            why=_first_line(error),
            cure="see what it said; finished scoring is kept, the same command goes on",
        ) from error


def _describe_failure(failure: Exception) -> dict[str, str]:
    kind = type(failure).__name__
    if isinstance(failure, FxpruneError):
        return {"kind": kind, **{k: str(getattr(failure, k)) for k in ("what", "where", "why", "cure")}}
    if isinstance(failure, InternalError):
        return {"kind": kind, "what": failure.what, "pipeline": failure.pipeline}
    return {"kind": "", "what": f"{kind}: {failure}"}


def _retold(told: Mapping[str, str], number: int) -> Exception:
    kind: type[Exception] = getattr(errors, told["kind"], FxpruneError) if told["kind"] else InternalError
    if issubclass(kind, FxpruneError):
        return kind(told["what"], where=told["where"], why=told["why"], cure=told["cure"])
    text = told["what"] if told["kind"] else f"{told['what']} (rank {number})"
    return InternalError(text, pipeline=told.get("pipeline", ""))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
