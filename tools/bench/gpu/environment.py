"""The machine: driver, clocks, versions. Everything measured after it belongs to it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import torch

from bench.gpu.cells import Cell, Record, Setting

ASKED = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu", "utilization.gpu",
)  # fmt: skip
LIBRARIES = ("triton", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "torch_tensorrt", "pytest")


def cells(setting: Setting) -> list[Cell]:
    """Two: the device, and what is installed."""
    return [Cell("device", lambda: _device(setting)), Cell("libraries", _libraries)]


def _device(setting: Setting) -> Record:
    found: Record = {"cuda_build": torch.version.cuda}
    if not setting.dry:
        about = torch.cuda.get_device_properties(0)
        found |= {
            "chip": about.name,
            "capability": list(torch.cuda.get_device_capability()),
            "bytes": about.total_memory,
        }
        found |= {"processors": about.multi_processor_count}
    if shutil.which("nvidia-smi") is None:
        return {**found, "driver": "nvidia-smi is not here"}
    asked = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    values = [value.strip() for value in said.stdout.strip().split(",")]
    return {
        **found,
        **(dict(zip(ASKED, values, strict=True)) if len(values) == len(ASKED) else {"driver": said.stderr}),
    }


def _libraries() -> Record:
    """Which there are; ``providers``: of ONNX Runtime. Versions stand in the head of every file."""
    found: Record = {name: importlib.util.find_spec(name) is not None for name in LIBRARIES}
    if found["onnxruntime"]:
        import onnxruntime

        found["providers"] = onnxruntime.get_available_providers()
    return found
