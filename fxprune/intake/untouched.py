"""What a run may not change: a caller's module, everything that it holds, and the inputs it is given.

Modules keep things at their first call: grids, tables and masks, in attributes, dicts, lists, objects of their own,
defaults of functions, tables of their source file. While a module is traced those are fake tensors, and one that stays
behind breaks the module for good. So what can be reached from it is remembered before a run and put back after it.
"""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_MOST = 1_000_000  # objects that are looked at
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)
_LIBRARIES = frozenset({"torch", "numpy", "sympy", "fxprune", *sys.stdlib_module_names}) - {"__main__"}
_MISSING = object()
_Remembered = tuple[Iterable[Any], Callable[[], None] | None]
"""What else to look at, and what puts this one back."""


@contextmanager
def untouched(*roots: Any) -> Iterator[Originals]:
    """Behind the block, what can be reached from ``roots`` is what it was before it: the same objects with the same
    contents, in containers, attributes and tensors; so is the state of torch's random numbers.

    roots   modules, containers, tensors; objects and functions are followed to what they hold, the classes of modules
            to what their code names

    Weights are not copied: a tensor is when an op of torch first writes to it. What is written past torch, through
    numpy or by an extension, is not seen. Yields what knows which tensors were written to.
    """
    tensors: list[Tensor] = []
    random_numbers = torch.get_rng_state()
    undo = _remember(roots, tensors)
    originals = Originals(tensors)
    caches = {cache: cache.cache_info().currsize for cache in _caches_of_functions()}
    try:
        with originals:
            yield originals
    finally:
        originals.restore()
        for one in undo:
            one()
        torch.set_rng_state(random_numbers)
        for cache, size in caches.items():
            if cache.cache_info().currsize > size:
                cache.cache_clear()  # what was made while tracing is fake, and kept for every later call


def _remember(roots: Iterable[Any], tensors: list[Tensor]) -> list[Callable[[], None]]:
    """What puts everything back that is reached from ``roots``; the tensors among it are appended to ``tensors``."""
    undo, seen, todo = list[Callable[[], None]](), dict[int, Any](), deque(roots)
    while todo and len(seen) < _MOST:
        value = todo.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value  # kept alive, so that its id stays its own
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            tensors.append(value)
        inside, back = _look(value)
        todo.extend(inside)
        if back is not None:
            undo.append(back)
    return undo


def _look(value: Any) -> _Remembered:
    if isinstance(value, Tensor):
        return ((), None) if isinstance(value, FakeTensor) else _tensor(value)
    if isinstance(value, dict):
        return _dict(value)
    if isinstance(value, list | deque | set):
        return _collection(value)
    if isinstance(value, tuple | frozenset):
        return value, None
    if isinstance(value, types.CellType):
        return _cell(value)
    if isinstance(value, types.FunctionType):
        if (value.__module__ or "").startswith("fxprune."):  # a hook of ours: it may keep what it hears
            return (), None
        code = None if _of_a_library(value) else _Code(value.__globals__, _list_globals(value))
        return (code, *(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, vars(value)), None
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__), None
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords), None
    if isinstance(value, torch.Generator):
        return (), _generator(value)
    if isinstance(value, _Code):
        return value.look()
    return _object(value)


def _generator(generator: torch.Generator) -> Callable[[], None]:
    state = generator.get_state()

    def back() -> None:
        generator.set_state(state)

    return back


def _tensor(tensor: Tensor) -> _Remembered:
    """Its storage, gradient and whether it is trained; what is in the storage is the business of `Originals`."""
    alias, leaf, trained = tensor.detach(), tensor.is_leaf, tensor.requires_grad
    gradient = tensor.grad if leaf else None

    def back() -> None:
        if tensor.shape != alias.shape or _storage(tensor) != _storage(alias):
            tensor.data = alias  # somebody wrote `parameter.data = ...`
        if leaf and tensor.grad is not gradient:
            tensor.grad = gradient
        if leaf and tensor.requires_grad is not trained:
            tensor.requires_grad_(trained)

    return (gradient, getattr(tensor, "__dict__", None)), back


def _dict(value: dict[Any, Any]) -> _Remembered:
    held = list(value.items())

    def back() -> None:
        now = list(value.items())
        if len(now) != len(held) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, held, strict=True)):
            value.clear()
            value.update(held)

    return (v for _, v in held), back


def _collection(value: list[Any] | deque[Any] | set[Any]) -> _Remembered:
    held = list(value)

    def back() -> None:
        if len(value) != len(held) or any(a is not b for a, b in zip(value, held, strict=True)):
            value.clear()
            value.update(held) if isinstance(value, set) else value.extend(held)

    return held, back


def _cell(cell: types.CellType) -> _Remembered:
    try:
        held = cell.cell_contents
    except ValueError:  # nothing in it yet
        return (), None

    def back() -> None:
        if cell.cell_contents is not held:
            cell.cell_contents = held

    return (held,), back


