"""How a caller's module is run here: in evaluation form, on copies of its inputs, and left as it was."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .containers import plain
from .forward import parameter_names
from .untouched import Originals, untouched


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and ``torch.compile``, in whatever order they were put
    around it."""
    while True:
        inner = getattr(model, "_orig_mod", None) if _is_compiled(model) else None
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _is_compiled(model: Any) -> bool:
    """What ``torch.compile`` returns for a module; asked without importing dynamo."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


@contextmanager
def evaluation_form(model: nn.Module) -> Iterator[Originals]:
    """``model`` in eval mode, without gradient regions, fused fast paths and compiled parts; as it was afterwards.

    What it keeps at its first call (grids, tables, masks) is gone again (:func:`fxprune.intake.untouched.untouched`).
    Tracing under ``no_grad`` keeps regions that a model wraps into ``no_grad`` itself (rotary tables) part of the flat
    graph. It is not recorded in the graph: the weights stay trainable.

    Yields what knows which tensors ``model.eval()`` wrote to (low-rank updates are merged there).
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with untouched(model) as originals, _nothing_compiled(model):
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                yield originals
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _nothing_compiled(model: nn.Module) -> Iterator[None]:
    """Parts that went through ``torch.compile`` run as they were written: machine code that is given fake tensors
    kills the process. Their names are those of the parts themselves. Whoever calls puts the model back."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        yield
        return
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if _is_compiled(child):
                module._modules[name] = child._orig_mod  # type: ignore[union-attr, assignment]
        if vars(module).get("_compiled_call_impl") is not None:  # module.compile() was called
            module._compiled_call_impl = None
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    free = get_eval_frame_callback() in (None, False)  # inside a compiled call nothing can be said any more
    with torch.compiler.set_stance("force_eager") if free else contextlib.nullcontext():
        yield


def spell_out(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Give ``model`` a ``forward`` that names these inputs, where its own hides them behind ``*args, **kwargs``.

    Tracing names sizes and inputs by its signature. Whoever calls puts the model back.
    """
    stated = inspect.signature(model.forward).parameters.values()
    named = [p for p in stated if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) >= len(args) and set(kwargs) <= {p.name for p in named}:
        return
    known = parameter_names(model)
    words = [*known[: len(args)], *(f"input_{i}" for i in range(len(known), len(args)))]
    inner = model.forward

    def forward(*positional: Any, **by_name: Any) -> Any:
        return inner(*positional, **by_name)

    parameters = [inspect.Parameter(word, inspect.Parameter.POSITIONAL_ONLY) for word in words]
    parameters += [inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY) for word in kwargs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    vars(model)["forward"] = forward


def own_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in plain containers of their own, every tensor a copy: a module may write into either."""
    positional, keyword = plain((tuple(args), dict(kwargs)), [], "input")
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (positional, keyword))


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``model`` returns for these inputs, in evaluation form; the model and the inputs are left as they were."""
    positional, keyword = own_inputs(args, kwargs)
    with evaluation_form(model):
        return model(*positional, **keyword)
