"""The device that a run works on."""

from __future__ import annotations

import torch

from ..errors import MissingDevice, OptionError
from ..ir.placement import whole_device

AUTO = "auto"
HERE = ""
"""In place of a device: where the model lies."""


def read_device(text: str) -> torch.device | None:
    """The device that a run works on; None: where the model lies. ``auto`` is the GPU where there is one.

    Raises OptionError for what is no device, MissingDevice (exit code 4) where this machine has none such.

    >>> read_device("cpu"), read_device(HERE)
    (device(type='cpu'), None)
    """
    if text == HERE or (text == AUTO and not torch.cuda.is_available()):
        return None
    where, cure = f"--device {text}", "take auto, cpu, or cuda (cuda:1 is the second GPU)"
    try:
        named = torch.device("cuda" if text == AUTO else text)
    except RuntimeError as error:
        raise OptionError(f"'{text}' is no device", where=where, cure=cure) from error
    if named.type == "meta":
        raise OptionError("on the meta device nothing is computed", where=where, cure=cure)
    try:
        return whole_device(named)
    except Exception as error:
        why = "torch.cuda.is_available() is False" if named.type == "cuda" and not torch.cuda.is_available() else ""
        raise MissingDevice(
            f"this machine has no device '{text}' that PyTorch can use",
            where=where,
            why=why or str(error).splitlines()[0][:200],
            cure="leave `--device` away, or take `--device cpu`; `fxprune doctor` says what there is",
        ) from error