def _object(value: Any) -> _Remembered:
    """Attributes of an object that is nobody's library; of a module also what its classes keep."""
    if not isinstance(value, nn.Module) and _of_a_library(type(value)):
        return (), None
    classes = [c for c in type(value).__mro__ if not _of_a_library(c)]
    held = {n: getattr(value, n, _MISSING) for c in classes for n in _slots(c)}

    def back() -> None:
        for name, one in held.items():
            if one is _MISSING and hasattr(value, name):
                object.__delattr__(value, name)
            elif one is not _MISSING and getattr(value, name, _MISSING) is not one:
                object.__setattr__(value, name, one)

    codes = [_Code(c, tuple(vars(c))) for c in classes] if isinstance(value, nn.Module) else []
    return (getattr(value, "__dict__", None), *held.values(), *codes), back if held else None


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return tuple(n for n in ((slots,) if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__"))


@dataclass(frozen=True, eq=False)
class _Code:
    """A class, or the globals of a function, and the names there that a module may keep something under.

    They are put back only where tensors came in: whatever else changes there (a library that was found, an op that was
    registered) is the process's, not the module's.
    """

    home: type | dict[str, Any]
    names: tuple[str, ...]

    def look(self) -> _Remembered:
        space: Mapping[str, Any] = vars(self.home) if isinstance(self.home, type) else self.home
        held = {n: space[n] for n in self.names if n in space}
        boxes = [(v, _look(v)[1], _tensors_in(v)) for v in held.values() if isinstance(v, dict | list | set | deque)]

        def back() -> None:
            for name, value in held.items():
                if space.get(name) is not value and _tensors_in(space.get(name)):
                    setattr(self.home, name, value) if isinstance(self.home, type) else self.home.update({name: value})
            for box, undo, before in boxes:
                if undo is not None and not _tensors_in(box) <= before:
                    undo()

        return [f for v in held.values() if (f := _function_in(v, self.home)) is not None], back


def _function_in(value: Any, home: type | dict[str, Any]) -> types.FunctionType | None:
    """The function behind an entry of a class, or of a source file: one that was imported there is another file's."""
    inner = (
        value.fget if isinstance(value, property) else getattr(value, "__func__", getattr(value, "__wrapped__", value))
    )
    here = isinstance(home, type) or getattr(inner, "__globals__", None) is home
    return inner if isinstance(inner, types.FunctionType) and here else None


def _list_globals(function: types.FunctionType) -> tuple[str, ...]:
    """Global names in the code of a function, inner functions included."""
    codes, names = [function.__code__], dict[str, None]()
    while codes:
        code = codes.pop()
        names.update(dict.fromkeys(code.co_names))
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return tuple(names)


def _tensors_in(value: Any) -> set[int]:
    return {
        id(leaf)
        for leaf in pytree.tree_leaves(list(value) if isinstance(value, set) else value)
        if isinstance(leaf, Tensor)
    }


def _of_a_library(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _LIBRARIES


class _CachesOfFunctions:
    """Every ``functools.lru_cache`` of this process, but those of Python and torch themselves.

    Looking through all objects of a large process takes a tenth of a second, and a capture asks several times. Every
    cache holds a reference to its type: from how many there are it is seen whether one was made since the last look.
    """

    def __init__(self) -> None:
        self.known: list[weakref.ref[Any]] = []
        self.references = -1  # to the type, at the last look

    def __call__(self) -> list[Any]:
        kind = functools._lru_cache_wrapper
        alive = [cache for known in self.known if (cache := known()) is not None]
        if sys.getrefcount(kind) - len(alive) != self.references - len(self.known):
            alive = [o for o in gc.get_referrers(kind) if type(o) is kind]
            self.references, self.known = sys.getrefcount(kind), [weakref.ref(cache) for cache in alive]
        return [cache for cache in alive if not _of_a_library(cache)]


_caches_of_functions = _CachesOfFunctions()


class Originals(TorchDispatchMode):
    """Keeps what was in the storage of a tensor, and its version, until an op first writes to it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.versions = [(t, t._version) for t in tensors if not t.is_inference()]
        self.storages = {where: t for t in tensors if (where := _storage(t))}
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # none for an op that takes graphs
        if schema is not None and schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(args[i] if i < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def wrote(self, tensor: Any) -> bool:
        """Whether ``tensor`` will hold something else once everything is put back."""
        where = _storage(tensor)
        return where in self.saved or (where != 0 and where not in self.storages)

    def _save(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            where = _storage(tensor)
            if where in self.storages and where not in self.saved:
                with _disable_current_modes():  # a fake tensor mode would take the copy for one of its own
                    whole = _whole(self.storages[where])
                    self.saved[where] = whole, whole.clone()

    def restore(self) -> None:
        """What was written to holds what it held."""
        with torch.no_grad():
            for whole, before in self.saved.values():
                whole.copy_(before)
        moved = [(t, version) for t, version in self.versions if t._version != version]
        if moved:
            torch._C._autograd._unsafe_set_version_counter(tuple(t for t, _ in moved), tuple(v for _, v in moved))


def _storage(tensor: Any) -> int:
    """Where the storage of a real tensor lies; 0 for one that has none, and for what is no tensor."""
    if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # of a subclass that wraps others
        return 0


def _whole(tensor: Tensor) -> Tensor:
    """The bytes of its storage. [bytes] uint8"""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
