"""Files of tensors: ``.npz``, ``.safetensors`` and what ``torch.save`` wrote, read without running anything."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LoadError
from .pickles import StandIn, load_pickle, read_weights
from .rehearsal import first_line

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".npz", ".safetensors", *TORCH_SUFFIXES)

_LARGEST_ARRAYS = 16 * 1024**3  # bytes a compressed .npz may unpack to
_DAMAGED = "the file is damaged or incomplete: copy or download it again"
# Where training scripts put the weights inside their checkpoints, in the order they are preferred.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
AVERAGED = re.compile(r"(^|_)ema(_|$)")  # state_dict_ema, model_ema, ema, params_ema
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def existing(path: Path) -> Path:
    """``path`` if a readable file is there. Raises LoadError if it is missing, empty or a directory."""
    try:
        if path.is_dir():
            raise LoadError("this is a directory, not a file", where=str(path), cure="name the file inside it")
        if path.stat().st_size == 0:
            raise LoadError("the file is empty", where=str(path), why="0 bytes", cure=_DAMAGED)
    except OSError as failure:
        raise LoadError(
            "there is no such file" if isinstance(failure, FileNotFoundError) else "the file cannot be read",
            where=str(path),
            why=failure.strerror or str(failure),
            cure="check the path",
        ) from None
    except ValueError as failure:  # a path with a zero byte
        raise LoadError("this is no path", where=repr(str(path)), why=str(failure)) from None
    return path


def kind_of(path: Path) -> str:
    """What a file is by its name: its suffix in small letters, ``.pth`` for a ``model.pth.tar``.

    >>> kind_of(Path("Best.PTH.tar")), kind_of(Path("w.safetensors"))
    ('.pth', '.safetensors')
    """
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix == ".tar" and inner in TORCH_SUFFIXES else suffix


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Named tensors of a ``.npz``, ``.safetensors`` or ``.pt``/``.pth`` file, on the CPU.

    A lone tensor is named ``"x"``; what is no tensor, array or number is left out. Nested mappings of tensors get
    dotted names. Raises LoadError for a file that is missing, damaged, holds no tensors or wants to run code.
    """
    path = existing(Path(path))
    suffix = kind_of(path)
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".safetensors":
        return read_safetensors(path)
    if suffix in TORCH_SUFFIXES:
        tensors: dict[str, Tensor] = {}
        _gather(load_pickle(path, modules=False), "", tensors)
        if not tensors:
            raise LoadError("the file holds no tensors", where=str(path), cure="save a dict of tensors by torch.save")
        return tensors
    raise LoadError(
        "tensors cannot be read from this kind of file",
        where=str(path),
        why=f"its suffix is '{path.suffix}'",
        cure=f"known: {', '.join(SUFFIXES)}",
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a ``.safetensors`` file. Raises LoadError if it is damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as failure:  # SafetensorError, and OSError or ValueError below it
        raise LoadError(
            "the safetensors file cannot be read", where=str(path), why=first_line(failure), cure=_DAMAGED
        ) from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            declared = sum(entry.file_size for entry in entries)
            if declared > _LARGEST_ARRAYS:
                raise LoadError(
                    "the arrays are too large",
                    where=str(path),
                    why=f"{declared} bytes when unpacked, the limit is {_LARGEST_ARRAYS}",
                    cure="save the few hundred samples that calibration needs",
                )
            for entry in entries:
                if entry.filename.endswith(".npy"):
                    with archive.open(entry) as member:
                        array = _read_npy(member, entry.file_size, f"{path}: {entry.filename}")
                    tensors[entry.filename.removesuffix(".npy")] = from_array(array, f"{path}: {entry.filename}")
    except LoadError:
        raise
    except Exception as failure:  # zipfile, zlib and numpy raise many types for damaged files
        raise LoadError(
            "the .npz file cannot be read", where=str(path), why=first_line(failure), cure=_DAMAGED
        ) from None
    if not tensors:
        raise LoadError(
            "the file holds no arrays", where=str(path), cure="write it with numpy.savez(path, x=..., y=...)"
        )
    return tensors


def _read_npy(member: Any, size: int, where: str) -> np.ndarray:
    """One array; its header is believed only as far as there are bytes behind it."""
    fmt = np.lib.format
    version = fmt.read_magic(member)
    header = fmt.read_array_header_1_0(member) if version == (1, 0) else fmt.read_array_header_2_0(member)
    shape, fortran, dtype = header
    if dtype.hasobject:
        raise LoadError(
            "the array holds Python objects, which only pickle can read",
            where=where,
            cure="save arrays of numbers (labels as integers, texts in a .csv)",
        )
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize > size:
        raise LoadError(
            "the array is shorter than its header says",
            where=where,
            why=f"shape {shape} of {dtype} needs {count * dtype.itemsize} bytes, there are {size}",
            cure=_DAMAGED,
        )
    data = member.read(count * dtype.itemsize)
    array = np.frombuffer(data, dtype=dtype, count=count)
    return array.reshape(shape, order="F" if fortran else "C").copy()


def from_array(array: np.ndarray, where: str) -> Tensor:
    """The array as a tensor that shares its memory where it can. Raises LoadError for a type that torch lacks."""
    try:
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(array)
    except TypeError:
        raise LoadError(
            "the array's type is none that torch knows",
            where=where,
            why=f"dtype {array.dtype}",
            cure="save float32, int64, uint8 or bool; texts belong into a .csv or .jsonl",
        ) from None


def _gather(value: Any, name: str, into: dict[str, Tensor], depth: int = 0) -> None:
    if isinstance(value, Tensor):
        into[name or "x"] = value.detach()
    elif isinstance(value, Mapping) and depth < 8:
        for key, item in value.items():
            _gather(item, f"{name}.{key}" if name else str(key), into, depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 8 and all(isinstance(item, Tensor) for item in value):
        for key, item in zip(("x", "y"), value, strict=False):  # (inputs, labels) as people save them
            into[f"{name}.{key}" if name else key] = item.detach()


@dataclass(frozen=True)
class Weights:
    """A state dict as it lies in a checkpoint: its tensors by name, under which key they lay, and which others lay
    beside them ("" for a file that is the state dict itself)."""

    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Which were taken, where there was a choice."""
        if not self.others:
            return ()
        why = "averages of those of the last steps, as timm takes them" if AVERAGED.search(self.key) else "the first"
        return (f"the checkpoint holds weights under {', '.join((self.key, *self.others))}: {self.key} taken ({why})",)


def read_checkpoint(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Weights:
    """The state dict in a checkpoint, without wrappers (``{"state_dict": ...}``) and prefixes (``module.``).

    Averaged weights (``state_dict_ema``) are preferred to those of the last step, as timm's own loader does.
    trust_pickle: run whatever code the file contains. Raises LoadError if there is none, or if reading it would.
    """
    path = existing(Path(path))
    if kind_of(path) == ".safetensors":
        found: Any = read_safetensors(path)
    elif kind_of(path) in TORCH_SUFFIXES:
        found = read_weights(path, trust_pickle=trust_pickle)
    else:
        raise LoadError(
            "this is no kind of checkpoint",
            where=str(path),
            why=f"its suffix is '{path.suffix}'",
            cure=f"known: .safetensors, {', '.join(TORCH_SUFFIXES)}",
        )
    weights = find_weights(found)
    if weights is None:
        raise LoadError(
            "the checkpoint holds no state dict",
            where=str(path),
            why=f"it holds a {type(found).__name__}" + _keys(found),
            cure="save model.state_dict()",
        )
    return replace(weights, tensors=_strip_prefixes(weights.tensors))


def find_weights(found: Any, depth: int = 0) -> Weights | None:
    """The mapping of names to tensors inside what a checkpoint holds, or None."""
    if isinstance(found, nn.Module):
        return Weights(dict(found.state_dict()))
    if isinstance(found, StandIn):
        return Weights(tensors) if (tensors := _state_of(found)) else None
    if not isinstance(found, Mapping) or depth > 3:
        return None
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if tensors and 2 * len(tensors) >= len(found):
        return Weights(tensors)
    averaged = [k for k in found if isinstance(k, str) and AVERAGED.search(k)]
    inner = {k: w for k in (*averaged, *_WRAPPERS) if k in found and (w := find_weights(found[k], depth + 1))}
    if not inner:
        return None
    key, chosen = next(iter(inner.items()))
    return replace(chosen, key=".".join(filter(None, (key, chosen.key))), others=(*chosen.others, *list(inner)[1:]))


def _state_of(module: StandIn) -> dict[str, Tensor]:
    """What ``state_dict()`` of a pickled module would say, by what its file says of it; {} for another object."""
    state = module.state if isinstance(module.state, Mapping) else {}
    parts = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, Mapping) for part in parts):
        return {}
    parameters, buffers, children = parts
    left_out = state.get("_non_persistent_buffers_set") or ()
    held = {**parameters, **{n: b for n, b in buffers.items() if n not in left_out}}  # type: ignore[dict-item, union-attr]
    found = {str(n): t.detach() for n, t in held.items() if isinstance(t, Tensor)}
    for name, child in children.items():  # type: ignore[union-attr]
        if isinstance(child, StandIn):
            found |= {f"{name}.{n}": t for n, t in _state_of(child).items()}
    return found


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {n: t for n, t in state.items() if n != "n_averaged"}  # torch.optim.swa_utils counts beside its module
    while result:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in result)), None)
        if prefix is None:
            break
        result = {name.removeprefix(prefix): tensor for name, tensor in result.items()}
    return result


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _keys(found: Any) -> str:
    return f" with the keys {shorten(map(str, found))}" if isinstance(found, Mapping) else ""
