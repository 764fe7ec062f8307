"""Whether an archive of a program holds nothing but a program: no code in names, targets, guards or inputs."""

from __future__ import annotations

import ast
import io
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadError

MAX_JSON = 512 * 2**20  # bytes of one description inside the archive; a graph of 50 000 nodes needs about a tenth
_OPS = re.compile(r"torch\.ops\.(?!load_library\b|import_module\b)[A-Za-z]\w*\.[A-Za-z_]\w*(\.[A-Za-z]\w*)?")
_SYMBOLIC = re.compile(r"torch\.(sym_|_sym_)\w+|torch\._check(_is_size)?|math\.(ceil|floor|trunc|sqrt|log|exp)")


_OPERATOR = frozenset(
    {
        "getitem",
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "pow",
        "neg",
        "pos",
        "abs",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and_",
        "or_",
        "xor",
        "not_",
    }
)


_FORBIDDEN_OPS = frozenset({"torch.ops.aten.from_file.default", "torch.ops.aten.from_file.out"})
_SYMBOL = re.compile(r"[A-Za-z]+\d*")
_NAME = re.compile(r"[\w.:/@<>\[\]-]*")  # what torch writes for nodes, inputs and parameters; no quotes, no calls
_SPEC = re.compile(r"[\w\s.:/@<>|\[\]{}\",\\-]*")
_NAME_KEYS = frozenset({"name", "as_name", "fqn", "parameter_name", "buffer_name", "tensor_constant_name", "path_name"})


_SYMPY = frozenset(
    {
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "FloorDiv",
        "CeilDiv",
        "CleanDiv",
        "ModularIndexing",
        "PythonMod",
        "Max",
        "Min",
        "Abs",
        "CeilToInt",
        "FloorToInt",
        "TruncToInt",
        "TruncToFloat",
        "RoundToInt",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloatPow",
        "PowByNatural",
        "ToFloat",
        "Where",
        "Eq",
        "Equality",
        "Ne",
        "Unequality",
        "Lt",
        "StrictLessThan",
        "Le",
        "LessThan",
        "Gt",
        "StrictGreaterThan",
        "Ge",
        "GreaterThanEqual",
        "GreaterThan",
        "And",
        "Or",
        "Not",
        "Xor",
        "true",
        "false",
        "oo",
        "int_oo",
        "True",
        "False",
        "LShift",
        "RShift",
        "IsNonOverlappingAndDenseIndicator",
        "OpaqueUnaryFn_sqrt",
        "OpaqueUnaryFn_log",
        "BitwiseFn_bitwise_and",
        "BitwiseFn_bitwise_or",
    }
)


_GUARD_NAMES = frozenset({"L", "max", "min", "math", "len", "isinstance", "int", "float", "bool", "str"}) | _SYMPY
_GUARD_METHODS = frozenset({"size", "stride", "storage_offset", "dim", "floor", "ceil", "trunc", "sqrt"})


_ARITHMETIC = (
    ast.Expression,
    ast.BoolOp,
    ast.UnaryOp,
    ast.BinOp,
    ast.Compare,
    ast.Call,
    ast.Constant,
    ast.Subscript,
    ast.Tuple,
    ast.List,
    ast.keyword,
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.IfExp,
)


_END = struct.Struct("<4s4H2LH")  # the records that end a zip file, and a large one
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


def check_archive(path: str | Path) -> None:
    """Raise LoadError unless ``path`` is a ``.pt2`` archive in which nothing can run code when it is loaded."""
    path = Path(path)
    with open_archive(path) as archive:
        try:
            sound = _one_directory(path)
        except (OSError, OverflowError, struct.error):  # an offset that points nowhere
            sound = False
        if not sound:
            raise LoadError(
                "the archive is malformed",
                where=str(path),
                why="its directory is not where it says",
                cure="write it again with torch.export.save",
            )
        names = archive.namelist()
        inner = [name.partition("/")[2] for name in names]
        if "archive_format" not in inner:
            raise LoadError(
                "this file is not a .pt2 program",
                where=str(path),
                why="it has no 'archive_format' entry: another kind of zip, or written before torch 2.8",
                cure="write it with torch.export.save",
            )
        if len(set(inner)) != len(inner):
            raise LoadError("the archive is malformed", where=str(path), why="two entries have the same name")
        for name, entry in zip(names, inner, strict=True):
            reason = _code_in_name(entry)
            if not reason and entry.endswith(".json"):
                reason = _code_in_json(read_json(archive, name, path))
            if not reason and entry.startswith("data/sample_inputs/"):
                reason = _code_in_inputs(archive, name)
            if reason:
                raise LoadError(
                    "the file could run code when loaded, so it is refused",
                    where=f"{path}: {entry}",
                    why=reason,
                    cure="if you trust its author: `--trust-pickle`",
                )


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive. Raises LoadError where there is none, or it is damaged."""
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise LoadError("there is no such file", where=str(path)) from None
    except IsADirectoryError:
        raise LoadError("this is a directory, not a .pt2 file", where=str(path)) from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise LoadError(
            "the file is damaged or not a .pt2 program",
            where=str(path),
            why=str(error),
            cure="copy or write it again; a download that stopped half way looks like this",
        ) from None
    except OSError as error:
        raise LoadError("the file cannot be read", where=str(path), why=error.strerror or str(error)) from None


def _one_directory(path: Path) -> bool:
    """The zip directory lies where its end record says, right before that record.

    Python finds the directory from the end of the file, torch by the recorded offset. In a crafted file these are two
    directories, and what was checked would not be what is loaded.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size))
        tail = file.read()
        end = _END.unpack(tail[-_END.size :])
        length, offset, stop = end[5], end[6], size - _END.size
        if end[0] != b"PK\5\6":
            return False  # a comment follows; torch writes none
        if tail[:4] == b"PK\6\7":
            stop = _LOCATOR.unpack(tail[: _LOCATOR.size])[2]
            file.seek(stop)
            record = file.read(_END64.size)
            if len(record) < _END64.size or stop + _END64.size + len(tail) != size:
                return False
            length, offset = _END64.unpack(record)[8:10]
    return bool(offset + length == stop)


