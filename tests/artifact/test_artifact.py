"""Artifacts: whole or absent, exact when read back, trainable, and never code."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.artifact import artifact
from fxprune.artifact.artifact import Artifact, build_report, load
from fxprune.artifact.module import module_of
from fxprune.errors import FxpruneError, LoadError, OptionError, VerifyError
from fxprune.intake import archive
from fxprune.intake.capture import capture
from fxprune.ir.cost import Cost
from fxprune.ir.plan import Choice, CompressionPlan
from fxprune.ir.program import Program
from fxprune.process import files

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution, batch norm, a root parameter, a persistent and a hidden buffer, a constant made on the fly."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.register_buffer("hidden", torch.rand(8), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x)).relu().mean((2, 3)) * self.scale + self.token + self.hidden
        return {"logits": self.head(y) + torch.arange(5)}


def new() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (X[:2],), name="net")


@pytest.fixture(scope="module")
def program() -> Program:
    """Shared by the tests that leave its weights alone."""
    return new()


def make(program: Program, **more: Any) -> Artifact:
    plan = CompressionPlan({"conv.weight[0]:channel": Choice("channel", 10, tuple(range(8)))})
    report = build_report(
        program,
        name="net",
        target="eager",
        dense=Cost(200, 100, 400),
        compressed=Cost(100, 80, 320),
        plan=plan,
        notes=["a note"],
        **more,
    )
    return Artifact(program, plan, report)


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    return make(program).save(tmp_path / "out")


def want(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        return program.exported.module()(x)["logits"]


# ---------------------------------------------------------------- writing and reading


def test_saved_and_loaded_equal_bit_for_bit_at_any_batch(program: Program, saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["model.pt2", "plan.json", "report.html", "report.json"]
    for module in (load(saved), load(saved / "model.pt2"), Artifact.read(saved).module):
        for batch in (1, 2, 4):
            torch.testing.assert_close(module(X[:batch])["logits"], want(program, X[:batch]), rtol=0, atol=0)


def test_the_report_states_what_the_documentation_promises(saved: Path) -> None:
    report = json.loads((saved / "report.json").read_text())
    promised = {k for line in (build_report.__doc__ or "").splitlines() for k in line[:20].replace(",", "").split()}
    assert set(report) <= promised | set((build_report.__doc__ or "").replace(",", " ").split())
    assert report["cost"]["ratio"] == {"flops": 0.5, "params": 0.8, "bytes": 0.8}
    assert report["pruned"] == [{"group": "conv.weight[0]:channel", "kind": "channel", "size": 10, "kept": 8}]
    assert report["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert report["outputs"] == ["logits"]
    assert report["notes"] == ["a note"]
    assert report["payload"] == "model.pt2"
    assert report["parity"]["max_abs"] == 0
    assert {"batch": 1} in report["parity"]["tried"]
    assert report["files"]["model.pt2"]["size_bytes"] == (saved / "model.pt2").stat().st_size
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in report["versions"]["torch"]


def test_read_gives_back_plan_and_report(saved: Path) -> None:
    again = Artifact.read(saved)
    assert again.plan.choices["conv.weight[0]:channel"].keep == tuple(range(8))
    assert again.report["name"] == again.program.name == "net"
    assert again.target == "eager"


def test_the_file_reloads_where_only_torch_can_be_imported(program: Program, saved: Path) -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(['fxprune', 'timm', 'transformers', 'torchvision', 'onnx']))
import torch
x = torch.load(sys.argv[2], weights_only=True)
torch.save(torch.export.load(sys.argv[1]).module()(x)['logits'].detach(), sys.argv[2])
"""
    exchange = saved.parent / "x.pt"
    torch.save(X, exchange)
    subprocess.run(
        [sys.executable, "-c", code, str(saved / "model.pt2"), str(exchange)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    torch.testing.assert_close(torch.load(exchange, weights_only=True), want(program, X))


def test_saving_twice_writes_the_same_bytes(program: Program, tmp_path: Path) -> None:
    one, two = make(program).save(tmp_path / "a"), make(program).save(tmp_path / "b")
    assert all((one / p.name).read_bytes() == p.read_bytes() for p in two.iterdir())


# ---------------------------------------------------------------- the module


def test_the_module_trains_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    one = make(new())
    module, target = one.module, torch.tensor([0, 1, 2, 3])
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(module(X)["logits"], target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    module.eval()
    torch.testing.assert_close(load(one.save(tmp_path / "out"))(X), module(X), rtol=0, atol=0)


def test_a_replaced_parameter_is_saved_too(program: Program, tmp_path: Path) -> None:
    one = make(program)
    one.module.head.bias = nn.Parameter(one.module.head.bias.detach() + 1)
    torch.testing.assert_close(load(one.save(tmp_path / "out"))(X)["logits"], want(program, X) + 1)


def test_train_keeps_the_evaluation_form() -> None:
    module = module_of(new().exported)
    before, running = module(X)["logits"], module.norm.running_mean.clone()
    assert module.train().training
    assert module.head.training
    torch.testing.assert_close(module(X)["logits"], before, rtol=0, atol=0)
    assert torch.equal(module.norm.running_mean, running)
    assert not module.eval().training


def test_the_state_dict_has_the_original_names(program: Program) -> None:
    module, other = module_of(program.exported), Net()
    assert set(module.state_dict()) == set(other.state_dict())
    other.load_state_dict(module.state_dict())
    assert {n for n, _ in module.named_buffers()} == {n for n, _ in other.named_buffers()}


def test_a_deep_copy_is_independent(program: Program) -> None:
    module = module_of(program.exported)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.head.bias += 1
    torch.testing.assert_close(twin(X)["logits"] - 1, module(X)["logits"])


def test_moving_the_module_moves_the_constants_of_the_graph() -> None:
    module = module_of(new().exported).to("meta")
    assert module(X.to("meta"))["logits"].device.type == "meta"
    assert not any("cpu" in str(n.kwargs.get("device")) for n in module.graph.nodes)


def test_a_wrong_shape_names_the_input(program: Program) -> None:
    with pytest.raises(AssertionError, match="x"):
        module_of(program.exported)(torch.randn(2, 4, 8, 8))


# ---------------------------------------------------------------- nothing half


def unchanged(directory: Path, before: dict[str, bytes]) -> bool:
    """The old artefact is whole and nothing lies beside it."""
    now = {p.name: p.read_bytes() for p in directory.iterdir()}
    return now == before and [p.name for p in directory.parent.iterdir()] == [directory.name]


@pytest.fixture
def old(saved: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in saved.iterdir()}


class _FullDisk:
    """A disk that is full after ``room`` bytes of the weights."""

    def __init__(self, file: Any, room: int, error: BaseException) -> None:
        self.file, self.room, self.error = file, room, error

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return int(self.file.write(data))


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_a_full_disk_is_an_error_with_a_cure_and_leaves_the_old_one(
    program: Program, saved: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    writer = archive._Writer
    monkeypatch.setattr(archive, "_Writer", lambda file: writer(_FullDisk(file, room, full)))  # type: ignore[arg-type]
    with pytest.raises(FxpruneError) as caught:
        make(program).save(saved)
    assert str(saved) in caught.value.where
    assert "No space left" in caught.value.why
    assert "--out" in caught.value.cure
    assert caught.value.exit_code == 2
    assert unchanged(saved, old)


def test_ctrl_c_inside_torch_leaves_the_old_one(
    program: Program, saved: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = archive._Writer
    monkeypatch.setattr(archive, "_Writer", lambda file: writer(_FullDisk(file, 800, KeyboardInterrupt())))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        make(program).save(saved)
    assert unchanged(saved, old)


def test_a_failed_verification_leaves_the_old_one(
    program: Program, saved: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(program)
    backend = type(one.backend)
    read_back = backend.load
    monkeypatch.setattr(backend, "load", lambda self, path: lambda flat: [o + 0.1 for o in read_back(self, path)(flat)])
    with pytest.raises(VerifyError, match=r"output 'logits' \[2, 5\], at batch=2") as caught:
        one.save(saved)
    assert "tolerance 1e-04" in str(caught.value)
    assert "at index" in str(caught.value)
    assert unchanged(saved, old)


def test_killed_in_the_middle_the_old_one_still_loads(saved: Path, old: dict[str, bytes]) -> None:
    code = """
import os, sys
from fxprune.artifact.artifact import Artifact
from fxprune import artifact
one = Artifact.read(sys.argv[1])
artifact._fingerprint = lambda path: os._exit(9)
one.save(sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 9
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old
    assert load(saved)(X)["logits"].shape == (4, 5)


def test_writers_of_one_place_never_mix(tmp_path: Path) -> None:
    place = tmp_path / "out"

    def write(word: str) -> None:
        for _ in range(20):
            with files.publish(place) as directory:
                for name in "abc":
                    (directory / name).write_text(word)

    threads = [threading.Thread(target=write, args=(w,)) for w in ("one", "two", "three")]
    for t in threads:
        t.start()
    seen = 0
    while any(t.is_alive() for t in threads):
        if place.exists():
            handle = os.open(place, os.O_RDONLY)  # one directory, whichever it is, is whole
            names = os.listdir(handle)
            os.close(handle)
            seen += sorted(names) == ["a", "b", "c"]
    for t in threads:
        t.join()
    assert seen
    assert len({(place / n).read_text() for n in "abc"}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_atomic_exchange_a_failure_puts_the_old_one_back(
    saved: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    with files.publish(saved) as directory:
        for name, data in old.items():
            (directory / name).write_bytes(data)
    assert unchanged(saved, old)
    rename = os.rename

    def refuse_the_new_one(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with pytest.raises(FxpruneError, match="cannot be written"), files.publish(saved) as directory:
        (directory / "new").touch()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == old


# ---------------------------------------------------------------- where it may be written


def test_a_directory_of_the_users_is_never_overwritten(program: Program, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="holds no artefact"):
        make(program).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_files_beside_an_artefact_are_not_lost(program: Program, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"notes\.txt"):
        make(program).save(saved)


def test_a_file_in_the_way_and_overwrite_false(program: Program, saved: Path) -> None:
    with pytest.raises(OptionError, match="a file lies there"):
        make(program).save(saved / "report.json")
    with pytest.raises(OptionError, match="exists already"):
        make(program).save(saved, overwrite=False)


def test_a_place_that_cannot_be_written(program: Program, saved: Path) -> None:
    with pytest.raises(FxpruneError, match="cannot be written") as caught:
        make(program).save(saved / "report.json" / "deeper")
    assert "--out" in caught.value.cure


# ---------------------------------------------------------------- bad input


def test_a_tampered_file_is_refused(saved: Path) -> None:
    data = bytearray((saved / "model.pt2").read_bytes())
    data[len(data) // 3] ^= 1
    (saved / "model.pt2").write_bytes(data)
    with pytest.raises(LoadError, match="SHA-256 differs"):
        load(saved)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    data = (saved / "model.pt2").read_bytes()
    short = data[: int(keep * len(data)) if keep < 1 else int(keep)]
    (saved / "model.pt2").write_bytes(short)
    with pytest.raises(LoadError, match="truncated or replaced"):
        load(saved)
    with pytest.raises(LoadError, match=r"damaged or not a \.pt2|malformed"):
        load(saved / "model.pt2")


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("", "damaged"),
        ("[" * 100_000, "damaged"),
        ("{}", "not an artefact"),
        ("[1]", "not an artefact"),
        ('{"fxprune_report": 99}', "another version"),
        ('{"fxprune_report": 1, "files": 3}', "malformed"),
        ('{"fxprune_report": 1, "target": "eager", "files": {"../../etc/passwd": {}}}', "not a plain file name"),
        ('{"fxprune_report": 1, "target": "eager", "files": {"/etc/passwd": {}}}', "not a plain file name"),
        ('{"fxprune_report": 1, "target": "eager", "files": {"model.pt2": {"sha256": 1}}}', "malformed"),
        ('{"fxprune_report": 1, "target": "eager", "files": {}}', "does not know this file"),
    ],
)
def test_a_bad_report_is_refused(saved: Path, report: str, said: str) -> None:
    (saved / "report.json").write_text(report)
    with pytest.raises(LoadError, match=said):
        load(saved)


def test_a_report_beyond_the_limit_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "MAX_REPORT", 10)
    with pytest.raises(LoadError, match="too large"):
        load(saved)


def test_places_that_hold_no_artefact(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(LoadError, match=r"no 'archive_format'|no such file"):
        load(tmp_path / "missing")
    with pytest.raises(LoadError, match="not an artefact"):
        load(tmp_path)
    (saved / "model.pt2").unlink()
    with pytest.raises(LoadError, match="missing"):
        load(saved)
    other = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, other)
    with pytest.raises(LoadError, match=r"not a \.pt2 program"):
        load(other)
