"""A pruned program's tensors in the model's own class: under its names, in its layers, with the numbers its code reads.

Names survive capture. What the class computes with them is never presumed: it is run on them, and its outputs are
compared with the program's.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import LoweringError
from ...intake.forward import parameter_names
from ...ir.agreement import relative_error
from ...ir.program import Program
from ...ir.provenance import first_line
from ...target.parity import eager
from .config_numbers import KnownClass, Path
from .modeling_pruned import set_numbers, state_sizes

CLOSE = 1e-4
MOST_TRIES = 64
Numbers = Mapping[str, Mapping[str, int]]
"""Module -> the numbers that its code reads, as ``set_numbers`` takes them."""


@dataclass(frozen=True)
class ClassState:
    """What a program holds, by the names of the class's own state dict.

    tensors  all of them; tied ones are one tensor
    shapes   of those that are smaller than the dense model's
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]]


def input_names(program: Program, model: nn.Module) -> tuple[str, ...]:
    """Names of the class's own arguments for the program's inputs, in graph order. Raises LoweringError for one that is
    no plain value."""
    args, kwargs = program.example_inputs
    if len(pytree.tree_leaves((args, kwargs))) != len(args) + len(kwargs):
        raise LoweringError(
            "the inputs are nested, which a folder cannot state", where="--target hf", cure="give each input its name"
        )
    return (*parameter_names(model)[: len(args)], *kwargs)


def state_of(program: Program, model: nn.Module) -> ClassState:
    """The program's tensors under the names of ``model``'s state dict; what the graph no longer reads is the dense
    model's. Raises LoweringError where the program has a parameter that the class has not."""
    own = model.state_dict(keep_vars=True)
    names = {*own, *(n for n, _ in model.named_parameters(remove_duplicate=False))}
    foreign = sorted(set(program.exported.graph_signature.inputs_to_parameters.values()) - names)
    if foreign:
        raise LoweringError(
            f"{type(model).__name__} has no weight '{foreign[0]}'",
            where="--target hf",
            why="a pass put it into the graph, and the class computes without it",
            cure="`--target eager` or `--target onnx` take any graph",
        )
    have = program.tensors
    by_value = {id(own[name]): have[name] for name in own if name in have}
    tensors = {name: have.get(name, by_value.get(id(value), value)).detach() for name, value in own.items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t.shape != own[name].shape}
    return ClassState(tensors, shapes)


def numbers_for(
    program: Program, model: nn.Module, state: ClassState, flat: Sequence[Any], want: Sequence[Any]
) -> tuple[Numbers | None, str]:
    """(the numbers to set so that the class computes on ``flat`` what the program does, ""), or (None, what is wrong
    without any).

    Tried are none, then those numbers that the code of a layer's owner reads and that shrink with one of its weights,
    as few as possible.
    """
    options, wrong = _options(model, state), ""
    subsets = itertools.chain.from_iterable(itertools.combinations(options, count) for count in range(len(options) + 1))
    for chosen in itertools.islice(subsets, MOST_TRIES):
        numbers: dict[str, dict[str, int]] = {}
        for option in chosen:
            for module, (name, value) in option.items():
                numbers.setdefault(module, {})[name] = value
        try:
            got = run_class(program, model, state, numbers, flat)
        except Exception as error:  # whatever the class's code says of such shapes
            wrong = wrong or first_line(error)
            continue
        if len(got) == len(want) and all(g.shape == w.shape for g, w in zip(got, want, strict=True)):
            error_found = relative_error(got, want)
            if error_found <= CLOSE:
                return numbers, ""
            wrong = wrong or f"its outputs differ by {error_found:.1e}"
        wrong = wrong or "its outputs have other shapes"
    return None, wrong


def run_class(
    program: Program, model: nn.Module, state: ClassState, numbers: Numbers, flat: Sequence[Any]
) -> list[Tensor]:
    """Outputs of the dense model's own code on the pruned tensors; the model is left as it was."""
    wearing = functools.partial(torch.func.functional_call, model, dict(state.tensors), tie_weights=False)
    with _wear_sizes(model, state, numbers):
        return run_module(program, lambda *args, **kwargs: wearing(args, kwargs), flat)


