"""The pre-deploy step: gates that can fail, a manifest that can be trusted, a delivery that proves itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune import registry
from fxprune.artifact.gates import Limits
from fxprune.artifact.manifest import EVIDENCE, MANIFEST, fingerprints, read_manifest, seal, write_manifest
from fxprune.backends.eager.backend import EagerBackend
from fxprune.cli.entry import main
from fxprune.errors import LoadError, MissingDevice, OptionError, PlanError
from fxprune.ir.program import Program
from fxprune.process.events import FxpruneWarning
from fxprune.target.backend import Lowered, Runner
from fxprune.workflows import export
from fxprune.workflows.verify import verify

X = torch.randn(70, 8, generator=torch.Generator().manual_seed(3))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt, plan.json, labelled.npz (labels are what the dense model says) and bare.npz."""
    folder, dense = tmp_path_factory.mktemp("release"), model()
    torch.save(dense, folder / "model.pt")
    fxprune.plan(dense, X[:4], flops=0.7, importance="l2", out=folder / "plan.json")
    with torch.no_grad():
        labels = dense(X).argmax(-1)
    np.savez(folder / "labelled.npz", x=X.numpy(), labels=labels.numpy())
    np.savez(folder / "bare.npz", x=X.numpy())
    return folder


@pytest.fixture(scope="module")
def delivered(made: Path) -> Path:
    """A delivery that passed, to be copied."""
    result = export.export(
        made / "model.pt",
        made / "plan.json",
        targets=["eager"],
        out=made / "delivered",
        verify=made / "labelled.npz",
        limits=Limits(max_drop=0.5, max_latency_ms=1e4),
        seconds=0.05,
    )
    assert result["status"] == "passed"
    return made / "delivered"


@pytest.fixture
def delivery(delivered: Path, tmp_path: Path) -> Path:
    return shutil.copytree(delivered, tmp_path / "delivery")


def run(made: Path, out: Path, *argv: str, target: str = "eager", data: str = "labelled.npz") -> int:
    return main(
        [
            "export",
            str(made / "model.pt"),
            "--plan",
            str(made / "plan.json"),
            "--target",
            target,
            "--verify",
            str(made / data),
            "--out",
            str(out),
            "--seconds",
            "0.05",
            "-q",
            *argv,
        ]
    )


def gates(manifest: dict[str, Any], folder: str = "eager") -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in manifest["targets"][folder]["gates"]}


# ------------------------------------------------------------ export


def test_the_manifest_says_what_was_measured_and_of_what(delivered: Path, made: Path) -> None:
    manifest = read_manifest(delivered)
    found = gates(manifest)
    assert set(found) == {"parity", "data-parity", "drop", "latency"}
    assert manifest["metric"] | {"sha256": ""} == {
        "name": "top1",
        "output": "output",
        "dense": 1.0,
        "samples": 70,
        "sha256": "",
    }
    small = fxprune.load(delivered / "eager")
    with torch.no_grad():
        agree = (small(X).argmax(-1) == model()(X).argmax(-1)).double().mean()
    assert found["drop"]["measured"] == pytest.approx(1 - float(agree))
    assert found["drop"]["measured"] > 0  # this plan costs something, so the gate can fail
    assert manifest["files"] == fingerprints(delivered)
    assert manifest["inputs"]["model"]["origin"] == "model.pt"
    assert str(made) not in json.dumps(manifest)
    assert manifest["cost"]["ratio"]["flops"] <= 0.7


def test_every_gate_can_fail_and_the_exit_code_says_so(made: Path, tmp_path: Path) -> None:
    for limit, name in (("--max-drop", "drop"), ("--max-latency-ms", "latency")):
        out = tmp_path / name
        assert run(made, out, limit, "0", "--junit", str(tmp_path / "junit.xml")) == 3
        manifest = read_manifest(out)
        assert manifest["status"] == "failed"
        assert gates(manifest)[name]["status"] == "failed"
        suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
        assert suite.get("failures") == "1"
        assert main(["verify", str(out), "-q", "--seconds", "0.05"]) == 3
    assert main(["verify", str(tmp_path / "latency"), "-q", "--skip-latency"]) == 3  # it was never signed off


