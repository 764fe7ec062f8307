"""What every test relies on: one thread, a fixed seed, nobody's network, and a trained toy to prune."""

from __future__ import annotations

import gc
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process and those that tests start: workers share the cores

import pytest
import torch
from support import drawing
from support.digits import tiny_vit
from support.remembered import Captures, Hints, Translations

from fxprune.artifact import delivered
from fxprune.cli.demo import Digits, DigitsViT, digits, train
from fxprune.data import memory
from fxprune.intake import capture
from fxprune.report import plots

torch.set_num_threads(1)
delivered.SECONDS = 0.0  # hundreds of results need not be timed; the tests of timing ask for seconds


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _remembered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not drawing.FULL:
            patch.setattr(capture, "capture", Captures(capture.capture))
            patch.setattr(typing, "get_type_hints", Hints(typing.get_type_hints))
            patch.setattr(torch.onnx, "export", Translations(torch.onnx.export))
            # hundreds of results need not be written into as little memory as there is: to search all that the tests
            # hold for cycles takes half a second
            patch.setattr(memory, "gc", types.SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the test itself holds a model: for tests of what is let go."""
    monkeypatch.setattr(memory, "gc", gc)
    if isinstance(capture.capture, Captures):
        capture.capture.kept.clear()
        monkeypatch.setattr(capture, "capture", capture.capture.capture)


@pytest.fixture(autouse=True)
def _pages_without_drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of pages need not be drawn: those of the tests that look at them are."""
    if not drawing.FULL and request.path.parent.name not in ("report", "artifact"):
        monkeypatch.setattr(plots, "draw_svg", lambda *_, **__: '<svg viewBox="0 0 1 1"></svg>')


@pytest.fixture(scope="session")
def digit_data() -> Digits:
    return digits(seed=0)


@pytest.fixture(scope="session")
def trained_weights(digit_data: Digits) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return train(tiny_vit(), digit_data, epochs=6, lr=4e-3).state_dict()


@pytest.fixture
def trained(trained_weights: dict[str, torch.Tensor]) -> DigitsViT:
    """A small ViT that knows its digits: above 90 % after six epochs. A fresh copy for every test."""
    model = tiny_vit()
    model.load_state_dict({name: tensor.clone() for name, tensor in trained_weights.items()})
    return model.eval()


@pytest.fixture(scope="session")
def reported(
    trained_weights: dict[str, torch.Tensor], digit_data: Digits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artefact with heads, neurons and tokens cut and recovered, for tests that leave it as it is."""
    from support.reports import compiled

    out = tmp_path_factory.mktemp("reported") / "small"
    compiled(trained_weights, digit_data, out, prune="heads,ffn,tokens", tokens="tome{schedule=constant}")
    return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="rewrite tests/golden/*.txt from what the code does now")
    parser.addoption("--full", action="store_true", help="laws over every case, not over a drawn sample")
    parser.addoption("--draw", type=int, default=0, help="the seed of that sample: another number, other cases")


def pytest_configure(config: pytest.Config) -> None:
    drawing.FULL = config.getoption("--full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``drawn(count)`` so many run, drawn by ``--draw``; all with ``--full``, and where a
    case is asked for by name (``::`` or ``-k``)."""
    if drawing.FULL or config.getoption("-k") or any("::" in a for a in config.args):
        return
    cases: dict[tuple[str, int, int | None], list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("drawn"):
            name = item.nodeid.partition("[")[0]
            cases.setdefault((name, marker.args[0], marker.kwargs.get("first")), []).append(item)
    left: set[pytest.Item] = set()
    for (name, count, first), several in cases.items():
        drawn = drawing.draw(name, several, count, first, config.getoption("--draw"))
        left |= set(several) - set(drawn)
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
