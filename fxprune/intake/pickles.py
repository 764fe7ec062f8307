"""Read what ``torch.save`` wrote without trusting it: tensors only, or modules of well-known packages.

Two locks guard a pickle. First it is *rehearsed*: the pickle program runs on inert stand-ins, so that every global it
wants, everything it would call and everything it would instantiate is known before anything is imported. Then torch's
restricted unpickler loads it, with exactly the names that passed. Module classes may be instantiated without running
their ``__init__``, never called; the only things a file may call are torch's own tensor rebuilders and the few
constructors in ``_CALLABLE``.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import io
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoadError
from ..process.libraries import survive_torchvision
from .refusals import MISSING_CURE, refuse_missing, refuse_unreachable
from .rehearsal import DAMAGED, TRUST_CURE, Rehearsal, first_line, rehearse

# Where module classes may live: package -> pattern of the modules that define layers and models.
_MODULE_HOMES = {
    "torch": re.compile(r"torch\.nn\.modules\.\w+|torch\.nn\.parallel\.data_parallel"),
    "torchvision": re.compile(r"torchvision\.models(\.\w+)+|torchvision\.ops(\.\w+)+"),
    "timm": re.compile(r"timm\.models(\.\w+)+|timm\.layers(\.\w+)+"),
    "transformers": re.compile(
        r"transformers\.models\.\w+\.(modeling|configuration)_\w+|transformers\.(activations|pytorch_utils)"
        r"|transformers\.(modeling|configuration)_\w+|transformers\.generation\.configuration_utils"
    ),
}
# Pure functions that modules keep as attributes. They may be stored, not called, by the file.
_FUNCTIONS = (
    frozenset(
        f"torch.nn.functional.{name}"
        for name in [
            "relu",
            "relu6",
            "silu",
            "gelu",
            "elu",
            "celu",
            "selu",
            "mish",
            "softplus",
            "softsign",
            "tanh",
            "sigmoid",
            "logsigmoid",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "leaky_relu",
            "softmax",
            "log_softmax",
            "normalize",
        ]
    )
    | {f"torch._C._nn.{name}" for name in ("gelu", "silu", "elu_", "softplus", "hardtanh", "hardswish", "mish")}
    | {"torch.relu", "torch.tanh", "torch.sigmoid", "torch.flatten"}
)
# What a file may call beside torch's tensor rebuilders; none of them runs foreign code when called.
_CALLABLE = frozenset({"functools.partial"})
_RECORDS = frozenset({"timm.models._features.FeatureInfo", "argparse.Namespace"})
_CONFIGS = ("PreTrainedConfig", "PretrainedConfig", "GenerationConfig")

# What a checkpoint may not even name: there is no honest reason to.
_HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|ctypes|pty|code|pickle|_pickle|torch\.hub)\b.*"
    r"|builtins\.(eval|exec|compile|open|__import__|getattr|setattr|delattr|globals|input|breakpoint)"
)

_LARGEST_PICKLE = 512 * 1024**2  # bytes of pickle program; tensors are stored beside it


def check_zip(source: Path | io.BytesIO, where: str, *, ratio: float) -> list[str]:
    """Names in a zip archive whose declared sizes are credible: in sum at most ``ratio`` times the file plus 16 MB.

    torch.save and torch.export.save store without compression, so anything larger is a bomb, not a model.
    """
    size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except Exception as failure:
        raise LoadError(
            "the archive cannot be read", where=where, why=f"{type(failure).__name__}: {failure}", cure=DAMAGED
        ) from None
    declared = sum(entry.file_size for entry in entries)
    if declared > ratio * size + 16 * 1024**2:
        raise LoadError(
            "the archive claims to hold more than a file of its size can",
            where=where,
            why=f"{declared} bytes declared, {size} bytes on disk",
            cure="do not use this file; get the model from its source again",
        )
    return [entry.filename for entry in entries]


def read_program(path: Path) -> bytes | None:
    """The pickle program of a zip file by ``torch.save``; None for a file in the format before torch 1.6.

    Raises LoadError for TorchScript archives and for anything that is no torch file.
    """
    where = str(path)
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise LoadError("the file is empty", where=where, why="0 bytes", cure=DAMAGED)
    if start != b"PK\x03\x04":
        if start[:1] == b"\x80":
            return None
        raise LoadError(
            "this is no file that torch.save wrote",
            where=where,
            why=f"it starts with {start!r}, neither a zip archive nor a pickle",
            cure="give a model.pt, a .pt2, a .safetensors checkpoint, a Hugging Face folder or timm:NAME",
        )
    names = check_zip(path, where, ratio=1.0)
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        raise LoadError(
            "this is a TorchScript archive",
            where=where,
            why="torch.jit.save wrote it; its code cannot be exported to an FX graph",
            cure="load the original nn.Module in Python and pass it to fxprune.compile, or torch.save the module",
        )
    if "data.pkl" not in inside:
        kind = "models/model.json" in inside
        raise LoadError(
            "this archive holds no pickled object",
            where=where,
            why="it looks like an exported program" if kind else "data.pkl is missing",
            cure="name it .pt2" if kind else DAMAGED,
        )
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        program = bytes(reader.get_record("data.pkl"))
    except Exception as failure:
        raise LoadError("the archive cannot be read", where=where, why=first_line(failure), cure=DAMAGED) from None
    if len(program) > _LARGEST_PICKLE:
        raise LoadError("the pickle is too large to check", where=where, why=f"{len(program)} bytes", cure=TRUST_CURE)
    return program


def load_pickle(path: Path, *, modules: bool, trust_pickle: bool = False) -> Any:
    """The object in a file that ``torch.save`` wrote, on the CPU.

    modules: allow ``nn.Module`` classes of torch, torchvision, timm and transformers; otherwise tensors and plain
    containers only. trust_pickle: load whatever it is, which runs the file's code.
    Raises LoadError, with the list of refused names, before anything in the file has run.
    """
    where = str(path)
    program = read_program(path)
    if trust_pickle:
        survive_torchvision()
        return _torch_load(path, weights_only=False, allowed={})
    if program is None:  # old format: several pickles in a row; weights only, no additions
        return _torch_load(path, weights_only=True, allowed={})
    try:
        seen = rehearse(program)
    except LoadError as error:
        raise LoadError(error.what, where=where, why=error.why, cure=error.cure) from None
    known = _list_torch_globals()
    wanted = sorted(seen.names - known)
    refused = [name for name in wanted if not (modules and _plausible(name) and not _is_shadowed(name, path))]
    if not refused and wanted:
        survive_torchvision()
    allowed: dict[str, Any] = {}
    if not refused:  # nothing is imported for a file that asks for anything else
        for name in wanted:
            thing = _resolve(name)
            if thing is None:
                refused.append(name)
            else:
                allowed[name] = thing
    unknown = {*refused, *known, *(() if not refused else filter(_plausible, wanted))}  # nothing of these was imported
    refused += sorted(n for n in seen.called - unknown - _CALLABLE if not _is_enum(allowed.get(n)))
    refused += sorted(n for n in seen.made - unknown - set(refused) if not isinstance(allowed.get(n), type))
    refuse_unreachable(refused, where)
    if refused:
        raise LoadError(
            "the pickle is refused: it wants code that is not on the allow-list",
            where=where,
            why="not allowed: " + ", ".join(refused[:20]) + (f" and {len(refused) - 20} more" if refused[20:] else ""),
            cure=TRUST_CURE,
        )
    loaded = _torch_load(path, weights_only=True, allowed=allowed)
    if isinstance(loaded, nn.Module):
        try:
            _check_undisturbed(loaded, where)
        except LoadError:
            raise
        except Exception as failure:  # a module whose state lacks what every module has
            raise LoadError(
                "the pickled module is damaged", where=where, why=first_line(failure), cure=DAMAGED
            ) from None
    return loaded


def read_weights(path: Path, *, trust_pickle: bool = False) -> Any:
    """The object in a checkpoint that ``torch.save`` wrote, on the CPU, for the tensors in it.

    What is neither a tensor nor a plain container (options, a logger, a module) becomes an inert object that holds what
    the file says of it: nothing is imported, called or made. trust_pickle: load whatever it is, as :func:`load_pickle`.
    Raises LoadError for a file that is damaged, or that asks for the interpreter itself.
    """
    program = read_program(path)
    if trust_pickle or program is None:
        return load_pickle(path, modules=False, trust_pickle=trust_pickle)
    try:
        seen = rehearse(program)
    except LoadError as error:
        raise LoadError(error.what, where=str(path), why=error.why, cure=error.cure) from None
    foreign = sorted(seen.names - _list_torch_globals())
    hostile = [name for name in foreign if _HOSTILE.fullmatch(name)]
    if hostile:
        raise LoadError(
            "the pickle is refused: it wants the interpreter itself, which no checkpoint needs",
            where=str(path),
            why=f"it names {', '.join(hostile[:20])}",
            cure=TRUST_CURE,
        )
    return _torch_load(path, weights_only=True, allowed={name: _stand_in(name, seen) for name in foreign})


class StandIn:
    """Stands for an object of a class that is not imported; ``state`` is what its file says of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str, seen: Rehearsal) -> type:
    """A class of its own for each name, so that nothing in the file can reach another."""
    if name in seen.keyed:
        return type("DictStandIn", (), {"__new__": lambda cls, *args: OrderedDict()})
    if name in seen.listed:
        return type("ListStandIn", (), {"__new__": lambda cls, *args: []})
    return type("StandIn", (StandIn,), {})


