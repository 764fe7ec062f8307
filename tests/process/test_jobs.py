"""Long work: the order of results, progress, what an interrupt leaves behind and what the next run takes up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxprune.data.batch import Batch, Calibration
from fxprune.data.fingerprint import fingerprint
from fxprune.errors import FxpruneError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.program import Program
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.analysis.score_groups import ScoreGroups
from fxprune.process import jobs, journal
from fxprune.process.jobs import identify, run_jobs, session
from fxprune.process.journal import Journal
from fxprune.process.packets import pack, unpack

COUNT = 6


class Worker:
    """Jobs that remember who ran, and may stop at one of them."""

    def __init__(self, stop_at: int = -1, error: BaseException | None = None) -> None:
        self.ran: list[int] = []
        self.stop_at, self.error = stop_at, error

    def __call__(self, number: int) -> dict[str, Tensor]:
        if number == self.stop_at and self.error is not None:
            raise self.error
        self.ran.append(number)
        generator = torch.Generator().manual_seed(number)
        return {"a.b/c": torch.randn(3, 2, generator=generator, dtype=torch.float64), "n": torch.tensor(number)}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run's result would go; every finished job is written at once."""
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(journal, "BYTES_PER_SECOND", float("inf"))
    return tmp_path / "small"


def folder_of(out: Path) -> Path:
    return out.parent / f".{out.name}.progress"


def one_run(
    out: Path, worker: Worker, key: str = "key", notes: list[str] | None = None, count: int = COUNT
) -> list[dict[str, Tensor]]:
    told = notes if notes is not None else []
    with session(Journal(out, note=told.append)):
        identify(lambda: key)
        return run_jobs("score", count, worker)


def interrupted(out: Path, at: int, key: str = "key") -> str:
    with pytest.raises(KeyboardInterrupt) as stop:
        one_run(out, Worker(at, KeyboardInterrupt()), key)
    return str(stop.value)


def same(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        for a, b in zip(one, two, strict=True)
    )


# ------------------------------------------------------------ results and progress


def test_results_come_in_the_order_of_the_jobs_with_and_without_a_session(out: Path) -> None:
    plain = run_jobs("score", COUNT, Worker())
    assert [int(r["n"]) for r in plain] == list(range(COUNT))
    assert same(plain, one_run(out, Worker()))
    assert run_jobs("score", 0, Worker()) == []


def test_progress_tells_name_done_and_total() -> None:
    told: list[tuple[str, int, int]] = []
    with session(progress=lambda *event: told.append(event)):
        run_jobs("score", 3, Worker())
        run_jobs("score", 1, Worker())
    assert told == [*(("score", done, 3) for done in range(4)), ("score#2", 0, 1), ("score#2", 1, 1)]


def test_jobs_inside_a_job_belong_to_it() -> None:
    told: list[tuple[str, int, int]] = []
    with session(progress=lambda *event: told.append(event)):
        run_jobs("outer", 1, lambda _: {"sum": torch.stack([r["n"] for r in run_jobs("inner", 3, Worker())]).sum()})
    assert {name for name, _, _ in told} == {"outer"}


# ------------------------------------------------------------ interrupt and resume


def test_an_interrupted_run_goes_on_with_the_rest_and_gives_the_same_bits(out: Path) -> None:
    said = interrupted(out, at=4)
    assert str(folder_of(out)) in said
    assert "the same command goes on" in said
    rest, notes = Worker(), list[str]()
    results = one_run(out, rest, notes=notes)
    assert rest.ran == [4, 5]
    assert notes == ["resumed: 4 of 6 jobs of score were found"]
    assert same(results, run_jobs("score", COUNT, Worker()))
    assert not folder_of(out).exists()


def test_an_interrupt_before_anything_was_finished_leaves_nothing(out: Path) -> None:
    assert interrupted(out, at=0) == ""
    assert list(out.parent.iterdir()) == []


def test_what_was_resumed_counts_as_done_from_the_start(out: Path) -> None:
    interrupted(out, at=4)
    told: list[tuple[str, int, int]] = []
    with session(Journal(out), progress=lambda *event: told.append(event)):
        identify(lambda: "key")
        run_jobs("score", COUNT, Worker())
    assert [done for _, done, _ in told] == [4, 5, 6]


def test_each_call_of_one_name_is_kept_by_itself(out: Path) -> None:
    def both(second: Worker) -> list[dict[str, Tensor]]:
        with session(Journal(out)):
            identify(lambda: "key")
            run_jobs("score", COUNT, first)
            return run_jobs("score", COUNT, second)

    first = Worker()
    with pytest.raises(KeyboardInterrupt):
        both(Worker(2, KeyboardInterrupt()))
    first, second = Worker(), Worker()
    assert same(both(second), run_jobs("score", COUNT, Worker()))
    assert (first.ran, second.ran) == ([], [2, 3, 4, 5])


