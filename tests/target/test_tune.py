"""``tune``: what is measured goes to disk under the device's name; without the device it says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxprune.backends.onnx import tune as onnx_tune
from fxprune.errors import MissingDevice, OptionError
from fxprune.process.events import Event
from fxprune.target.block_table import BlockTable, Timing, find_table_path, make_table
from fxprune.target.tune import summary, tune


def fake(shapes, rows, patterns, densities, dtype, on_case):  # type: ignore[no-untyped-def]
    cases = [(n, k, m, p, d) for n, k in shapes for m in rows for p in patterns for d in densities]
    for i, _ in enumerate(cases):
        on_case("a case", i, len(cases))
    return make_table("a CPU", "ell", [Timing(n, k, p, dtype, m, d, 1.0, 2.0) for n, k, m, p, d in cases])


def test_a_table_is_kept_and_measured_anew_by_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(onnx_tune, "measure", fake)
    heard: list[Event] = []
    table, path = tune("onnx", [(64, 64)], [10], ["32x32"], [0.5], on_event=heard.append)
    assert path == find_table_path("a CPU", "ell")
    assert [(e.kind, e.done, e.total) for e in heard] == [("progress", 0, 1)]
    again, _ = tune("onnx", [(64, 64), (32, 64)], [10], ["32x32"], [0.5])
    assert len(table.rows) == 1
    assert len(again.rows) == 2
    more, _ = tune("onnx", [(64, 64)], [20], ["32x32"], [0.5])
    assert BlockTable.read(path) == more
    assert len(more.rows) == 3
    assert summary(more)["geometric_mean"] == 0.5
    assert summary(more)["faster"] == 0
    elsewhere, out = tune("onnx", [(64, 64)], [10], ["32x32"], [0.5], out=tmp_path / "mine.json")
    assert out.name == "mine.json"
    assert len(elsewhere.rows) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_is_missing_and_the_exit_code_is_its_own() -> None:
    with pytest.raises(MissingDevice, match="no CUDA device") as error:
        tune("triton", [(64, 64)], [10], ["32x32"], [0.5])
    assert error.value.exit_code == 4
    assert "CUDA build" in error.value.cure


def test_mistakes_are_refused_before_anything_is_measured() -> None:
    for arguments, message in (
        ({"target": "tritn"}, "did you mean 'triton'"),
        ({"densities": [1.5]}, "between 0 and 1"),
        ({"rows": [0]}, "positive"),
        ({"shapes": []}, "positive"),
        ({"patterns": ["8x8"]}, "no kernel for tiles"),
        ({"dtype": "int8"}, "unknown dtype"),
    ):
        with pytest.raises(OptionError, match=message):
            tune(**arguments)  # type: ignore[arg-type]
