"""A model that is opened again is not traced again: a :class:`Program` is a value, and the same one for equal models.

Many tests open the same small model, and tracing it is half of what they take. Two things that torch reads of its own
source at every call are read once. With ``--full`` nothing is remembered.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.ir.program import Program

MOST = 48  # programs that are kept
LARGEST = 4 * 2**20  # bytes of weights of one that is


class Captures:
    """``capture`` with a memory. What cannot be told apart from another by its parts is captured as ever."""

    def __init__(self, capture: Callable[..., Program]) -> None:
        self.capture = capture
        self.kept: OrderedDict[bytes, tuple[Program, bytes]] = OrderedDict()
        self.named: list[Any] = []  # functions and classes that keys name by their ids, which must stay theirs

    def __call__(
        self, model: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, name: str = "model"
    ) -> Program:
        key = self._key(model, args, kwargs, name)
        if key in self.kept:
            program, weights = self.kept.pop(key)
            if weights == _weights(program):  # nobody trained what they were given
                self.kept[key] = program, weights
                return program
        program = self.capture(model, args, kwargs, name=name)
        if key:
            self.kept[key] = program, _weights(program)
            if len(self.kept) > MOST:
                self.kept.popitem(last=False)
        return program

    def _key(self, *asked: Any) -> bytes:
        """What a program is a function of; empty where that is not known."""
        model = asked[0]
        if not isinstance(model, torch.nn.Module) or isinstance(model, torch.jit.ScriptModule):
            return b""
        if sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) > LARGEST:
            return b""
        written = io.BytesIO()
        pickler = _Parts(written, self.named)
        try:
            pickler.dump(
                (*asked, torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            )
        except Exception:  # something holds what cannot be written: a file, a lock, a tensor of another kind
            return b""
        return hashlib.sha256(written.getvalue()).digest()


class Hints:
    """``typing.get_type_hints`` with a memory for classes of modules that never change: torch's file format."""

    def __init__(self, hints: Callable[..., dict[str, Any]]) -> None:
        self.hints, self.known = hints, dict[type, dict[str, Any]]()

    def __call__(self, of: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if getattr(of, "__module__", "") != "torch._export.serde.schema" or not isinstance(of, type):
            return self.hints(of, *args, **kwargs)
        if of not in self.known:
            self.known[of] = self.hints(of, *args, **kwargs)
        return self.known[of]


class Translations:
    """``torch.onnx.export`` that parses the source of its translations once per opset."""

    def __init__(self, export: Callable[..., Any]) -> None:
        self.export, self.known = export, dict[int, Any]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read = ONNXRegistry.from_torchlib

        def registry(opset_version: int = 18) -> Any:
            if opset_version not in self.known:
                self.known[opset_version] = read(opset_version)
            one = copy.copy(self.known[opset_version])
            one.functions = {op: list(several) for op, several in one.functions.items()}  # a call adds its own
            return one

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
            return self.export(*args, **kwargs)


class _Parts(pickle.Pickler):
    """Tensors by their contents, functions and classes by their identity, everything else by its parts."""

    def __init__(self, file: io.BytesIO, named: list[Any]) -> None:
        super().__init__(file)
        self.named, self.tensors = named, dict[int, int]()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter):
                raise pickle.PicklingError(f"a {type(value).__name__}")
            number = self.tensors.setdefault(id(value), len(self.tensors))  # the same twice is not two equal ones
            form = value.dtype, tuple(value.shape), value.stride(), value.requires_grad, value.device.type
            return "tensor", number, *map(str, form), _contents(value)
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            self.named.append(value)
            forward = vars(value).get("forward") if isinstance(value, type) else None
            self.named.append(forward)
            return "named", id(value), id(forward)
        return None


def _contents(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").digest()


def _weights(program: Program) -> bytes:
    held = {**program.exported.state_dict, **program.exported.constants}
    parts = (name.encode() + _contents(t) for name, t in held.items() if isinstance(t, Tensor))
    return hashlib.sha256(b"".join(parts)).digest()
