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


def test_the_exit_code_is_that_of_the_work() -> None:
    done = run("print('begun', flush=True)\ndef work():\n    print('done')\n    return 3\nsys.exit(supervise(work))")
    assert (done.returncode, done.stdout, done.stderr) == (3, "begun\ndone\n", "")


DIES = """
def crash(*_):
    ctypes.string_at(0)
def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)
for entry.main in (crash, be_killed):
    print(entry.start(), flush=True)
"""


def test_a_crash_of_native_code_and_the_systems_end_of_the_process_are_told() -> None:
    done = run(DIES)
    assert done.stdout == "5\n5\n"
    crashed, killed = done.stderr.split("ProcessDied: ")[1:]
    what, where, why, cure = crashed.splitlines()
    assert what == "the process crashed"
    assert "in string_at <- " in where
    assert "in crash" in where
    assert "SIGSEGV" in why
    assert "cure" in cure
    assert killed.startswith("the system ended the process\n")
    assert "SIGKILL" in killed
    assert "--memory" in killed


WAITS = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
def work():
    try:
        print(os.getpid(), flush=True)
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