def _list_torch_globals() -> set[str]:
    """Names that torch's restricted unpickler allows by itself."""
    from torch import _weights_only_unpickler

    return set(_weights_only_unpickler._get_allowed_globals())


def _plausible(dotted: str) -> bool:
    """True if the name alone could be allowed; decided without importing anything."""
    if dotted in _FUNCTIONS or dotted in _CALLABLE or dotted in _RECORDS:
        return True
    module, _, name = dotted.rpartition(".")
    home = _MODULE_HOMES.get(dotted.partition(".")[0])
    return home is not None and bool(home.fullmatch(module)) and name.isidentifier() and not name.startswith("__")


def _resolve(dotted: str) -> Any:
    """The class or function behind an allowed name, or None if it is not what the allow-list means."""
    module_name, _, name = dotted.rpartition(".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # vars, not getattr: a module-level __getattr__ could import or run something else
            thing = vars(importlib.import_module(module_name)).get(name)
    except Exception:
        return None
    if dotted in _FUNCTIONS or dotted in _CALLABLE:
        return thing
    if not isinstance(thing, type) or f"{thing.__module__}.{thing.__qualname__}" != dotted:
        return None
    if issubclass(thing, torch.fx.GraphModule | torch.jit.ScriptModule):  # both carry code of their own
        return None
    if issubclass(thing, nn.Module) or _is_enum(thing) or _is_record(thing):
        return thing
    return thing if any(base.__name__ in _CONFIGS and _is_transformers(base) for base in thing.__mro__) else None


def _is_enum(thing: Any) -> bool:
    """An enumeration: calling it with a value only looks the member up."""
    return isinstance(thing, type) and issubclass(thing, enum.Enum)


def _is_record(thing: type) -> bool:
    """A class that only holds what modules are made by or describe themselves with, or what a trainer was asked."""
    return dataclasses.is_dataclass(thing) or f"{thing.__module__}.{thing.__qualname__}" in _RECORDS


def _is_transformers(thing: type) -> bool:
    return thing.__module__.partition(".")[0] == "transformers"


def _is_shadowed(dotted: str, path: Path) -> bool:
    """True if the package would come from the folder of the model file or the current folder, not an installation."""
    package = dotted.partition(".")[0]
    if package in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # imported without a spec
        return True
    if spec is None or spec.origin is None:
        return True
    home = Path(spec.origin).resolve().parent.parent
    return home in (path.resolve().parent, Path.cwd().resolve()) and "site-packages" not in home.parts


def _check_undisturbed(model: nn.Module, where: str) -> None:
    """Refuse instances whose state carries hooks or replaces a method: a file must not choose what runs."""
    for path, module in model.named_modules():
        hooks = sorted(k for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, Mapping) and v)
        methods = sorted(k for k in vars(module) if callable(getattr(type(module), k, None)))
        if hooks or methods:
            raise LoadError(
                "the pickled module is refused: its state carries hooks or replaces methods",
                where=f"{where}, submodule '{path}'",
                why=", ".join(hooks + methods),
                cure=TRUST_CURE,
            )


def _torch_load(path: Path, *, weights_only: bool, allowed: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(v, k) for k, v in allowed.items()]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=weights_only)
    except MemoryError:
        raise
    except Exception as failure:
        if not weights_only and isinstance(failure, AttributeError | ImportError):  # no damage: a class is not here
            refuse_missing(_names_in(path), str(path))
        cure = MISSING_CURE if isinstance(failure, AttributeError | ImportError) else DAMAGED
        if weights_only and isinstance(failure, pickle.UnpicklingError):
            cure = "save it again with a current torch.save; " + TRUST_CURE
        raise LoadError("torch cannot load the file", where=str(path), why=first_line(failure), cure=cure) from None


def _names_in(path: Path) -> set[str]:
    """The globals that a file names; none where it cannot be told."""
    try:
        return rehearse(read_program(path) or b"").names
    except LoadError:
        return set()
