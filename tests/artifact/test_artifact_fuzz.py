"""Descriptions that lie: every JSON that fxprune writes and reads again, with parts of it replaced by nonsense.

Whatever stands there, the answer is a result or an error of ours, in bounded time, and nothing outside the directory
is read or written.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune.artifact.artifact import Artifact
from fxprune.artifact.compare import again, compare
from fxprune.artifact.explain import explain
from fxprune.artifact.manifest import MANIFEST, read_manifest, seal_of, wrong_files
from fxprune.cli.commands import build_parser
from fxprune.cli.config_file import read as read_options
from fxprune.data.sources import load_data
from fxprune.errors import FxpruneError
from fxprune.intake.load import load
from fxprune.ir.plan import CompressionPlan
from fxprune.target.block_table import BlockTable, Timing, make_table
from fxprune.target.latency_table import Curve, LatencyTable, Point, Setting
from fxprune.workflows import export
from fxprune.workflows.verify import verify

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3.5,
    1e308,
    float("nan"),
    10**30,
    "",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "\0",
    [],
    {},
    [[]],
    {"a": {}},
    [1, "a", None],
    "Infinity",
    "python:os:getcwd",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def nonsense(value: Any, seed: int) -> Any:
    """``value`` with one to three parts removed, added, or replaced; near the top as often as anywhere."""
    rng, value = random.Random(seed), copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        every = list(places(value))
        path = rng.choice([p for p in every if len(p) <= 2] if rng.random() < 0.5 else every)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = rng.random()
        if what < 0.25 and isinstance(parent, dict):
            del parent[path[-1]]
        elif what < 0.35 and isinstance(parent, dict):
            parent["more"] = rng.choice(ODD)
        elif what < 0.4:
            deep: list[Any] = []
            for _ in range(300):
                deep = [deep]
            parent[path[-1]] = deep
        else:
            parent[path[-1]] = rng.choice(ODD)
    return value


def answered(call: Callable[[], object]) -> None:
    """A result, or an error of ours that says what is wrong: anything else fails the test."""
    try:
        found = call()
    except FxpruneError as error:
        found = error.what
    assert found not in (None, "")


def damaged(text: str, seed: int) -> bytes:
    """Nonsense inside valid JSON, or the bytes cut, flipped or nested without end."""
    rng = random.Random(seed)
    if seed % 4:
        return json.dumps(nonsense(json.loads(text), seed)).encode()
    raw = bytearray(text.encode())
    kind = rng.randrange(3)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind == 1:
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    return b'{"a":' * 100_000 + bytes(raw)


def table() -> str:
    setting = Setting("onnx", "a CPU", 8, 1, {"torch": "2.13.0"})
    curves = {"ffn-64": Curve("ffn", 64, 2, (Point(32, 0.7, 0.01), Point(64, 1.0))), "head-4": Curve("head", 4, 2)}
    return LatencyTable(setting, "0" * 64, 12.5, curves).to_json()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: model.pt, plan.json, an artefact with recovery and scores, and a delivery."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    torch.save(net, folder / "model.pt")
    fxprune.compile(
        net,
        torch.randn(2, 8),
        data=[torch.randn(16, 8) for _ in range(4)],
        flops=0.6,
        out=folder / "small",
        on_event=lambda _: None,
    )
    fxprune.plan(net, torch.randn(4, 8), flops=0.7, importance="l2", out=folder / "plan.json")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((20, 8), dtype="f4"))
    export.export(
        folder / "model.pt",
        folder / "plan.json",
        targets=["eager"],
        verify=folder / "x.npz",
        out=folder / "release",
        seconds=0.02,
    )
    return folder


@pytest.mark.parametrize("seed", range(48))
def test_reports(seed: int, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    shutil.copytree(model / "small", place)
    (place / "report.json").write_bytes(damaged((model / "small" / "report.json").read_text(), seed))
    group = json.loads((model / "small" / "report.json").read_text())["groups"][0]["group"]
    calls: list[Callable[[], object]] = [
        lambda: Artifact.read(place),
        lambda: fxprune.load(place),
        lambda: explain(place, group),
        lambda: compare([place]),
        lambda: read_options(place, "compile", build_parser()[1]),
    ]
    if seed % 16 == 1:  # drawing takes a second
        calls.append(lambda: str(again(place)))
    for call in calls:
        answered(call)


@pytest.mark.parametrize("odd", ODD)
def test_a_report_whose_tokens_are_nonsense(odd: Any, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    shutil.copytree(model / "small", place)
    report = json.loads((place / "report.json").read_text())
    (place / "report.json").write_text(json.dumps({**report, "tokens": odd}))
    with contextlib.suppress(FxpruneError):
        assert not Artifact.read(place).extras
    with contextlib.suppress(FxpruneError):
        compare([place])


@pytest.mark.parametrize("seed", range(60))
def test_manifests(seed: int, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "release"
    shutil.copytree(model / "release", place)
    raw = damaged((place / MANIFEST).read_text(), seed)
    with contextlib.suppress(ValueError, RecursionError, TypeError):  # whoever forges it can seal it again
        forged = json.loads(raw)
        raw = json.dumps({**forged, "seal": seal_of(forged)}).encode()
    (place / MANIFEST).write_bytes(raw)
    with contextlib.suppress(FxpruneError):
        wrong_files(place, read_manifest(place))
    if seed % 5 == 1:
        with contextlib.suppress(FxpruneError):
            assert verify(place, latency=False)["status"] in ("passed", "failed", "unfinished")


@pytest.mark.parametrize("seed", range(60))
def test_plans_and_tables(seed: int, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(damaged((model / "plan.json").read_text(), seed))
    answered(lambda: CompressionPlan.read(path))
    path.write_bytes(damaged(table(), seed))
    answered(lambda: str(LatencyTable.read(path)))
    make_table("a CPU", "ell", [Timing(64, 64, "32x32", "float32", 8, 0.5, 1.0, 0.8)]).write(path)
    path.write_bytes(damaged(path.read_text(), seed))
    answered(lambda: str(BlockTable.read(path).find(64, 64, "32x32", "float32", 8, 0.5)))


@pytest.mark.parametrize("seed", range(40))
def test_option_files(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    text = 'flops = 0.5\nprune = ["heads"]\nfloor = {"a.*" = 0.3}\n\n[compile]\ntarget = "onnx"\nsamples = 8\n'
    raw = bytearray(text.encode())
    for _ in range(rng.randrange(1, 5)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    if seed % 8 == 0:
        raw = bytearray(b"flops = " + b"[" * 50_000)
    path = tmp_path / "fxprune.toml"
    path.write_bytes(raw)
    answered(lambda: str(read_options(path, "compile", implicit=True)))


# ------------------------------------------------------------ bombs, and ways out of the directory


class Echo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def refuses_cheaply(call: Callable[[], object], most: int = 64 * 2**20) -> FxpruneError:
    """The error of ``call``, which took at most so many bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(FxpruneError) as caught:
            call()
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    return caught.value


