"""Programs that call another library's ops: read in a fresh process, written as ONNX, and said to be so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import LoadError
from fxprune.intake import archive, op_libraries
from fxprune.intake.capture import capture
from fxprune.intake.op_libraries import foreign_ops, notes_on_ops
from fxprune.process.libraries import survive_torchvision
from fxprune.registry import backend
from fxprune.target.backend import lower_and_verify

survive_torchvision()
pytest.importorskip("transformers.integrations.moe")
NAME = "transformers::grouped_mm_fallback"


class Experts(nn.Module):
    """Every row goes to one of four experts of [8, 16] and [16, 8]; ``never``: one that nobody asks."""

    def __init__(self, never: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))
        if never is not None:
            self.router.bias.data[never] = -1e3

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        order = choice.argsort(stable=True)
        offsets = (choice[:, None] == torch.arange(4)).sum(0).cumsum(0).to(torch.int32)
        grouped = torch.ops.transformers.grouped_mm_fallback
        y = grouped(torch.relu(grouped(x[order], self.up, offsets)), self.down, offsets)
        return y[order.argsort()]


class Behind(nn.Module):
    """Two rows for the first expert, none for the second, and the rest for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("offsets", torch.tensor([2, 2], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.transformers.grouped_mm_fallback(x, self.weight, self.offsets)
        return y


@pytest.mark.parametrize(
    ("model", "example"),
    [(Experts(), torch.randn(6, 8)), (Experts(never=2), torch.randn(6, 8)), (Behind(), torch.randn(6, 3))],
)
def test_grouped_products_become_one_product_per_expert(model: nn.Module, example: Tensor, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    program = capture(model.eval(), (example,))
    lowered, parity = lower_and_verify(backend("onnx"), program, tmp_path)
    assert parity.ok
    assert len(parity.tried) > 1, "the number of rows is open"
    wide = torch.randn(33, example.shape[1])
    torch.testing.assert_close(lowered.run([wide])[0], model(wide), rtol=1e-4, atol=1e-4)
    graph = onnx.load(lowered.payload)
    assert {o.domain for o in graph.opset_import} == {""}
    assert not graph.functions


def test_a_fresh_process_loads_what_calls_them(tmp_path: Path) -> None:
    made = fxprune.compile(
        Experts().eval(),
        torch.randn(6, 8),
        flops=0.75,
        importance="l2",
        align=1,
        out=tmp_path / "small",
        seconds=0,
        on_event=lambda _: None,
    )
    assert foreign_ops(made.program.exported) == [NAME]
    (note,) = [n for n in made.report["notes"] if "model.pt2 calls" in n]
    assert NAME in note
    assert "import transformers.integrations.moe" in note
    x = torch.randn(5, 8)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, fxprune; assert 'transformers' not in sys.modules; m = fxprune.load(sys.argv[1]); "
        "torch.save(m(torch.load(sys.argv[2])), sys.argv[3])"
    )
    subprocess.run(
        [sys.executable, "-c", code, *map(str, (tmp_path / "small", tmp_path / "x.pt", tmp_path / "y.pt"))],
        check=True,
        timeout=180,
    )
    assert torch.equal(torch.load(tmp_path / "y.pt"), made.module(x))


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    archive.write_program(capture(Experts().eval(), (torch.randn(6, 8),)).exported, path)
    monkeypatch.setattr(op_libraries, "LIBRARIES", {"transformers": "transformers.nowhere"})
    with pytest.raises(LoadError, match="calls ops of transformers") as caught:
        archive.read_program(path)
    assert caught.value.cure == "pip install transformers"


def test_programs_of_torchs_own_ops_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),)).exported
    assert foreign_ops(exported) == notes_on_ops(exported) == []
    archive.write_program(exported, tmp_path / "model.pt2")
    monkeypatch.setattr(op_libraries, "survive_torchvision", lambda: pytest.fail("something was imported"))
    archive.read_program(tmp_path / "model.pt2")