def run_module(program: Program, model: Callable[..., Any], flat: Sequence[Any]) -> list[Tensor]:
    """Outputs of a module that takes the program's inputs."""
    args, kwargs = pytree.tree_unflatten(list(flat), program.exported.call_spec.in_spec)
    with torch.no_grad():
        made = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def find_config_refusal(
    program: Program, known: KnownClass, numbers: Mapping[Path, int], state: ClassState, flat: Sequence[Any]
) -> str:
    """Why the class, built with these numbers of its config, does not compute on ``flat`` what the program does; "" if
    it does."""
    try:
        model = known.build(numbers, state.tensors)
        got, want = run_module(program, model, flat), eager(program.exported)(flat)
    except Exception as error:  # whatever the class's code says of such numbers
        return first_line(error)
    distance = relative_error(got, want) if len(got) == len(want) else float("inf")
    return "" if distance <= CLOSE else f"its outputs differ by {distance:.1e}"


@contextmanager
def _wear_sizes(model: nn.Module, state: ClassState, numbers: Numbers) -> Iterator[None]:
    """The modules of ``model`` say the sizes of the pruned tensors; put back afterwards."""
    owners = {name.rpartition(".")[0] for name in state.shapes}
    touched = {name: model.get_submodule(name) for name in (*owners, *numbers)}
    before = {name: dict(vars(module)) for name, module in touched.items()}
    try:
        for name, shape in state.shapes.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight":
                state_sizes(touched[owner], shape)
        for name, said in numbers.items():
            set_numbers(touched[name], dict(said))
        yield
    finally:
        for name, module in touched.items():
            vars(module).update(before[name])


def _options(model: nn.Module, state: ClassState) -> list[dict[str, tuple[str, int]]]:
    """What may have to be set: one number of all modules of a class at a time, module -> (its name, the value)."""
    own = dict(model.state_dict(keep_vars=True))
    found: dict[tuple[type, str, str, int], dict[str, tuple[str, int]]] = {}
    for name, shape in state.shapes.items():
        layer, _, leaf = name.rpartition(".")
        owner = layer.rpartition(".")[0]
        module = model.get_submodule(owner)
        for position, (new, old) in enumerate(zip(shape, own[name].shape, strict=True)):
            if new == old:
                continue
            for attribute, value in _numbers_read(module).items():
                scaled = value * Fraction(new, old)
                if scaled.denominator == 1 and 0 < scaled < value:
                    key = (type(module), attribute, f"{layer.rpartition('.')[2]}.{leaf}", position)
                    found.setdefault(key, {})[owner] = (attribute, int(scaled))
    unique = {tuple(sorted(option.items())): option for option in found.values()}
    return list(unique.values())


def _numbers_read(module: nn.Module) -> dict[str, int]:
    """The whole numbers that the code of a module reads of itself or of its config, as its source names them."""
    names = _read(type(module), "forward", set())
    own = {n: v for n, v in vars(module).items() if n in names}
    config = getattr(module, "config", None) if "config" in names else None
    if config is not None:
        own |= {f"config.{n}": getattr(config, n) for n in sorted(names) if hasattr(config, n) and n not in own}
    return {n: v for n, v in own.items() if type(v) is int and v > 1}


def _read(cls: type, method: str, seen: set[str]) -> set[str]:
    """Names in the code of a method, and of the methods of the class that it calls."""
    code = getattr(inspect.unwrap(getattr(cls, method)), "__code__", None)
    if not isinstance(code, CodeType) or method in seen:
        return set()
    seen.add(method)
    names = set(code.co_names)
    for name in sorted(names):
        if inspect.isfunction(getattr(cls, name, None)) and not hasattr(nn.Module, name):
            names |= _read(cls, name, seen)
    return names
