"""A command in a child process: its exit code is handed on, a crash becomes words, a signal reaches the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from fxprune.process.supervise import can_supervise

pytestmark = pytest.mark.skipif(not can_supervise(), reason="this system does not tell who sent a signal")

HEAD = """
import ctypes, os, signal, sys, time
import fxprune.cli.entry as entry
from fxprune.process.supervise import supervise
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("code", [0, 2, 70])
def test_the_exit_code_is_that_of_the_work(code: int) -> None:
    done = run(
        f"print('begun', flush=True)\ndef work():\n    print('done')\n    return {code}\nsys.exit(supervise(work))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "begun\ndone\n", "")


def test_a_crash_of_native_code_is_told_with_the_line_that_crashed() -> None:
    done = run("def forward(*_):\n    ctypes.string_at(0)\nentry.main = forward\nsys.exit(entry.start())")
    assert done.returncode == 5
    lines = done.stderr.splitlines()
    assert lines[0] == "ProcessDied: the process crashed"
    assert "in string_at" in lines[1] and "in forward" in lines[1]
    assert "SIGSEGV" in lines[2]
    assert lines[3].strip().startswith("cure")


def test_a_process_that_the_system_kills_is_told_to_take_less() -> None:
    done = run("entry.main = lambda: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(entry.start())")
    assert done.returncode == 5
    assert "ended the process" in done.stderr and "SIGKILL" in done.stderr and "--memory" in done.stderr


WAITS = """
def work():
    print(os.getpid(), flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    return 0
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
sys.exit(supervise(work))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sent_to_the_command_reaches_the_work_once(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", HEAD + WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) != process.pid
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "interrupted\n")


def test_the_work_ends_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HEAD + WAITS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        assert process.stdout.readline() == "interrupted\n"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")
