"""AOTInductor packages: right at every batch size, loaded by torch alone; and what is said where one cannot be made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxprune import registry
from fxprune.artifact.artifact import Artifact, build_report
from fxprune.backends.inductor.backend import InductorBackend, lacking
from fxprune.errors import LoadError, MissingDevice, OptionError
from fxprune.intake.archive import read_program
from fxprune.intake.capture import capture
from fxprune.ir.cost import Cost
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.target.backend import lower_and_verify

needs_compiler = pytest.mark.skipif(bool(lacking("cpu")), reason="needs a C++ compiler")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")


class Model(nn.Module):
    """Keyword and positional input, a dict with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = nn.functional.gelu(self.linear(x)) * scale
        return {"y": y, "best": y.argmax(-1)}


def program() -> Program:
    torch.manual_seed(0)
    return capture(Model().eval(), (torch.randn(2, 8),), {"scale": torch.rand(2, 1)}, name="model")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    """One package for all tests: a compiler takes its time, and longer where it prepares headers for the next."""
    from torch._inductor import config

    folder = tmp_path_factory.mktemp("inductor")
    with (
        pytest.MonkeyPatch.context() as patch,
        config.patch({"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}),
    ):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        zero, one = Cost(1, 1, 1), program()
        report = build_report(one, name="model", target="inductor", dense=zero, compressed=zero, plan=CompressionPlan())
        made = Artifact(one, CompressionPlan(), report, InductorBackend())
        made.save(folder / "out")
        yield made


@needs_compiler
def test_the_package_computes_the_program_at_several_batch_sizes(artifact: Artifact) -> None:
    report = artifact.report
    assert report["payload"] == "model.inductor.pt2"
    assert report["unfinished"] is None
    assert report["parity"]["ok"]
    assert [t["batch"] for t in report["parity"]["tried"]] == [2, 1, 3]
    assert report["parity"]["runtime"].startswith("AOTInductor on ")
    assert report["lowering"]["device"] == "cpu"


ALONE = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
x, scale = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), torch.ones(5, 1)
found = model(x, scale=scale)
assert not any(name.startswith("fxprune") for name in sys.modules)
torch.save(found["y"], sys.argv[2])
"""


@needs_compiler
def test_torch_alone_loads_it(artifact: Artifact, tmp_path: Path) -> None:
    assert artifact.path is not None
    out = tmp_path / "y.pt"
    subprocess.run(
        [sys.executable, "-c", ALONE, str(artifact.path / "model.inductor.pt2"), str(out)], check=True, cwd=tmp_path
    )
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    want = artifact.module(x, scale=torch.ones(5, 1))["y"]
    torch.testing.assert_close(torch.load(out, weights_only=True), want.detach(), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_it_is_read_back_and_timed(artifact: Artifact) -> None:
    from fxprune.workflows.bench import bench

    assert artifact.path is not None
    assert Artifact.read(artifact.path).backend == InductorBackend()
    result = bench(artifact.path, batches=(1, 4), seconds=0.05)
    assert result["target"] == "inductor"
    assert [row["batch"] for row in result["rows"]] == [1, 4]


@needs_compiler
def test_machine_code_is_not_read_as_a_program(artifact: Artifact) -> None:
    assert artifact.path is not None
    with pytest.raises(LoadError):
        read_program(artifact.path / "model.inductor.pt2")


@needs_no_gpu
def test_without_a_gpu_the_program_is_written_and_the_gpu_named(tmp_path: Path) -> None:
    lowered, parity = lower_and_verify(registry.target("inductor{device=cuda}"), program(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert lowered.payload.name == "model.pt2"
    assert "a CUDA device" in lowered.missing[0]
    assert parity.ok
    with pytest.raises(MissingDevice, match="cannot be run here"):
        InductorBackend("cuda").load(tmp_path / "model.inductor.pt2")


def test_without_a_compiler_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert lower_and_verify(InductorBackend(), program(), tmp_path)[0].missing == (
        "a C++ compiler: none of $CXX, g++ and clang++ was found",
    )


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(OptionError, match="does not compile for 'tpu'"):
        registry.target("inductor{device=tpu}")
