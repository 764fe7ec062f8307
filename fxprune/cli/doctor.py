"""``examine``: what this environment has, what each target needs of it, and what is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import plugins, registry
from ..errors import OptionError, nearest
from ..process.deprecation import number
from ..process.environment import cpu_name, usable_cores

TESTED = ("2.11", "2.14")  # torch: from, and below
PACKAGES = ("torch", "torchvision", "timm", "transformers", "safetensors", "numpy")  # and those that targets name


def examine(target: str | None = None) -> dict[str, Any]:
    """Everything as plain data: ``packages``, ``gpus``, ``providers``, ``targets``, ``plugins``, ``problems`` and more.

    target   look at this one alone. Raises OptionError for an unknown one

    Imports torchvision, onnxruntime, triton and all plugins; sends nothing anywhere.
    """
    names = registry.names("backend")
    if target is not None and target not in names:
        raise OptionError(f"unknown target '{target}'", where=f"--target {target}", cure=nearest(target, names))
    wanted = dict.fromkeys([*PACKAGES, *(package for name in names for package in _packages_of(name))])
    packages = {name: version for name in wanted if (version := _version(name)) is not None}
    found: list[str] = list(_torch_problems(packages))
    broken = _torchvision(packages)
    if broken:
        found.append(broken)
    if {"torch-tensorrt", "torch-tensorrt-rtx"} <= packages.keys():
        found.append("torch-tensorrt and torch-tensorrt-rtx are both installed: they own the same module; keep one")
    found += plugins.problems([(kind, name) for kind, table in registry.TABLES.items() for name in table])
    targets = {name: _target(name) for name in names if target in (None, name)}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "packages": packages,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus(),
        "providers": providers(),
        "compiler": _compiler(),
        "targets": targets,
        "plugins": [str(p) for p in plugins.find_plugins()[0]],
        "problems": found,
    }


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device that torch sees."""
    if not torch.cuda.is_available():
        return []
    made = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        made.append(
            {"name": p.name, "capability": f"sm_{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        )
    return made


def providers() -> list[str]:
    """Execution providers that onnxruntime has; empty without it."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _packages_of(target: str) -> tuple[str, ...]:
    """Distributions that a target names; none where it cannot be imported."""
    try:
        return tuple(registry.lookup("backend", target).packages)
    except (OptionError, AttributeError):
        return ()


def _target(name: str) -> dict[str, Any]:
    """{ready, needs: [{what, there, cure}], granularity}: what its class says of itself."""
    try:
        cls = registry.lookup("backend", name)
    except OptionError as error:
        return {"ready": False, "needs": [{"what": name, "there": False, "cure": error.why}], "granularity": None}
    stated = [(one, "") if isinstance(one, str) else one for one in getattr(cls, "requires", ())]
    needs = [{"what": what, "there": _there(what), "cure": cure or f"pip install {what}"} for what, cure in stated]
    return {"ready": all(n["there"] for n in needs), "needs": needs, "granularity": getattr(cls, "granularity", None)}


def _there(what: str) -> bool:
    if what == "a CUDA GPU":
        return torch.cuda.is_available()
    if what == "a C++ compiler":
        return _compiler() is not None
    try:
        return any(importlib.util.find_spec(module) is not None for module in what.split(" or "))
    except (ImportError, ValueError):
        return False


def _torch_problems(packages: dict[str, str]) -> list[str]:
    version = packages.get("torch", "")
    said = []
    if not number(TESTED[0]) <= number(version) < number(TESTED[1]):
        said.append(f"torch {version} is outside the tested range ({TESTED[0]} to below {TESTED[1]})")
    if torch.version.cuda and not torch.cuda.is_available():
        said.append(
            f"torch was built for CUDA {torch.version.cuda}, but sees no GPU: a driver is missing or too old, "
            "or this machine has none"
        )
    return said


def _torchvision(packages: dict[str, str]) -> str:
    """What is wrong with torchvision's compiled ops; "" when they work or nothing is installed."""
    if "torchvision" not in packages:
        return ""
    why = ""
    try:
        with _quietly():
            importlib.import_module("torchvision")
            works = hasattr(torch.ops.torchvision, "nms") and torch._C._dispatch_has_kernel("torchvision::nms")
    except Exception as error:
        works, why = False, f": {str(error).splitlines()[0]}" if str(error) else ""
        from ..process.libraries import survive_torchvision

        survive_torchvision()  # whoever imports it next in this process finds one that works
    if works:
        return ""
    return (
        f"torchvision {packages['torchvision']} was built for another torch than {packages.get('torch')}{why}. "
        "fxprune lives with it; cure: install the torchvision of your torch"
    )


def _quietly() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else warnings.catch_warnings()


def _compiler() -> str | None:
    return next(
        (path for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name and (path := shutil.which(name))),
        None,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words, one fact per line."""
    said = [
        f"python    {result['python']}, {result['system']}, {result['cpu']}",
        f"machine   {result['cores']} usable cores, {result['torch_threads']} torch threads, "
        f"{result['memory_gib']} GiB of memory, {result['disk_free_gib']} GiB free here",
        "packages  " + ", ".join(f"{k} {v}" for k, v in result["packages"].items()),
    ]
    built = f"CUDA {result['torch_cuda']}" if result["torch_cuda"] else "the CPU"
    said += [f"gpu       {g['name']}, {g['capability']}, {g['memory_gib']} GiB" for g in result["gpus"]] or [
        f"gpu       none that torch sees (torch is built for {built})"
    ]
    said.append("onnx      " + (", ".join(result["providers"]) or "no onnxruntime"))
    for name, one in result["targets"].items():
        missing = [f"{n['what']} is missing ({n['cure']})" for n in one["needs"] if not n["there"]]
        needs = ", ".join(n["what"] for n in one["needs"]) or "nothing but torch"
        said.append(f"target    {name}: " + ("; ".join(missing) if missing else f"ready; needs {needs}"))
    said += [f"plugin    {p}" for p in result["plugins"]]
    said += [f"problem   {p}" for p in result["problems"]] or ["problems  none"]
    return said
