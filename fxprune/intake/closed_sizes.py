"""Which sizes of the inputs a capture could not keep open, and the line of the model that fixed each."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..ir.guards import listen_to_guards
from ..ir.open_sizes import shape_env_of
from .diagnose import line_of

if TYPE_CHECKING:
    import sympy

# Ops that hold a size against a weight's: what they close is a width of the model, and no length.
_WEIGHED = re.compile(r"(^|_)(mm|addmm|linear|conv\w*|\w*norm|multi_head_attention_forward|check_input)(_|$)")


@dataclass(frozen=True)
class Heard:
    """A condition on open sizes that torch decided by the example's, and where.

    line      of the model's code: ``file:line in function  `code` ``
    counted   whether a size was asked for as a Python number (``len(x)``, ``int(n)``, ``for row in x``)
    weighed   whether the size was held against that of a weight
    """

    condition: sympy.Basic
    line: str
    counted: bool
    weighed: bool


@dataclass(frozen=True)
class Closed:
    """A size of an input that is a constant in the graph.

    why   the line that fixed it, or what torch said when it was to stay open
    """

    name: str
    position: int
    size: int
    counts: bool  # an input of whole numbers: ids, masks, positions
    rank: int
    why: str = ""
    counted: bool = False

    @property
    def is_batch(self) -> bool:
        return self.position == 0

    def __str__(self) -> str:
        what = f"size of dimension {self.position} of '{self.name}'"
        if self.is_batch:
            what = "batch size"
        elif self.counts and self.rank == 2:
            what = "sequence length"
        return f"{what} fixed at {self.size}: {self.why or 'the code of the model fixes it'}"


@contextmanager
def listening() -> Iterator[list[Heard]]:
    """The conditions that torch decides by the example's sizes while a model is traced, as they come."""
    from torch._guards import TracingContext

    heard: list[Heard] = []

    def listen(condition: sympy.Basic) -> None:
        here = traceback.extract_stack()
        told = TracingContext.extract_stack()  # of the user's code, where dynamo reads it in Python's place
        names = {frame.name for frame in here}
        heard.append(
            Heard(condition, line_of(told or here), "guard_int" in names, any(_WEIGHED.search(name) for name in names))
        )

    with listen_to_guards(listen):
        yield heard


def openable(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions behind the batch that may be lengths: all of ids and masks, and of features of two or three dimensions
    (sound, sequences of vectors). Pictures, which have more, keep the example's size."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tuple(range(1, tensor.dim())) if tensor.dim() <= 3 else ()
    return tuple(range(1, tensor.dim()))


def find_closed_sizes(
    exported: ExportedProgram, heard: Sequence[Heard], lengths: Mapping[tuple[int, int], str], why: str = ""
) -> tuple[Closed, ...]:
    """The sizes that could be open and are not, of inputs that are read.

    A batch of 1 beside others is no closed one: it goes with every batch. Neither is a width of features: one that was
    held against a weight, or is 1.

    lengths  (id of an example tensor, dimension) that are lengths for sure, and what closed them as far as is known
    why      what to say of others where no line is known
    """
    env, found = shape_env_of(exported), list[Closed]()
    nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    example = pytree.tree_leaves(exported.example_inputs)
    for name, tensor in zip(exported.graph_signature.user_inputs, example, strict=True):
        value = nodes[name].meta.get("val") if name in nodes else None
        if not isinstance(value, Tensor) or not nodes[name].users or not value.dim():
            continue
        counts = not (value.is_floating_point() or value.is_complex())
        for position in range(value.dim()):
            size, sure = constant(value.shape[position]), lengths.get((id(tensor), position))
            if size is None or (sure is None and position and position not in openable(value)):
                continue
            about = _closing(value.shape[position], env, heard)
            is_width = position and not counts and sure is None and (about is None or about.weighed)
            if is_width or (size == 1 and (position == 0 or not counts)):
                continue
            said = (about.line if about is not None else "") or sure or why
            if size == 1:
                said = "torch takes a size of 1 for a constant; give a longer example"
            counted = about is not None and about.counted
            found.append(Closed(name, position, size, counts, value.dim(), said, counted))
    return tuple(found)


def constant(size: int | torch.SymInt) -> int | None:
    """The value of a size without symbols; a specialised one is still a SymInt."""
    if isinstance(size, torch.SymInt):
        return None if size.node.expr.free_symbols else int(size.node.expr)
    return size


def _closing(size: int | torch.SymInt, env: Any, heard: Sequence[Heard]) -> Heard | None:
    """What was asked when the symbol of a size that is a constant now became one; None where it never was a symbol."""
    from sympy import Eq

    raw = getattr(getattr(size, "node", None), "_expr", None)
    if raw is None or env is None or not getattr(raw, "free_symbols", None):
        return None
    names = set(raw.free_symbols)
    for _ in range(len(env.replacements)):  # one symbol stood for another before it became a number
        names |= {s for name in names for s in getattr(env.replacements.get(name), "free_symbols", ())}
    about = [h for h in heard if h.condition.free_symbols & names]
    alone = [h for h in about if isinstance(h.condition, Eq) and len(h.condition.free_symbols) == 1]
    return next(iter(alone or about), None)
