"""The ONNX file: checked without its weights, then written tensor by tensor, so that no copy of all of them is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import LoweringError
from ...ir.provenance import first_line
from ...process.silence import quiet

SMALL = 1024  # bytes of a constant that shape inference may want to read
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto in onnx.proto
_LENGTH_DELIMITED = 2  # of protobuf's wire types


def write_checked(model: Any, path: Path, inline: bool) -> None:
    """Write an ``onnx_ir.Model`` as ``path``; without ``inline`` large weights go to ``<path>.data``.

    Raises LoweringError where it is not valid ONNX or its shapes contradict each other. ``path`` lies in a folder of
    its own: other files are made and removed there.

    ONNX's checker and its serialiser each copy whatever a model holds, twice. Neither needs the weights: shapes do not
    depend on large ones, and in a file they are bytes behind a length.
    """
    import onnx_ir

    with _without_weights(model, path.parent) as large:
        light = path.with_name("check.onnx")
        try:
            with quiet():
                onnx_ir.save(model, light)
            _check(light, str(model.graph.name))
        finally:
            light.unlink(missing_ok=True)
        proto = onnx_ir.to_proto(model)
    if inline:
        _write_inline(proto, large, path)
    else:
        with quiet():
            onnx_ir.save(model, path, external_data=f"{path.name}.data")


@contextmanager
def _without_weights(model: Any, aside: Path) -> Iterator[dict[str, Any]]:
    """While it lasts, large weights of the model stand in an empty file in ``aside``, which takes no room. By name."""
    import onnx_ir

    initializers = model.graph.initializers.values()
    values = [v for v in initializers if v.const_value is not None and v.const_value.nbytes > SMALL]
    large = {str(v.name): v.const_value for v in values}
    empty, offset = aside / "check.data", 0
    try:
        for value in values:
            tensor = value.const_value
            value.const_value = onnx_ir.ExternalTensor(
                empty.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=aside
            )
            offset += tensor.nbytes
        with empty.open("wb") as file:
            file.truncate(offset)
        yield large
    finally:
        for value in values:
            value.const_value = large[str(value.name)]
        empty.unlink(missing_ok=True)


def _check(path: Path, name: str) -> None:
    import onnx

    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise LoweringError("the exported graph is not valid ONNX", where=name, why=first_line(error)) from error
    except Exception as error:  # shape inference errors have no common type over onnx's versions
        raise LoweringError(
            "shapes in the exported graph contradict each other", where=name, why=first_line(error)
        ) from error


def _write_inline(proto: Any, large: dict[str, Any], path: Path) -> None:
    """A serialised ModelProto whose graph holds ``large`` behind its other fields, written one at a time."""
    import onnx

    graph, kept, heads = proto.graph, [], []
    for one in graph.initializer:
        if one.name in large:
            head = onnx.TensorProto(dims=one.dims, data_type=one.data_type, name=one.name).SerializeToString()
            size = large[one.name].nbytes
            start = head + _field(RAW_DATA, size)
            heads.append((one.name, _field(INITIALIZER, len(start) + size) + start, size))
        else:
            kept.append(one)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    inner = graph.SerializeToString()
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(GRAPH, len(inner) + sum(len(head) + size for _, head, size in heads)))
        file.write(inner)
        for name, head, size in heads:
            file.write(head)
            start = file.tell()
            large[name].tofile(file)
            assert file.tell() - start == size, f"{name} took {file.tell() - start} bytes, not {size}"


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field.

    >>> _field(7, 300).hex()
    '3aac02'
    """
    value, out = length, bytearray([number << 3 | _LENGTH_DELIMITED])
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
