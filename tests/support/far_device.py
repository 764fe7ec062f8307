"""A second device without a GPU: ``far`` computes in the CPU's memory, and mixes with CPU tensors no more than a GPU.

``import support.far_device`` registers it for the whole process, so only processes of their own do. Its tensors hold
the CPU tensor that they stand for; every op runs on those, and one that is given tensors of both devices is an error
that names the op. It is stricter than CUDA, where an index may lie on the CPU and is fetched at every use: here it may
not. What it does not tell: dtypes and ops that CUDA lacks, streams, memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
COPIES = ("copy_", "_to_copy", "_copy_from")  # these alone go from one device to another
FACTORIES = (
    "empty.memory_format", "empty_strided", "eye", "eye.m", "arange", "arange.start", "arange.start_step", "linspace",
    "full", "zeros", "ones", "rand", "randn", "randint", "randint.low", "randperm", "scalar_tensor", "tril_indices",
    "triu_indices",
)  # fmt: skip

_setup_privateuseone_for_python_backend(NAME)


class FarTensor(Tensor):
    """A tensor on the device: ``near`` is the one that it stands for."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        made: FarTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(op, *args, **(kwargs or {}))

    # what torch asks of a tensor's memory and not of an op

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> Any:
        return self.near.untyped_storage()

    def tolist(self) -> Any:
        return self.near.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, **more).to(device or NAME)

    def __matmul__(self, other: Tensor) -> Tensor:
        if self.dim() == 1 and other.dim() == 2:  # torch squeezes this product in place, which no wrapper can follow
            return torch.matmul(self[None], other)[0]
        return torch.matmul(self, other)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op on the tensors that its arguments stand for; what comes out stands on the device that it belongs to."""
    flat, structure = pytree.tree_flatten((args, kwargs))
    name, far = op._schema.name.partition("::")[2], [t for t in flat if isinstance(t, FarTensor)]
    others = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, FarTensor) and t.dim()]
    if far and others and name not in COPIES:
        shapes = [(t.device.type, *t.shape) for t in flat if isinstance(t, Tensor)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {op} was given {shapes}")
    near = [_near(value) for value in flat]
    nearby, named = pytree.tree_unflatten(near, structure)
    found = op(*nearby, **named)
    if name == "copy_":
        return args[0]
    device = kwargs.get("device")
    stays = device is None or torch.device(device).type == NAME
    same = {id(n): f for n, f in zip(near, flat, strict=True) if isinstance(f, FarTensor)}  # of ops that write in place
    return pytree.tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else FarTensor(t) if stays else t, found)


def _near(value: Any) -> Any:
    if isinstance(value, FarTensor):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


_libraries = [torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")]
_libraries[0].fallback(lambda op, *args, **kwargs: _run(op, *args, **kwargs), "PrivateUse1")
for _name in FACTORIES:
    _packet, _, _overload = _name.partition(".")
    _libraries[1].impl(
        _name, partial(_run, getattr(getattr(torch.ops.aten, _packet), _overload or "default")), "PrivateUse1"
    )
