"""``.pt2`` files: written so that a full disk is an error and not a crash, read so that a hostile one runs no code.

``torch.export.load`` is not safe on its own: a weight may be marked as a pickle, symbolic sizes go through
``sympy.sympify`` (which is ``eval``), guards are compiled as Python, an op may be any attribute of ``torch``, and a
compiled library may lie inside. :func:`check_archive` looks at every one of these places first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import LoadError
from ..ir.rebuild import copy_graph, rebuild
from ..process.silence import quiet
from .archive_safety import check_archive, first_words, open_archive
from .op_libraries import import_libraries


class _Writer:
    """A file that never raises into torch.

    torch's archive writer aborts the whole process when a write fails (its destructor throws), so the first failure is
    remembered and what follows is dropped; ``error`` is raised once torch is done.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except BaseException as error:  # Ctrl-C may land here as well; it must not unwind through C++ either
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def write_program(exported: ExportedProgram, path: Path) -> None:
    """Write ``exported`` as a ``.pt2`` that torch alone can read. Raises OSError when the file cannot be written.

    The bytes depend on the program only: writing it twice gives the same file.
    """
    exported = _own_empties(exported)
    with open(path, "wb") as file:
        writer = _Writer(file)
        with quiet():
            torch.export.save(exported, writer)  # type: ignore[arg-type]
        if writer.error is not None:
            raise writer.error


def _own_empties(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` with empty tensors (a table of no register tokens) that lie nowhere in memory.

    Loaders leave them in somebody's storage, and torch's archive writer then looks for their bytes at address 0.
    """
    empty = {n for n, t in exported.state_dict.items() if t.numel() == 0 and t.untyped_storage().data_ptr()}
    if not empty:
        return exported
    state = {name: _fresh(t) if name in empty else t for name, t in exported.state_dict.items()}
    return rebuild(exported, copy_graph(exported), state_dict=state)


def _fresh(tensor: Tensor) -> Tensor:
    new = tensor.detach().new_empty(tensor.shape)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def read_program(path: str | Path, *, trust: bool = False) -> ExportedProgram:
    """The ExportedProgram in ``path``. Raises LoadError when it is missing, damaged, or could run code.

    trust   skip the search for code; only for files whose author you trust
    """
    path = Path(path)
    if trust:
        open_archive(path).close()
    else:
        check_archive(path)
    import_libraries(path)
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:  # torch raises about ten types for a damaged or foreign archive
        raise LoadError(
            "the exported program cannot be read",
            where=str(path),
            why=first_words(error),
            cure="it may come from another torch version, need an op library that is not imported, or be "
            "damaged: export it again",
        ) from error