def test_another_key_or_count_finds_nothing(out: Path) -> None:
    interrupted(out, at=4)
    notes: list[str] = []
    other = Worker()
    with pytest.raises(KeyboardInterrupt):
        one_run(out, Worker(2, KeyboardInterrupt()), "another key", notes)
    assert "discarded" in notes[0]
    one_run(out, other, "another key", count=COUNT + 1)
    assert other.ran == list(range(COUNT + 1))


def test_a_second_interrupt_waits_until_everything_is_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Journal.close

    def again(self: Journal, keep: bool) -> Path | None:
        os.kill(os.getpid(), signal.SIGINT)
        return close(self, keep)

    monkeypatch.setattr(Journal, "close", again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert "the same command goes on" in interrupted(out, at=4)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_short_runs_and_runs_without_a_fingerprint_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 60.0)
    monkeypatch.setattr(Journal, "flush", lambda _: pytest.fail("written"))
    one_run(tmp_path / "small", Worker())
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    with session(Journal(tmp_path / "small")):
        run_jobs("score", COUNT, Worker())


def test_an_error_leaves_only_what_took_long(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Worker(4, FxpruneError("no"))
    with pytest.raises(FxpruneError, match="no"):
        one_run(out, failing)
    assert not folder_of(out).exists()
    monkeypatch.setattr(journal, "WORTH_KEEPING", 0.0)
    with pytest.raises(FxpruneError, match="no"):
        one_run(out, failing)
    rest = Worker()
    one_run(out, rest)
    assert rest.ran == [4, 5]


KILLED = """
import os, signal, sys, torch
from fxprune.process import journal
from fxprune.process.jobs import identify, run_jobs, session
journal.FLUSH_SECONDS, journal.BYTES_PER_SECOND = 0.0, float("inf")

def work(i):
    if i == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"n": torch.tensor(i * 10)}

with session(journal.Journal(sys.argv[1])):
    identify(lambda: "key")
    run_jobs("score", 6, work)
"""


def test_a_killed_process_leaves_what_it_finished_and_no_lock(out: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder_of(out) / ".score.6.000003.part.aside").write_bytes(b"half a file")
    rest = Worker()
    results = one_run(out, rest)
    assert rest.ran == [3, 4, 5]
    assert [int(r["n"]) for r in results] == [0, 10, 20, 3, 4, 5]
    assert not folder_of(out).exists()


# ------------------------------------------------------------ damage, strangers, limits


def cut(packet: bytes) -> bytes:
    return packet[: len(packet) // 2]


def flipped(packet: bytes) -> bytes:
    return packet[:-5] + bytes([packet[-5] ^ 1]) + packet[-4:]


def pickled(_: bytes) -> bytes:
    return b"\x80\x04\x95cposix\nsystem\n."


@pytest.mark.drawn(2)
@pytest.mark.parametrize("damage", [cut, flipped, pickled, lambda _: b""])
def test_damaged_files_are_computed_again(out: Path, damage: Callable[[bytes], bytes]) -> None:
    interrupted(out, at=4)
    part = folder_of(out) / "score.6.000001.part"
    part.write_bytes(damage(part.read_bytes()))
    rest = Worker()
    assert same(one_run(out, rest), run_jobs("score", COUNT, Worker()))
    assert rest.ran == [1, 4, 5]


def test_a_damaged_key_finds_nothing(out: Path) -> None:
    interrupted(out, at=4)
    (folder_of(out) / "key.json").write_text("{")
    rest = Worker()
    one_run(out, rest)
    assert rest.ran == list(range(COUNT))


def test_a_second_process_with_the_same_output_keeps_nothing_and_says_so(out: Path) -> None:
    inner, notes = Worker(), list[str]()
    with session(Journal(out)):
        identify(lambda: "key")
        first = run_jobs("score", COUNT, Worker())
        assert folder_of(out).exists()
        second = one_run(out, inner, notes=notes)
        assert len(list(folder_of(out).glob("*.part"))) == COUNT  # untouched by the other's success
    assert f"process {os.getpid()} is writing" in notes[0]
    assert inner.ran == list(range(COUNT))
    assert same(first, second)


def test_a_folder_with_strangers_in_it_is_left_alone(out: Path) -> None:
    folder_of(out).mkdir()
    (folder_of(out) / "thesis.tex").write_text("mine")
    notes: list[str] = []
    one_run(out, Worker(), notes=notes)
    assert "did not write" in notes[0]
    assert [p.name for p in folder_of(out).iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    (tmp_path / "file").write_text("")
    notes: list[str] = []
    assert len(one_run(tmp_path / "file" / "small", Worker(), notes=notes)) == COUNT
    assert len(notes) == 1
    assert "cannot be resumed" in notes[0]


def test_the_folder_has_a_largest_size(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 1000)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        one_run(out, Worker(5, KeyboardInterrupt()), notes=notes)
    assert len(notes) == 1
    assert "interrupted run repeats it" in notes[0]
    parts = list(folder_of(out).glob("*.part"))
    assert 0 < sum(p.stat().st_size for p in parts) <= 1000
    rest = Worker()
    one_run(out, rest)
    assert rest.ran == list(range(len(parts), COUNT))


def test_what_is_computed_as_fast_as_written_is_not_kept(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Journal(out)
    monkeypatch.setattr(journal, "BYTES_PER_SECOND", 1000.0)
    kept.open("key")
    for number, seconds in enumerate((0.1, 10.0)):
        kept.add("score", COUNT, number, {"a": torch.zeros(100)}, seconds)
    assert [p.name for p in folder_of(out).glob("*.part")] == ["score.6.000001.part"]
    kept.close(keep=False)
    assert not folder_of(out).exists()


def test_packets_come_back_bit_for_bit() -> None:
    strange = torch.tensor([float("nan"), -0.0, float("inf")])
    tensors = {
        "a": strange,
        "b": torch.ones(2, 3).T,
        "c": torch.tensor(True),
        "d": torch.zeros(0, 4),
        "e": torch.arange(3).to(torch.bfloat16),
        "f": strange,
    }
    found, about = unpack(pack(tensors, {"n": 1, "text": "é"}))
    assert about == {"n": 1, "text": "é"}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(found["a"][1])


# ------------------------------------------------------------ what makes two runs the same


class Block(nn.Module):
    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)) * self.scale)


def program_of(model: nn.Module) -> Program:
    program = capture(model.eval(), (torch.zeros(2, 6),))
    return Pipeline((PropagateAxes(), FindGroups(align=1))).run(program)


def block(scale: float = 2.0) -> Block:
    torch.manual_seed(0)
    return Block(scale)


def data(batches: int = 4) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    return Calibration(tuple(Batch((torch.randn(4, 6, generator=generator),)) for _ in range(batches)), "test")


def test_the_fingerprint_depends_on_everything_that_scores_depend_on() -> None:
    here = fingerprint(program_of(block()), data(), 0, ["fisher{probes=2}"])
    assert here == fingerprint(program_of(block()), data(), 0, ["fisher{probes=2}"])
    weights, samples = block(), data()
    with torch.no_grad():
        weights.two.weight[1, 2] = torch.nextafter(weights.two.weight[1, 2], torch.tensor(9.0))
    samples.batches[3].args[0][0, 0] += 1e-6
    labelled = Calibration(tuple(replace(b, labels=torch.zeros(4, dtype=torch.long)) for b in data().batches), "test")
    frozen = Pipeline((FindGroups(align=1, freeze=("one*",)),), start=("axes",)).run(program_of(block()))
    others = [
        fingerprint(program_of(weights), data(), 0, ["fisher{probes=2}"]),
        fingerprint(program_of(block(2.0000001)), data(), 0, ["fisher{probes=2}"]),  # one constant in the graph
        fingerprint(program_of(block()), samples, 0, ["fisher{probes=2}"]),
        fingerprint(program_of(block()), data(3), 0, ["fisher{probes=2}"]),
        fingerprint(program_of(block()), labelled, 0, ["fisher{probes=2}"]),
        fingerprint(program_of(block()), None, 0, ["fisher{probes=2}"]),
        fingerprint(program_of(block()), data(), 1, ["fisher{probes=2}"]),
        fingerprint(program_of(block()), data(), 0, ["fisher{probes=4}"]),
        fingerprint(frozen, data(), 0, ["fisher{probes=2}"]),
    ]
    assert len({here, *others}) == 1 + len(others)


# ------------------------------------------------------------ criteria


def test_the_passes_over_batches_are_jobs(out: Path) -> None:
    program, names = program_of(block()), []
    for name in ("fisher", "taylor", "activation"):
        with session(progress=lambda n, done, total: names.append((n, done, total))):
            ScoreGroups(name, data=data()).run(program)
    assert [n for n in names if n[1] == n[2]] == [(n, 4, 4) for n in ("fisher", "taylor", "activation")]


@pytest.mark.drawn(1)
@pytest.mark.parametrize("name", ["fisher", "taylor", "activation"])
def test_a_resumed_criterion_gives_the_same_scores_bit_for_bit(
    name: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, calibration = program_of(block()), data()
    whole = ScoreGroups(name, data=calibration).run(program).need("scores")
    flatten, calls = Program.flatten, []

    def counted(self: Program, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return flatten(self, *arguments)  # type: ignore[arg-type]

    def score() -> dict[str, Tensor]:
        calls.clear()
        with session(Journal(out)):
            identify(lambda: fingerprint(program, calibration, 0, [name]))
            found = ScoreGroups(name, data=calibration).run(program).need("scores")
        return {k: s.values for k, s in found.items()}

    monkeypatch.setattr(Program, "flatten", counted)
    limit = -1
    score()
    limit = len(calls)  # the last batch
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        score()
    limit = -1
    resumed = score()
    assert len(calls) < 8
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[k], whole[k].values) for k in whole)
    assert not folder_of(out).exists()


def test_nothing_is_left_in_the_module_after_a_session(out: Path) -> None:
    one_run(out, Worker())
    assert jobs._session.get() is None