def test_without_labels_the_dense_model_is_the_reference(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "a", "--max-drop", "0.5", "--max-kl", "10", data="bare.npz") == 0
    manifest = read_manifest(tmp_path / "a")
    found = gates(manifest)
    assert manifest["metric"]["name"] == "agreement"
    assert found["drop"]["measured"] == pytest.approx(gates(read_manifest(made / "delivered"))["drop"]["measured"])
    assert found["kl"]["measured"] > 0
    again = verify(tmp_path / "a")
    assert gates(again)["kl"]["measured"] == pytest.approx(found["kl"]["measured"])
    assert run(made, tmp_path / "b", "--max-kl", "1e-9", data="bare.npz") == 3
    assert run(made, tmp_path / "c", "--max-kl", "10") == 3  # with labels there is none to measure


def test_the_same_request_changes_nothing_and_another_one_does(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, "--max-drop", "0.5") == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    assert run(made, out, "--max-drop", "0.5") == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()} == before
    first = read_manifest(out)
    assert run(made, out, "--max-drop", "0.5", "--force") == 0
    forced = read_manifest(out)
    assert set(first["files"]) == set(forced["files"])
    changed = {n for n in first["files"] if first["files"][n] != forced["files"][n]}
    assert changed <= {"eager/report.json", "eager/report.html"}  # with the seconds of passes, in the page rounded
    assert forced["request"] == first["request"]
    assert run(made, out, "--max-drop", "0.4") == 0
    assert read_manifest(out)["request"]["sha256"] != first["request"]["sha256"]
    (out / "eager" / "plan.json").write_text("{}")  # damage is repaired, not believed
    assert run(made, out, "--max-drop", "0.4") == 0
    assert verify(out)["status"] == "passed"


def test_onnx_and_eager_in_one_delivery(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "out", "--max-drop", "0.5", target="onnx,eager") == 0
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest["targets"]) == {"onnx", "eager"}
    assert manifest["targets"]["onnx"]["payload"] == "model.onnx"
    assert gates(manifest, "onnx")["data-parity"]["measured"] < 1e-4
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0


@dataclass(frozen=True)
class NoDevice(EagerBackend):
    """A target whose device this machine lacks: some lower what they can and then say so."""

    name: ClassVar[str] = "nodevice"

    def lower(self, program: Program, directory: Path) -> Lowered:
        raise MissingDevice("there is no such device", why="this machine has none", cure="finish it there")


@dataclass(frozen=True)
class Wrong(EagerBackend):
    """A target that computes something else: on seeded inputs of the parity check, or on the data alone."""

    name: ClassVar[str] = "wrong"
    from_batch: int = 1

    def load(self, payload: Path) -> Runner:
        right = super().load(payload)
        return lambda flat: [t + (0.5 if len(flat[0]) >= self.from_batch else 0) for t in right(flat)]


@pytest.fixture
def odd_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (NoDevice, Wrong):
        monkeypatch.setitem(registry.BACKENDS, one.name, f"{__name__}:{one.__name__}")


@pytest.mark.usefixtures("odd_targets")
def test_a_target_that_lacks_its_device_is_unfinished_and_never_passed(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, "--max-drop", "0.5", target="eager,nodevice") == 4
    manifest = read_manifest(out)
    assert [manifest["targets"][t]["status"] for t in ("eager", "nodevice")] == ["passed", "unfinished"]
    assert manifest["status"] == "unfinished"
    assert "this machine has none" in gates(manifest, "nodevice")["target"]["why"]
    assert main(["verify", str(out), "-q"]) == 4
    assert run(made, out, "--max-drop", "0", target="eager,nodevice") == 3  # a failure outweighs it
    before = read_manifest(out)
    assert run(made, out, "--max-drop", "0", target="eager,nodevice") == 3  # and is tried again each time
    assert read_manifest(out)["status"] == before["status"]


@pytest.mark.usefixtures("odd_targets")
def test_a_payload_that_computes_something_else_is_not_delivered(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "a", target="wrong") == 3
    manifest = read_manifest(tmp_path / "a")
    assert gates(manifest, "wrong")["parity"]["status"] == "failed"
    assert set(manifest["files"]) == {EVIDENCE}
    assert run(made, tmp_path / "b", "--max-drop", "0.5", target="wrong{from-batch=20}") == 3  # only on the data
    found = gates(read_manifest(tmp_path / "b"), "wrong-from-batch-20")
    assert (found["parity"]["status"], found["data-parity"]["status"], found["drop"]["status"]) == (
        "passed",
        "failed",
        "unfinished",
    )


