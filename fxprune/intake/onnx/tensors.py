"""Tensors of an ONNX file: within it, or beside it in files that its folder holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from ..rehearsal import first_line
from .graph import DTYPES

DAMAGED = "the file is damaged or incomplete: copy or download it again"
_EXTERNAL = 1  # TensorProto.DataLocation


def read_tensor(tensor: Any, path: Path, what: str) -> Tensor:
    """An ``onnx.TensorProto`` of the file ``path`` as a tensor of its own memory.

    what   names it in errors: ``initialiser conv.weight``

    Raises LoadError where its dtype is none that can be pruned, its bytes are missing, or it names a file that does not
    lie in the folder of ``path``.
    """
    dtype = dtype_of(tensor.data_type, f"{path}: {what}")
    shape = tuple(int(size) for size in tensor.dims)
    if min(shape, default=0) < 0:
        raise LoadError("a tensor has a negative size", where=f"{path}: {what}", why=f"{list(shape)}", cure=DAMAGED)
    size = math.prod(shape) * dtype.itemsize
    if tensor.data_location == _EXTERNAL:
        data = _beside(tensor, path, what, size)
    elif tensor.HasField("raw_data"):
        data = bytearray(tensor.raw_data)
    else:
        return _of_fields(tensor, path, what, dtype, shape)
    if len(data) != size:
        why = f"{list(shape)} {str(dtype).removeprefix('torch.')} takes {size} bytes, there are {len(data)}"
        raise LoadError("a tensor does not hold what it says", where=f"{path}: {what}", why=why, cure=DAMAGED)
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)


def dtype_of(number: int, where: str) -> torch.dtype:
    """The dtype that ONNX gives this number. Raises LoadError for texts, and numbers of 4 and 8 bits that torch does
    not compute with."""
    if number in DTYPES:
        return DTYPES[number]
    import onnx

    known = {v: k for k, v in onnx.TensorProto.DataType.items()}
    name = known.get(number, str(number))
    texts = name == "STRING"
    raise LoadError(
        "texts cannot be computed with" if texts else "this type of number cannot be pruned",
        where=where,
        why=f"its type is {name}",
        cure="cut the file where the tokens begin: onnx.utils.extract_model(...)"
        if texts
        else "give the model as it was before quantisation; the result can be quantised afterwards",
    )


def _beside(tensor: Any, path: Path, what: str, size: int) -> bytearray:
    """The bytes of a tensor whose data lie in a file beside the model's."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{path}: {what}"
    source = _inside(path.parent, said.get("location", ""), where)
    try:
        offset, length = int(said.get("offset") or 0), int(said.get("length") or size)
    except ValueError:
        raise LoadError("the place of a tensor is no number", where=where, why=str(said)[:200], cure=DAMAGED) from None
    have = source.stat().st_size
    if length != size or offset < 0 or offset + size > have:
        why = f"{size} bytes are wanted, {length} at {offset} of {source.name} are named, which has {have}"
        raise LoadError("a tensor does not hold what it says", where=where, why=why, cure=DAMAGED)
    data = bytearray(size)
    try:
        with source.open("rb") as file:
            file.seek(offset)
            got = file.readinto(data)
    except OSError as failure:
        raise LoadError("the file beside the model cannot be read", where=where, why=str(failure)) from None
    return data[:got]


def _inside(folder: Path, location: str, where: str) -> Path:
    """The file that ``location`` names, if it is one of the folder's."""
    odd = "\0" in location or Path(location).is_absolute() or ".." in Path(location).parts or "\\" in location
    found = None if odd or not location else folder / location
    if found is None or not found.resolve().is_relative_to(folder.resolve()):
        raise LoadError(
            "the file names data outside its folder",
            where=where,
            why=f"its data are said to lie at {location!r}"
            + ("" if found is None or not found.is_symlink() else f", which leads to {found.resolve()}"),
            cure="nothing outside the model's folder is read: put both files into one folder, and no links",
        )
    if not found.is_file():
        raise LoadError(
            "the file with the model's data is missing",
            where=where,
            why=f"there is no {location} in {folder}",
            cure="it belongs beside the .onnx: copy both",
        )
    return found


def _of_fields(tensor: Any, path: Path, what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose numbers lie in typed fields; onnx knows which, and how they are packed."""
    import numpy as np

    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(tensor)
        if dtype is torch.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32))).to(dtype).reshape(shape)
        return torch.from_numpy(np.array(array)).to(dtype).reshape(shape)
    except Exception as failure:  # numpy and onnx raise many types for numbers that do not fit
        why = first_line(failure)
        raise LoadError("a tensor cannot be read", where=f"{path}: {what}", why=why, cure=DAMAGED) from None
