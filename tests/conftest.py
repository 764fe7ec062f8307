"""What every test relies on: one thread, a fixed seed, nobody's network, and a trained toy to prune."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from support.digits import tiny_vit

from fxprune.artifact import delivered
from fxprune.cli.demo import Digits, DigitsViT, digits, train

torch.set_num_threads(1)
delivered.SECONDS = 0.0  # hundreds of results need not be timed; the tests of timing ask for seconds


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test marked ``drawn(count)`` so many run, drawn by ``--draw``; all with ``--full``, and where a
    case is asked for by name (``::`` or ``-k``)."""
    asked = config.getoption("--full") or config.getoption("-k") or any("::" in a for a in config.args)
    if asked:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("drawn"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for name, several in cases.items():
        marker = several[0].get_closest_marker("drawn")
        assert marker is not None
        left |= set(several) - set(
            random.Random(f"{config.getoption('--draw')} {name}").sample(several, min(marker.args[0], len(several)))
        )
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
