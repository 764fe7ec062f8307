"""Exporting a module that states which of its sizes are open: those stay open, and no others become so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from .closed_sizes import constant
from .diagnose import first_line, last_word
from .evaluation import run
from .forward import parameter_names
from .open_export import Ask, Opened
from .stated import StatesInputs

Words = Mapping[str, Mapping[int, str]]


def export_stated(
    model: StatesInputs, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[Opened, list[str]]:
    """(the exported module, notes on sizes that could not stay open). An example batch of 1 is doubled where the batch
    is open; one that cannot stay open is 1 where the model takes one sample. Raises CaptureError."""
    names = [*parameter_names(model)[: len(args)], *kwargs]
    words = {n: model.open_words().get(n, {}) for n in names}
    batches = frozenset(words[n][0] for n in names if 0 in words[n])
    lengths = frozenset(w for places in words.values() for w in places.values()) - batches
    given = _with_rows(dict(zip(names, [*args, *kwargs.values()], strict=True)), words, batches, 2, least=True)
    failure: Exception | None = None
    for shut in (frozenset[str](), lengths, batches | lengths):
        try:
            exported = _attempt(model, given, len(args), words, shut)
        except Exception as error:  # torch raises anything here
            failure = failure or error
            continue
        closed = _find_closed(exported, words)
        if closed & batches and any(given[n].shape[0] > 1 for n in names if words[n].get(0) in closed):
            single = _with_rows(given, words, closed & batches, 1)
            if _runs(model, single, len(args)):
                given = single
                exported = _attempt(model, given, len(args), words, closed)
        return Opened(exported, Ask((), strict=True), (), ()), _tell(given, words, closed, failure)
    assert failure is not None
    raise last_word(failure, name) from failure


def _with_rows(
    given: Mapping[str, Tensor], words: Words, batches: frozenset[str], rows: int, *, least: bool = False
) -> dict[str, Tensor]:
    """The inputs with so many rows wherever the size of these ``batches`` stands; ``least``: more are left alone. torch
    takes a size of 1 for a constant."""
    found = dict(given)
    for n, tensor in given.items():
        for i, word in words[n].items():
            if word in batches and (tensor.shape[i] != rows) and not (least and tensor.shape[i] > rows):
                index = torch.arange(rows, device=tensor.device) % tensor.shape[i]
                found[n] = found[n].index_select(i, index)
    return found


def _attempt(
    model: StatesInputs, given: Mapping[str, Tensor], positional: int, words: Words, shut: frozenset[str]
) -> ExportedProgram:
    values = list(given.values())
    args, kwargs = tuple(values[:positional]), dict(list(given.items())[positional:])
    sizes = {n: {i: Dim.AUTO for i, word in words[n].items() if word not in shut} for n in given}
    return torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)


def _runs(model: StatesInputs, given: Mapping[str, Tensor], positional: int) -> bool:
    try:
        run(model, list(given.values())[:positional], dict(list(given.items())[positional:]))
    except Exception:
        return False
    return True


def _find_closed(exported: ExportedProgram, words: Words) -> frozenset[str]:
    """Words of sizes that are constants in the graph."""
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    names: Sequence[Any] = exported.graph_signature.user_inputs
    found = set[str]()
    for name, places in zip(names, words.values(), strict=True):
        value = values.get(name)
        if isinstance(value, Tensor):
            found |= {word for i, word in places.items() if constant(value.shape[i]) is not None}
    return frozenset(found)


def _tell(given: Mapping[str, Tensor], words: Words, closed: frozenset[str], failure: Exception | None) -> list[str]:
    sizes = {word: int(given[n].shape[i]) for n, places in words.items() for i, word in places.items()}
    why = first_line(failure) if failure is not None else "the graph computes with its value, and not with a size"
    return [f"the open size '{word}' is fixed at {sizes[word]}: {why}" for word in sorted(closed)]
