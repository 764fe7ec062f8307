"""What no trust and no option would bring in: classes of the script that saved a file, of packages that are not here,
and quantised modules."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable

from torch import nn

from ..errors import LoadError
from .rehearsal import first_line

_SCRIPT = "__main__"
_QUANTISED = re.compile(r"torch\.(\w+\.)*quantized\..*|(torchao|bitsandbytes|quanto)\..*")
_NO_CLASS = "save a program that needs no class: torch.export.save(torch.export.export(model, inputs), 'model.pt2')"
MISSING_CURE = (
    "put the folder of its module on the path (PYTHONPATH=FOLDER fxprune ..), or install its package; "
    f"or where the model was made call fxprune.compile(model, ...), or {_NO_CLASS}"
)
QUANTISED_CURE = "give the model as it was before quantisation; the result can be quantised afterwards"


def refuse_unreachable(names: Iterable[str], where: str) -> None:
    """Raise LoadError for names, dotted, that trusting the file would not bring either; nothing is imported."""
    names = list(names)
    own = [name.partition(".")[2] for name in names if name.startswith(f"{_SCRIPT}.")]
    if own:
        raise LoadError(
            f"the file needs the class {', '.join(own)} of the script that saved it",
            where=where,
            why=f"the file is whole, but holds no code: '{_SCRIPT}.{own[0]}' means the script that was running, "
            "where no other program can find it",
            cure=f"at the end of that script call fxprune.compile(model, ...) itself, or {_NO_CLASS}",
        )
    quantised = [name for name in names if is_quantised(name)]
    if quantised:
        raise LoadError(
            "quantised modules cannot be pruned",
            where=where,
            why=f"the file holds {', '.join(quantised[:3])}, whose weights are whole numbers with scales",
            cure=QUANTISED_CURE,
        )


def refuse_missing(names: Iterable[str], where: str) -> None:
    """Raise LoadError for names of a trusted file that are not here, with what would bring them."""
    names = sorted(names)
    refuse_unreachable((name for name in names if name.startswith(_SCRIPT)), where)
    for name in names:
        why = _absence(name)
        if why is not None:
            raise LoadError(f"the file needs {name}, which is not here", where=where, why=why, cure=MISSING_CURE)


def refuse_quantised(model: nn.Module, where: str) -> None:
    """Raise LoadError for a module whose weights are whole numbers with scales, by whichever package."""
    for path, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        packed = [type(t) for t in module._parameters.values() if t is not None and type(t) is not nn.Parameter]
        of_weights = [f"{t.__module__}.{t.__qualname__}" for t in packed]
        found = next((name for name in (kind, *of_weights) if is_quantised(name)), None)
        if found is not None:
            raise LoadError(
                "quantised modules cannot be pruned",
                where=f"{where}: {path}",
                why=f"it is a {found}, whose weights are whole numbers with scales",
                cure=QUANTISED_CURE,
            )


def is_quantised(dotted: str) -> bool:
    """Whether a class of this dotted name holds quantised weights.

    >>> [is_quantised(n) for n in ("torch.ao.nn.quantized.modules.linear.Linear", "torch.nn.modules.linear.Linear")]
    [True, False]
    """
    return _QUANTISED.fullmatch(dotted) is not None


def _absence(dotted: str) -> str | None:
    """Why a name cannot be had; None if it can. Imports its module."""
    module, _, name = dotted.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as failure:
        return first_line(failure)
    return None if hasattr(found, name) else f"{module} has no {name}: another version of it, or a renamed class"
