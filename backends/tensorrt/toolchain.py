"""What builds and runs engines on this machine, and what is missing where it cannot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch

from ...errors import MissingDevice
from ...ir.provenance import first_line
from ...process.silence import quiet

PARSERS = ("tensorrt", "tensorrt_rtx")
INSTALL = "pip install 'fxprune[tensorrt]'"


@dataclass(frozen=True)
class Toolchain:
    """trt: the module ``tensorrt`` or ``tensorrt_rtx``; rtx: whether it is TensorRT for RTX; gpu: name, "" without."""

    trt: Any
    rtx: bool
    gpu: str

    def __str__(self) -> str:
        name = "TensorRT for RTX" if self.rtx else "TensorRT"
        return f"{name} {self.trt.__version__}" + (f" on {self.gpu}" if self.gpu else "")


def find(via: str, elsewhere: bool) -> tuple[Toolchain | None, tuple[str, ...]]:
    """(the toolchain, what is missing in words). Both where an engine can be built and not run.

    via        ``dynamo`` needs torch-tensorrt, ``onnx`` only TensorRT itself
    elsewhere  the engine is for a GPU that is named, so that none is needed to build it (TensorRT for RTX)
    """
    missing = []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if not gpu:
        missing.append("an NVIDIA GPU: PyTorch finds no CUDA device here")
    package = next((p for p in (("torch_tensorrt",) if via == "dynamo" else PARSERS) if _is_installed(p)), None)
    if package is None:
        needed = "torch-tensorrt" if via == "dynamo" else "TensorRT's Python package (tensorrt)"
        return None, (*missing, f"{needed}: {INSTALL}")
    if not gpu and not elsewhere:
        return None, tuple(missing)
    try:
        with quiet():
            loaded = importlib.import_module(package)
            trt = loaded if package in PARSERS else importlib.import_module("tensorrt")
    except Exception as error:  # packages built for another torch or driver fail in ways of their own
        return None, (*missing, f"a {package} that can be imported here: {first_line(error)}")
    return Toolchain(trt, trt.__name__ == "tensorrt_rtx", gpu), tuple(missing)


def runtime() -> Toolchain:
    """What runs an engine here. Raises MissingDevice naming what is not there."""
    found, missing = find("onnx", elsewhere=False)
    if found is None or missing:
        raise MissingDevice(
            "a TensorRT engine cannot be run here", why="; ".join(missing), cure="run it on a machine that has them"
        )
    return found


def _is_installed(package: str) -> bool:
    """Whether there is such a package; a mere folder of that name on the path is none."""
    spec = util.find_spec(package)
    return spec is not None and spec.origin is not None
