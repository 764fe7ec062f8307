"""``.pt2`` files: a full disk is an error and not a crash, a damaged one is said to be, a hostile one runs nothing."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxprune.errors import LoadError
from fxprune.intake.archive import read_program, write_program
from fxprune.intake.archive_safety import check_archive


class Rolled(nn.Module):
    """Symbolic sizes in every form: a product, a quotient, a remainder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1))
        self.register_buffer("table", torch.rand(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half].reshape(-1, half).sum(1) * self.weight + x.shape[0] % 3 + self.table + torch.tensor([1.0])


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    return torch.export.export(Rolled(), (torch.randn(4, 6),), dynamic_shapes=((torch.export.Dim.AUTO,) * 2,))


@pytest.fixture
def saved(exported: ExportedProgram, tmp_path: Path) -> Path:
    write_program(exported, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_what_is_written_reads_back_exactly(exported: ExportedProgram, saved: Path) -> None:
    x = torch.randn(6, 10)
    torch.testing.assert_close(read_program(saved).module()(x), exported.module()(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.export.load(saved).module()(x), exported.module()(x), rtol=0, atol=0)


def test_a_device_that_is_really_full_does_not_abort_the_process(exported: ExportedProgram) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    with pytest.raises(OSError, match="No space left"):
        write_program(exported, Path("/dev/full"))


@pytest.mark.parametrize("keep", [0, 100, 0.3, 0.99])
def test_a_damaged_file_is_said_to_be(saved: Path, keep: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(LoadError, match=r"damaged or not a \.pt2|malformed"):
        read_program(saved)


def test_places_that_hold_no_program(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        read_program(tmp_path / "missing.pt2")
    with pytest.raises(LoadError, match="a directory"):
        read_program(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt2")
    with pytest.raises(LoadError, match=r"not a \.pt2 program"):
        read_program(tmp_path / "weights.pt2")


def test_trust_skips_the_search(saved: Path, tmp_path: Path) -> None:
    forged = forge(saved, tmp_path / "forged.pt2", MODEL, lambda m: m.update(guards_code=["print(L['x'])"]))
    with pytest.raises(LoadError, match="trust_pickle=True"):
        check_archive(forged)
    assert isinstance(read_program(forged, trust=True), ExportedProgram)


# ---------------------------------------------------------------- a .pt2 that would run code


def forge(source: Path, target: Path, entry: str, change: Any) -> Path:
    """A copy of a ``.pt2`` with one JSON entry changed, or a new entry added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            data = old.read(name)
            if name == f"{root}/{entry}":
                value = json.loads(data)
                change(value)
                data = json.dumps(value).encode()
            new.writestr(name, data)
        if not any(n == f"{root}/{entry}" for n in old.namelist()):
            new.writestr(f"{root}/{entry}", b"x")
    return target


def _call(target: str) -> Any:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


def _size(model: Any) -> None:
    value = {"as_expr": {"expr_str": "__import__('os').system('true')", "hint": None}}
    model["graph_module"]["graph"]["sym_int_values"]["s"] = value


def _quiet_size(model: Any) -> None:
    model["graph_module"]["graph"]["sym_int_values"]["s"] = {"as_expr": {"expr_str": "exit()", "hint": None}}


def _argument(model: Any) -> None:
    calls = model["graph_module"]["module_call_graph"]
    calls[0]["signature"]["forward_arg_names"] = ["x=print()"]


MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


@pytest.mark.parametrize(
    ("entry", "change"),
    [
        (MODEL, _call("torch.os.system")),
        (MODEL, _call("torch.hub.load")),
        (MODEL, _call("_operator.methodcaller")),
        (MODEL, _call("torch.ops.load_library.x")),
        (MODEL, _call("torch.ops.aten.add.__globals__")),
        (MODEL, _call("torch.ops.aten.from_file.default")),
        (MODEL, _call("math.__loader__.load_module")),
        (MODEL, _size),
        (MODEL, _quiet_size),
        (MODEL, _argument),
        (MODEL, lambda m: m.update(guards_code=["__import__('os').system('true')"])),
        (MODEL, lambda m: m.update(guards_code=["exec(L['x'])"])),
        (WEIGHTS, lambda m: next(iter(m["config"].values())).update(use_pickle=True)),
        ("data/aotinductor/model/lib.so", None),
        ("data/constants/opaque_obj_0", None),
        ("data/constants/custom_obj_0", None),
        ("data/weights/model.pt", None),
    ],
)
def test_a_program_that_would_run_code_is_refused(saved: Path, tmp_path: Path, entry: str, change: Any) -> None:
    forged = forge(saved, tmp_path / "forged.pt2", entry, change)
    with pytest.raises(LoadError, match="could run code"):
        read_program(forged)


def test_two_directories_in_one_zip_are_refused(saved: Path) -> None:
    """Python looks for the directory before the end record, torch where the record points: they must be one."""
    data = (saved).read_bytes()
    (saved).write_bytes(b"x" * 64 + data)
    with pytest.raises(LoadError, match="malformed"):
        read_program(saved)


class NoRegisters(nn.Module):
    """A table of no register tokens, as a loader leaves it: an empty view of somebody's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(8)[:0].view(1, 0, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), self.registers.expand(x.shape[0], -1, -1)], 1)


def test_an_empty_parameter_is_written(tmp_path: Path) -> None:
    model, x = NoRegisters(), torch.randn(2, 3, 4)
    write_program(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    back = read_program(tmp_path / "model.pt2")
    assert torch.equal(back.module()(x), model(x))
    assert dict(back.named_parameters())["registers"].shape == (1, 0, 4)