def bomb(path: Path, name: str, size: int) -> Path:
    """A zip whose member unpacks to ``size`` zero bytes, and is a thousandth of it on the disk."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    assert path.stat().st_size < size / 500
    return path


def test_arrays_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    known = load(Echo(), input="2x3")
    path = tmp_path / "x.npz"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    refuses_cheaply(lambda: load_data(path, known))


@pytest.mark.parametrize("name", ["x.npy", "data.pkl", "archive/data.pkl", "models/model.json", "archive/version"])
def test_zip_bombs_where_programs_pickles_and_arrays_are_expected(name: str, tmp_path: Path) -> None:
    known = load(Echo(), input="2x3")
    path = bomb(tmp_path / "bomb.zip", name, 96 * 2**20)
    for suffix, call in ((".npz", lambda p: load_data(p, known)), (".pt", load), (".pt2", load)):
        place = tmp_path / f"bomb{suffix}"
        shutil.copyfile(path, place)
        refuses_cheaply(lambda call=call, place=place: call(place), 256 * 2**20)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["../outside.pt2", "/etc/hostname", "a/../../outside.pt2", ".hidden", "a\\b", "a\0b"])
def test_names_that_lead_out_of_an_artefact_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.pt2").write_bytes(b"mine")
    place = tmp_path / "small"
    shutil.copytree(model / "small", place)
    report = json.loads((place / "report.json").read_text())
    report["files"][name] = report["files"]["model.pt2"]
    (place / "report.json").write_text(json.dumps(report))
    for call in (Artifact.read, fxprune.load, lambda p: compare([p])):
        with pytest.raises(FxpruneError, match="plain file name"):
            call(place)
    shutil.copytree(model / "release", tmp_path / "release")
    manifest = json.loads((tmp_path / "release" / MANIFEST).read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    manifest["seal"] = seal_of(manifest)
    (tmp_path / "release" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FxpruneError, match="no path inside the delivery"):
        verify(tmp_path / "release", latency=False)
    assert (tmp_path / "outside.pt2").read_bytes() == b"mine"


def test_tensors_of_a_file_that_lies_about_its_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4, 3)}, path)
    raw = path.read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    head["x"].update(shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12])
    text = json.dumps(head).encode()
    for content in (len(text).to_bytes(8, "little") + text + bytes(48), (2**62).to_bytes(8, "little") + raw[8:]):
        path.write_bytes(content)
        refuses_cheaply(lambda: load_data(path, load(Echo(), input="2x3")))