def test_recovery_on_calibration_data_is_part_of_the_request(made: Path, tmp_path: Path) -> None:
    plain = gates(read_manifest(made / "delivered"))["drop"]["measured"]
    assert run(made, tmp_path / "out", "--max-drop", "0.5", "--recover", "ridge", "--data", str(made / "bare.npz")) == 0
    manifest = read_manifest(tmp_path / "out")
    assert gates(manifest)["drop"]["measured"] < plain
    assert manifest["inputs"]["calibration"]["origin"] == "bare.npz"
    assert manifest["request"]["recover"] == "ridge"
    assert run(made, tmp_path / "two", "--recover", "ridge") == 2
    assert not (tmp_path / "two").exists()


def test_what_is_wrong_with_the_request_leaves_nothing(made: Path, tmp_path: Path) -> None:
    out, common = tmp_path / "out", {"targets": ["eager"], "verify": made / "labelled.npz"}
    other = fxprune.CompressionPlan({"7:ffn": fxprune.Choice("ffn", 8, (1, 2))})
    for plan, options, kind in (
        (other, {}, PlanError),
        (made / "nowhere.json", {}, PlanError),
        (made / "plan.json", {"targets": ["eager", "onyx"]}, OptionError),
        (made / "plan.json", {"targets": ["eager", "eager"]}, OptionError),
        (made / "plan.json", {"targets": []}, OptionError),
        (made / "plan.json", {"metric": "miou"}, OptionError),
        (made / "plan.json", {"verify": made / "nowhere.npz"}, LoadError),
    ):
        with pytest.raises(kind):
            export.export(made / "model.pt", plan, out=out, **{**common, **options})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="left alone"):
        export.export(made / "model.pt", made / "plan.json", out=out, **common)  # type: ignore[arg-type]
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------ verify


def test_a_delivery_proves_itself_without_the_model(
    delivery: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["verify", str(delivery), "--json", "-q", "--seconds", "0.05", "--junit", str(tmp_path / "j.xml")]) == 0
    found = gates(json.loads(capsys.readouterr().out))
    assert {n for n, g in found.items() if g["status"] == "passed"} == {
        "files",
        "sign-off",
        "parity",
        "data-parity",
        "drop",
        "latency",
    }
    assert found["drop"]["measured"] == gates(read_manifest(delivery))["drop"]["measured"]
    assert ET.parse(tmp_path / "j.xml").getroot()[0].get("tests") == "6"
    assert main(["verify", str(delivery), "-q", "--skip-latency"]) == 0