def read_json(archive: zipfile.ZipFile, name: str, path: Path) -> Any:
    """One of its descriptions as plain data. Raises LoadError where it is too large or no JSON."""
    size = archive.getinfo(name).file_size
    if size > MAX_JSON:
        raise LoadError(
            "the archive is malformed",
            where=f"{path}: {name}",
            why=f"a description of {size} bytes, the limit is {MAX_JSON}",
        )
    try:
        return json.loads(archive.read(name) or b"null")
    except Exception as error:  # zipfile, zlib and json raise about ten types for damage
        raise LoadError("the file is damaged", where=f"{path}: {name}", why=first_words(error)) from None


def _code_in_name(entry: str) -> str:
    """Why an entry of this name could run code, or ""."""
    if entry.startswith("data/aotinductor/"):
        return "it holds a compiled library"
    file = entry.rpartition("/")[2]
    if entry.startswith("data/constants/") and not file.startswith("tensor_") and not file.endswith(".json"):
        return "it holds a pickled object among its constants"
    if entry.startswith("data/weights/") and file.endswith(".pt"):
        return "it holds pickled weights"
    return ""


def _code_in_inputs(archive: zipfile.ZipFile, name: str) -> str:
    """Why the example inputs could run code, or "". torch unpickles them in full where the restricted way fails."""
    try:
        if data := archive.read(name):
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # a refused name, or damage that the full unpickler might read
        return "its example inputs are more than tensors in plain containers"
    return ""


def _code_in_json(value: Any) -> str:
    """Why one of the descriptions could run code, or ""."""
    for key, item in _pairs(value):
        if key == "use_pickle" and item:
            return "a tensor in it is a pickle"
        if key in ("target", "as_operator") and isinstance(item, str) and not _safe_target(item):
            return f"its graph calls '{item[:80]}', which is not an operator"
        if key == "expr_str" and not (isinstance(item, str) and _safe_expression(item, _SYMPY, frozenset())):
            return f"a size in it is not arithmetic: '{str(item)[:80]}'"
        if key in _NAME_KEYS and isinstance(item, str) and not _NAME.fullmatch(item):
            return f"a name in it is not a name: '{item[:80]}'"
        if key == "forward_arg_names" and not all(isinstance(n, str) and n.isidentifier() for n in item or ()):
            return "an argument name in it is not a name"
        if key in ("in_spec", "out_spec") and isinstance(item, str) and not _safe_spec(item):
            return f"the structure of its {key.removesuffix('_spec')}puts is not plain"
        if key == "guards_code" and not all(
            isinstance(g, str) and _safe_expression(g, _GUARD_NAMES, _GUARD_METHODS) for g in item or ()
        ):
            return "a guard in it is not a comparison of sizes"
    return ""


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of every object inside ``value``."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _safe_spec(text: str) -> bool:
    """No enumeration and no defaultdict (both import by name), nor escapes that could spell them."""
    return bool(_SPEC.fullmatch(text)) and not any(mark in text for mark in ("__", "default_factory", "\\u"))


def _safe_target(target: str) -> bool:
    if target.startswith("_operator."):
        return target.removeprefix("_operator.") in _OPERATOR
    if target in _FORBIDDEN_OPS:
        return False
    return bool(_OPS.fullmatch(target) or _SYMBOLIC.fullmatch(target)) or ("." not in target and ":" not in target)


def _safe_expression(text: str, names: frozenset[str], methods: frozenset[str]) -> bool:
    """Only arithmetic and comparisons over ``names`` and symbols, with ``methods`` as the only attributes."""
    if len(text) > 100_000 or "__" in text:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_safe_node(node, names, methods) for node in ast.walk(tree))


def _safe_node(node: ast.AST, names: frozenset[str], methods: frozenset[str]) -> bool:
    match node:
        case ast.Attribute():
            return node.attr in methods
        case ast.Name():
            return node.id in names or _symbol(node.id)
        case ast.Call(func=ast.Name()):
            return node.func.id in names  # type: ignore[attr-defined]
        case ast.Constant(value=str()):  # in a guard a string names an input, elsewhere a symbol
            return "L" in names or bool(_SYMBOL.fullmatch(str(node.value)))
    return isinstance(node, _ARITHMETIC)


def _symbol(name: str) -> bool:
    """A symbolic size: letters and a number, such as ``s77`` or ``u0``. Never the name of a Python builtin."""
    return bool(re.fullmatch(r"[A-Za-z]+\d+", name))


def first_words(error: BaseException) -> str:
    """What an error said first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
