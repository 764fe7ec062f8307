"""From a module to a :class:`Program`: ``torch.export`` in evaluation form with the batch (and sequence) left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..ir.program import Program
from ..ir.rebuild import copy_graph, rebuild
from ..ir.writes import find_written_inputs
from ..process.silence import quiet
from .containers import plain, plain_signature
from .evaluation import evaluation_form, spell_out, unwrap
from .faithful import compare_with_module
from .open_export import Opened, export_open, read_strictly
from .stated import StatesInputs
from .stated_export import export_stated
from .untouched import Originals

Example = tuple[tuple[Any, ...], dict[str, Any]]


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "model",
) -> Program:
    """Export ``model`` in evaluation form. Its training flags, hooks and weights are as before when this returns.

    model    a module, or a program that is already exported (then the inputs are ignored)
    args     example inputs; dimension 0 of every tensor is the batch, the others of ids, masks, sounds and sequences of
             vectors are lengths where they are no widths. They stay symbolic wherever the model allows it; where it
             does not, the program's ``notes`` say so, with the line of the model that fixed them. An example batch of 1
             is doubled; of a model that takes one sample only, or whose batch cannot stay open, it is 1.

    The program shares the model's weights. Its outputs are plain dicts, tuples and lists: a ModelOutput or a dataclass
    becomes a dict without its empty fields, an object that is no container (a KV cache) is left out with a note. It
    computes what the model computes, on the example and at other sizes: ``proof`` says how nearly.
    Raises CaptureError with the op, the source line and a cure.
    """
    notes: list[str] = []
    if isinstance(model, ExportedProgram):
        return Program(plain_signature(model, notes), name=name, notes=tuple(notes))
    model = unwrap(model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"a {type(model).__name__} cannot be captured",
            where=name,
            why="torch.export traces the Python code of an nn.Module",
            cure="pass the nn.Module itself, or a torch.export.ExportedProgram",
        )
    given = _example(args, kwargs or {}, name)
    with evaluation_form(model) as originals, _plain_outputs(model, notes), quiet():  # silence what is said meanwhile
        spell_out(model, *given)
        opened, said = _open(model, given, name)

        def program_of(opened: Opened) -> Program:
            exported = plain_signature(_own_state(opened.exported, originals), notes)
            return Program(exported, name=name)

        program = program_of(opened)
        try:
            link, more = compare_with_module(model, program)
        except CaptureError:
            read = read_strictly(opened, model)  # the other way of tracing may not take that turn
            if read is None:
                raise
            program = program_of(read)
            link, more = compare_with_module(model, program)
    return program.but(proof=(link,), notes=tuple(dict.fromkeys([*said, *notes, *more])))


def _open(model: nn.Module, given: Example, name: str) -> tuple[Opened, list[str]]:
    """The exported module, and which sizes were fixed by what. A batch of 1 is doubled, for torch takes a size of 1 for
    a constant; where two samples cannot be taken, or are taken as two for ever, it is 1 as it was given. A module that
    states which sizes are open is taken at its word."""
    if isinstance(model, StatesInputs):
        return export_stated(model, *given, name)
    twice = _double_batch(given)
    if twice is None:
        opened = export_open(model, *given, name)
        batch = [str(c) for c in opened.closed if c.is_batch][:1]
        return opened, [*batch, *(str(c) for c in opened.closed if not c.is_batch)]
    why: str | None
    try:
        opened = export_open(model, *twice, name)
        why = next((c.why for c in opened.closed if c.is_batch), None)
    except CaptureError as error:
        why = f"of two samples the model says: {error.why}" + (f" ({error.where})" if error.where else "")
    said = []
    if why is not None:
        opened = export_open(model, *given, name)
        said = [f"batch size fixed at 1: {why or 'the code of the model fixes it'}"]
    return opened, [*said, *(str(c) for c in opened.closed if not c.is_batch)]


@contextmanager
def _plain_outputs(model: nn.Module, notes: list[str]) -> Iterator[None]:
    handle = model.register_forward_hook(lambda _module, _inputs, output: plain(output, notes))
    try:
        yield
    finally:
        handle.remove()


def _example(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Example:
    """The inputs in plain containers, every tensor an object of its own: one that is passed twice would be taken for
    one input."""
    got: tuple[tuple[Any, ...], dict[str, Any]] = (tuple(args), dict(kwargs))
    strange: list[str] = []
    leaves, spec = pytree.tree_flatten(plain(got, strange, "input"))
    if strange:
        raise CaptureError(
            "an input is neither a tensor nor a plain container",
            where=name,
            why=strange[0].split(" left out: ")[-1],
            cure="convert it to tensors, or wrap the model in a module that takes tensors",
        )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise CaptureError(
            "there is no tensor among the example inputs",
            where=name,
            why=f"got {len(args)} positional and {len(kwargs)} keyword inputs",
            cure="pass example inputs: capture(model, (tensor,)), or `--input 1x3x224x224`",
        )
    return pytree.tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in leaves], spec)


def _double_batch(given: Example) -> Example | None:
    """The inputs with a batch of two equal samples; None where there are more already."""
    first = next((t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.dim()), None)
    if first is None or first.shape[0] != 1:
        return None
    return pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t.detach(), given
    )


def _own_state(exported: ExportedProgram, originals: Originals) -> ExportedProgram:
    """``exported`` with a copy of each tensor that its graph writes into (a counter, a running mean), and of each that
    will be put back in the model as it was before ``model.eval()`` (a weight with its low-rank update)."""
    signature = exported.graph_signature
    bound = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    written = {bound[name] for name in find_written_inputs(exported.graph) if name in bound}
    written |= {n for held in (exported.state_dict, exported.constants) for n, t in held.items() if originals.wrote(t)}
    if not written:
        return exported

    def own(tensor: Any) -> Any:
        copy = tensor.detach().clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy

    state, constants = (
        {n: own(t) if n in written else t for n, t in held.items()}
        for held in (exported.state_dict, exported.constants)
    )
    return rebuild(exported, copy_graph(exported), state_dict=state, constants=constants)
