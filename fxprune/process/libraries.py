"""What surrounds a model file: a torchvision that may not import, and a network that must not be used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TORCHVISION_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def survive_torchvision() -> bool:
    """Make ``import torchvision`` work where its wheel was built for another torch (CUDA wheel, CPU torch).

    Such a torchvision cannot load its compiled ops and dies at import with "operator torchvision::nms does not exist",
    and takes timm and parts of transformers along. Declaring the two schemas it asks for is enough for everything but
    the ops themselves. A torchvision that works, or is absent, is left alone. Safe to call any number of times.

    Returns True if a torchvision is importable afterwards.
    """
    if "torchvision" in sys.modules:
        return True
    try:
        if importlib.util.find_spec("torchvision") is None:
            return False
    except (ImportError, ValueError):
        return False
    try:
        importlib.import_module("torchvision")
        return True
    except RuntimeError as failure:
        if "torchvision::" not in str(failure):
            return False
    except Exception:  # broken in another way: whoever needs it will say so
        return False
    # The failed import left submodules behind; they would be reused half-initialised.
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    for name, schema in _TORCHVISION_SCHEMAS.items():
        if not _has_schema(name):
            torch.library.define(name, schema)
    try:
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


def _has_schema(name: str) -> bool:
    namespace, op = name.split("::")
    return hasattr(getattr(torch.ops, namespace), op)


@contextmanager
def offline() -> Iterator[None]:
    """Keep huggingface_hub, transformers and timm off the network inside the block; everything is put back after it.

    The environment variables matter before huggingface_hub is imported, its module constant after.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    already_imported = "huggingface_hub" in sys.modules
    constants: Any = None
    flag = _states_offline(before)
    try:
        constants = importlib.import_module("huggingface_hub.constants")
        flag = constants.HF_HUB_OFFLINE if already_imported else flag
        constants.HF_HUB_OFFLINE = True
    except ImportError:
        pass
    try:
        yield
    finally:
        if constants is not None:
            constants.HF_HUB_OFFLINE = flag
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _states_offline(environment: dict[str, str | None]) -> bool:
    stated = environment["HF_HUB_OFFLINE"] or environment["TRANSFORMERS_OFFLINE"] or ""
    return stated.upper() in {"1", "ON", "YES", "TRUE"}
