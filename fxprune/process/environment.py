"""What this process runs on: versions, cores, the processor."""

from __future__ import annotations

import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What a latency depends on, as plain data: CPU, cores, threads, GPU, versions of what is installed."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Package -> version of what results depend on; packages that are not installed are left out."""
    found = {}
    for package in (
        "fxprune",
        "torch",
        "numpy",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "timm",
        "transformers",
        "triton",
        "torch-tensorrt",
        "tensorrt",
        "torch-tensorrt-rtx",
        "tensorrt_rtx",
    ):
        if (version := _find_version(package)) is not None:
            found[package] = version
    if (torch := sys.modules.get("torch")) is not None:
        found["torch"] = str(torch.__version__)  # with what it was built for, which its package may leave out
    return found


@functools.cache
def _find_version(package: str) -> str | None:
    """The version of a package, looked for once: it is a search through every folder of packages."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def core_versions() -> dict[str, str]:
    """Versions of fxprune and torch: finished scoring is never taken up under others."""
    return {package: version for package, version in versions().items() if package in ("fxprune", "torch")}


def usable_cores() -> int:
    """Cores that this process may run on (a container's limit, not the machine's count)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
