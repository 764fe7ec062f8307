"""Ops that a library brings: a program that calls them is read only where that library was imported before."""

from __future__ import annotations

import importlib
import re
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..errors import LoadError
from ..process.libraries import survive_torchvision

LIBRARIES = {"transformers": "transformers.integrations.moe", "torchvision": "torchvision"}
"""Namespace -> the module that registers its ops. Nothing else is imported because a file names it."""
_OWN = frozenset({"aten", "prims", "prim", "higher_order"})
_CALLED = re.compile(rb"torch\.ops\.(\w+)\.")


def foreign_ops(exported: ExportedProgram) -> list[str]:
    """Ops of the graph that PyTorch does not bring, ``namespace::name``, in order."""
    called = (n.target for n in exported.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    return list(dict.fromkeys(op.name().partition(".")[0] for op in called if op.namespace not in _OWN))


def notes_on_ops(exported: ExportedProgram) -> list[str]:
    """What somebody must know who loads the program with torch alone."""
    by_library: dict[str, list[str]] = {}
    for name in foreign_ops(exported):
        by_library.setdefault(LIBRARIES.get(name.partition("::")[0], ""), []).append(name)
    return [
        f"model.pt2 calls {', '.join(names)}: before torch.export.load it needs 'import {module}' (fxprune.load "
        "does that)"
        for module, names in by_library.items()
        if module
    ]


def import_libraries(path: Path) -> None:
    """Import the libraries of :data:`LIBRARIES` whose ops a ``.pt2`` file calls. Raises LoadError where one is missing.

    What is wrong with the file is for whoever reads it to say.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            graphs = [archive.read(n) for n in archive.namelist() if "/models/" in f"/{n}" and n.endswith(".json")]
    except Exception:  # zipfile and zlib raise about ten types for damage
        return
    for namespace in sorted({match.decode() for graph in graphs for match in _CALLED.findall(graph)} & set(LIBRARIES)):
        survive_torchvision()
        try:
            importlib.import_module(LIBRARIES[namespace])
        except ImportError as error:
            raise LoadError(
                f"the program calls ops of {namespace}",
                where=str(path),
                why=str(error),
                cure=f"pip install {namespace}",
            ) from error
