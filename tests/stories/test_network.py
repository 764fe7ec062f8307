"""Nothing goes over the network unless it is asked for."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from fxprune.cli.demo import Digits, DigitsViT
from fxprune.cli.entry import OK, main


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to look up a name or to connect, all of them refused."""
    tried: list[Any] = []

    def refuse(*args: Any, **_: Any) -> NoReturn:
        tried.append(args)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse, raising=False)
    return tried


def test_compile_load_and_bench_stay_on_this_machine(
    offline: list[Any], tmp_path: Path, trained: DigitsViT, digit_data: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained, "model.pt")
    np.savez("data.npz", x=digit_data.train_images[:32].numpy(), y=digit_data.train_labels[:32].numpy())
    common = ["--input", "2x1x8x8", "--trust-pickle"]
    assert (
        main(
            [
                "compile",
                "model.pt",
                *common,
                "--flops",
                "0.6",
                "--target",
                "onnx",
                "--data",
                "data.npz",
                "--out",
                "small",
                "-q",
            ]
        )
        == OK
    )
    assert main(["bench", "small", "--batch", "1", "--seconds", "0.2", "-q"]) == OK
    assert main(["inspect", "timm:test_vit", "-q"]) == OK  # no pretrained weights here: said, not fetched
    assert not offline


def test_the_fixture_would_see_an_attempt(offline: list[Any]) -> None:
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 1))
    assert len(offline) == 1
