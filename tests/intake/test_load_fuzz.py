"""Damaged files of every kind: an error with a cure, never a crash, a hang or another exception."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from fxprune.data.sources import load_data
from fxprune.data.texts import read_texts
from fxprune.errors import FxpruneError
from fxprune.intake.load import Loaded, load
from fxprune.intake.tensors import read_checkpoint


class Ids(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


KNOWN = Loaded(Ids(), "ids", (torch.randn(2, 3),), {}, input_names=("x",))


def _module() -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(3, 2)), buffer)
    return buffer.getvalue()


def _state(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(nn.Linear(3, 2).state_dict(), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _program() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),)), buffer)
    return buffer.getvalue()


def _arrays(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    write = np.savez_compressed if compressed else np.savez
    write(buffer, x=np.ones((4, 3), "f4"), y=np.arange(4))
    return buffer.getvalue()


def _data(path: Path) -> Any:
    return load_data(path, KNOWN)


# kind -> a valid file, and what reads it
KINDS: dict[str, tuple[Callable[[], bytes], Callable[[Path], Any]]] = {
    "module.pt": (_module, load),
    "state.pt": (lambda: _state(False), read_checkpoint),
    "legacy.pth": (lambda: _state(True), read_checkpoint),
    "program.pt2": (_program, load),
    "weights.safetensors": (lambda: save(dict(nn.Linear(3, 2).state_dict())), read_checkpoint),
    "plain.npz": (lambda: _arrays(False), _data),
    "small.npz": (lambda: _arrays(True), _data),
    "data.pt": (lambda: _state(False), _data),
    "texts.csv": (lambda: b'text,label\na good film,1\n"bad, worse",0\n', read_texts),
    "texts.jsonl": (lambda: b'{"text": "a good film", "label": 1}\n{"text": "bad"}\n', read_texts),
}
VALID = {name: make() for name, (make, _) in KINDS.items()}

# an edit: where (as a share of the file), and what is written there
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=4)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("name", KINDS)
@settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=EDITS, kept=st.floats(0, 1) | st.just(1.0), noise=st.none() | st.binary(max_size=200))
def test_damaged_files_raise_only_our_errors(
    name: str, edits: list[tuple[float, bytes]], kept: float, noise: bytes | None, tmp_path: Path
) -> None:
    data = bytearray(VALID[name] if noise is None else noise)
    for share, written in edits:
        start = int(share * len(data))
        data[start : start + len(written)] = written
    path = tmp_path / name
    path.write_bytes(data[: int(kept * len(data))])
    with contextlib.suppress(FxpruneError):
        KINDS[name][1](path)


@pytest.mark.parametrize("name", ["module.pt", "state.pt", "weights.safetensors", "program.pt2"])
def test_the_undamaged_files_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(VALID[name])
    KINDS[name][1](tmp_path / name)


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_any_text_as_a_source_or_an_input_is_an_error_or_a_model(text: str) -> None:
    for call in (lambda: load(text), lambda: load(nn.Linear(3, 2), input=text), lambda: load_data(text, KNOWN)):
        with contextlib.suppress(FxpruneError):
            call()
