"""Run a command in a child process, so that a crash of native code ends in words instead of a signal.

A model or a file that kills the process (a segmentation fault in a library, the system's out-of-memory killer) takes
nobody with it but the child; the parent is small, and says what happened.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from ..errors import ProcessDied

_PR_SET_PDEATHSIG = 1  # of prctl(2)
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ()
_HEARD = (*_STOPS, signal.SIGCHLD) if os.name == "posix" else ()
INTERRUPTED = 130  # exit code
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_MEMORY_CURE = (
    "out of memory most likely: fewer `--samples`, a limit by `--memory`, a smaller batch, or a larger machine"
)
_CRASH_CURE = (
    "native code crashed there: save a plain nn.Module without compiled or scripted parts, or a .pt2, or update that "
    "library"
)


def can_supervise() -> bool:
    """Whether this system tells a parent who sent a signal (Linux does), and nobody else started several processes."""
    return hasattr(os, "fork") and hasattr(signal, "sigwaitinfo") and "LOCAL_RANK" not in os.environ


def supervise(work: Callable[[], int]) -> int:
    """The exit code of ``work``, run in a child process; where the system cannot, ``work`` is run here.

    Raises ProcessDied where the child ends by a signal, with the innermost lines of Python it was in. Signals that
    somebody sends to this process are handed on; those of the terminal reach both anyway.
    """
    if not can_supervise():
        return work()
    with tempfile.TemporaryFile() as trace:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            faulthandler.enable(trace)
            code = work()
            faulthandler.disable()
            return code
        try:
            status = _wait(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
        if os.WTERMSIG(status) in _STOPS:  # before the work could hear it
            return INTERRUPTED
        raise _death(os.WTERMSIG(status), trace)


def _wait(child: int) -> int:
    """Wait for the child to end, and hand on what other processes (not the terminal) signal to this one."""
    while True:
        heard = signal.sigwaitinfo(_HEARD)
        if heard.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif heard.si_pid:  # sent by a process: the terminal's own come from the kernel, to the child as well
            with suppress(ProcessLookupError):
                os.kill(child, heard.si_signo)


def _die_with(parent: int) -> None:
    """End like an interrupted run when the parent is killed, for nobody would hear the result."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGTERM)


def _death(number: int, trace: IO[bytes]) -> ProcessDied:
    trace.seek(0)
    lines = _current_thread(trace.read(2**20).decode(errors="replace"))
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    killed = number == signal.SIGKILL
    return ProcessDied(
        "the system ended the process" if killed else "the process crashed",
        where=" <- ".join(lines[:1] + [line for line in lines[1:] if not _is_library(line)][:2]),
        why=name + (", which nothing inside the process sends" if killed else ""),
        cure=_MEMORY_CURE if killed else _CRASH_CURE,
    )


def _current_thread(said: str) -> Sequence[str]:
    """``file.py:3 in forward`` of the crashed thread's frames, innermost first, as faulthandler wrote them.

    >>> _current_thread('Current thread 0x1 (most recent call first):\\n  File "a.py", line 3 in f')
    ['a.py:3 in f']
    """
    _, _, current = said.partition("Current thread ")
    return [f"{file}:{line} in {name}" for file, line, name in _FRAME.findall(current.partition("\n\n")[0])]


def _is_library(line: str) -> bool:
    return "site-packages" in line or f"{os.sep}fxprune{os.sep}" in line