def _swap_payload(folder: Path) -> None:
    """Another model under the same names, every hash made right: only measuring can tell."""
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4)).eval()
    shutil.rmtree(folder / "eager")
    fxprune.apply(other, fxprune.CompressionPlan(), X[:4], out=folder / "eager")
    manifest = read_manifest(folder)
    write_manifest(
        seal(
            {k: v for k, v in manifest.items() if k not in ("fxprune_manifest", "seal")}
            | {"files": fingerprints(folder)}
        ),
        folder,
    )


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a changed payload": (lambda d: (d / "eager/model.pt2").write_bytes(b"x"), "files"),
    "a missing file": (lambda d: (d / EVIDENCE).unlink(), "files"),
    "a foreign file": (lambda d: (d / "eager/more.so").write_bytes(b"x"), "files"),
    "a link": (lambda d: (d / "eager/link.json").symlink_to(d / MANIFEST), "files"),
    "a linked folder": (lambda d: (d / "more").symlink_to(d / "eager"), "files"),
    "another model": (_swap_payload, "data-parity"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_fails(name: str, delivery: Path) -> None:
    tamper, gate = TAMPERED[name]
    tamper(delivery)
    found = verify(delivery, latency=False)
    assert found["status"] == "failed"
    assert gates(found)[gate]["status"] == "failed"
    assert gates(found)[gate]["why"]


def _edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        *steps, last = path.split("|")
        for step in steps:
            manifest = manifest[step]
        manifest[last] = value

    return edit


ENTRY = {"sha256": "0" * 64, "size_bytes": 1}
MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a path out of it": (_edit("files|../model.pt", ENTRY), "no path inside"),
    "an absolute path": (_edit("files|/etc/passwd", ENTRY), "no path inside"),
    "a path with a dot folder": (_edit("files|eager/../../x", ENTRY), "no path inside"),
    "a backslash": (_edit("files|eager\\..\\x", ENTRY), "no path inside"),
    "a folder out of it": (_edit("targets|..", {"target": "eager", "status": "passed", "gates": []}), "no folder"),
    "a payload out of it": (_edit("targets|eager|payload", "../../model.pt"), "none of its files"),
    "a seed as text": (_edit("request|seed", "0"), "'request' samples and seed"),
    "no dense value": (_edit("metric|dense", None), "'metric' needs"),
    "no hash": (_edit("files|eager/plan.json", {"sha256": "1", "size_bytes": 1}), "sha256 and size"),
    "a negative size": (_edit("files|eager/plan.json", {"sha256": "0" * 64, "size_bytes": -1}), "sha256 and size"),
    "an unknown status": (_edit("status", "fine"), "status"),
    "a gate without a status": (_edit("targets|eager|gates", [{"name": "drop"}]), "a gate of target"),
    "no targets": (_edit("targets", {}), "0 targets"),
    "targets as a list": (_edit("targets", []), "'targets' is missing or of another type"),
    "limits as text": (_edit("request|limits", {"max_drop": "1"}), "limits"),
    "another version": (_edit("fxprune_manifest", 2), "another version"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_manifest_is_refused_before_anything_is_opened(name: str, delivery: Path) -> None:
    edit, says = MALFORMED[name]
    manifest = json.loads((delivery / MANIFEST).read_text())
    edit(manifest)
    version = manifest.pop("fxprune_manifest")
    write_manifest({**seal(manifest), "fxprune_manifest": version}, delivery)
    with pytest.raises(LoadError, match=re.escape(says)):
        verify(delivery)


def test_an_edited_figure_breaks_the_seal_and_other_files_are_no_manifests(delivery: Path) -> None:
    manifest = json.loads((delivery / MANIFEST).read_text())
    manifest["request"]["limits"]["max_drop"] = 0.9
    write_manifest(manifest, delivery)
    with pytest.raises(LoadError, match="changed after it was sealed"):
        verify(delivery)
    for text, says in (("[1]", "fxprune_manifest"), ("{", "damaged"), ("[" * 100_000, "damaged")):
        (delivery / MANIFEST).write_text(text)
        with pytest.raises(LoadError, match=says):
            verify(delivery)
    with open(delivery / MANIFEST, "wb") as file:
        file.truncate(20 * 2**20)
    with pytest.raises(LoadError, match="too large"):
        verify(delivery)
    with pytest.raises(LoadError, match="no delivery"):
        verify(delivery / "eager")


def test_data_that_is_not_carried_can_be_given_and_must_be_the_same(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(made, out, "--max-drop", "0.5", "--carry", "0.002") == 0
    assert 0 < read_manifest(out)["carried"]["batches"] < read_manifest(out)["carried"]["of"]
    alone = verify(out)
    assert alone["status"] == "unfinished"
    assert gates(alone)["data-parity"]["status"] == "passed"
    assert "data=" in gates(alone)["drop"]["why"]
    assert verify(out, data=made / "labelled.npz")["status"] == "passed"
    np.savez(tmp_path / "other.npz", x=X.numpy() + 1, labels=np.zeros(70, np.int64))
    other = verify(out, data=tmp_path / "other.npz")
    assert gates(other)["load"]["status"] == "failed"
    bare = tmp_path / "bare"
    assert run(made, bare, "--max-drop", "0.5", "--carry", "0", data="bare.npz") == 0
    assert EVIDENCE not in read_manifest(bare)["files"]
    assert main(["verify", str(bare), "-q"]) == 4


def test_a_model_of_one_batch_size_is_judged_on_whole_batches(made: Path, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x.reshape(16, 8))

    with pytest.warns(FxpruneWarning, match="batches of 16, the size that is fixed: 64 of 70"):
        result = export.export(
            Fixed(),
            fxprune.CompressionPlan(),
            X[:16],
            targets=["eager"],
            out=tmp_path / "out",
            verify=made / "labelled.npz",
            limits=Limits(max_drop=0.0, max_latency_ms=1e4, batch=16),
            seconds=0.05,
        )
    assert (result["status"], result["metric"]["samples"]) == ("passed", 64)
    assert verify(tmp_path / "out", seconds=0.05)["status"] == "passed"
    with pytest.raises(OptionError, match="fixed batch of 16"):
        export.export(
            Fixed(),
            fxprune.CompressionPlan(),
            X[:16],
            targets=["eager"],
            out=tmp_path / "two",
            verify=made / "labelled.npz",
            limits=Limits(max_latency_ms=1e4),
            seconds=0.05,
            on_event=lambda _: None,
        )
    assert not (tmp_path / "two").exists()
