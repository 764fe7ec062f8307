"""From a module to a :class:`Program`: ``torch.export`` in evaluation form with the batch (and sequence) left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from ..errors import CaptureError
from ..ir.program import Program
from ..ir.rebuild import copy_graph, rebuild
from ..ir.writes import written_inputs
from ..process.silence import quiet
from .containers import plain, plain_signature
from .diagnose import first_line, last_word, why_capture_failed
from .evaluation import evaluation_form, unwrap
from .tensors import shorten
from .untouched import Originals, untouched


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "model",
) -> Program:
    """Export ``model`` in evaluation form. Its training flags, hooks and weights are as before when this returns.

    model    a module, or a program that is already exported (then the inputs are ignored)
    args     example inputs; dimension 0 of every tensor is the batch, dimension 1 of a 2-D one that holds integers or
             booleans (and of 2-D masks of that length) the sequence. Both stay symbolic wherever the model allows it;
             where it does not, the program's ``notes`` say so and why. An example batch of 1 is doubled.

    The program shares the model's weights. Its outputs are plain dicts, tuples and lists: a ModelOutput or a dataclass
    becomes a dict without its empty fields, an object that is no container (a KV cache) is left out with a note.
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
    args, kwargs = _example(args, kwargs or {}, name)
    with evaluation_form(model) as originals, _plain_outputs(model, notes), quiet():  # silence what is said meanwhile
        exported = _own_state(_export(model, args, kwargs, notes, name), originals)
    return Program(plain_signature(exported, notes), name=name, notes=tuple(dict.fromkeys(notes)))


@contextmanager
def _plain_outputs(model: nn.Module, notes: list[str]) -> Iterator[None]:
    handle = model.register_forward_hook(lambda _module, _inputs, output: plain(output, notes))
    try:
        yield
    finally:
        handle.remove()


def _example(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in plain containers, every tensor an object of its own, and a batch of at least 2.

    A batch of 1 would be taken for a constant by ``torch.export``, and one tensor passed twice for one input.
    """
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
            cure="pass example inputs: capture(model, (tensor,)), or --input 1x3x224x224",
        )
    batched = [t for t in tensors if t.dim()]
    single = bool(batched) and batched[0].shape[0] == 1

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        return torch.cat([leaf, leaf]) if single and leaf.dim() and leaf.shape[0] == 1 else leaf

    positional, keyword = pytree.tree_unflatten([own(leaf) for leaf in leaves], spec)
    return positional, keyword


def _own_state(exported: ExportedProgram, originals: Originals) -> ExportedProgram:
    """``exported`` with a copy of each tensor that its graph writes into (a counter, a running mean), and of each that
    will be put back in the model as it was before ``model.eval()`` (a weight with its low-rank update)."""
    signature = exported.graph_signature
    bound = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    written = {bound[name] for name in written_inputs(exported.graph) if name in bound}
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


@dataclass(frozen=True)
class _Result:
    exported: ExportedProgram
    batch_fixed: bool
    sequence_fixed: bool

    @property
    def rank(self) -> tuple[bool, bool]:
        return self.batch_fixed, self.sequence_fixed


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str], name: str, *, warm: bool = False
) -> ExportedProgram:
    """Export with as many open sizes as the model allows, from the most general to all constant.

    Sizes are open each on its own (``Dim.AUTO``) at first; then inputs share one batch; then the sequence is constant;
    then everything is. Where all of it fails, the same once more with the model as its first call leaves it (``warm``).
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    lengths = {t.shape[1] for t in tensors if t.dim() == 2 and _counts(t)}
    own: list[Any] = [Dim.AUTO] * len(tensors)
    shared: list[Any] = [Dim("batch")] * len(tensors)
    ladder = [(own, Dim.AUTO), (shared, Dim.AUTO)]
    if lengths:
        ladder += [(shared, Dim.STATIC), (own, Dim.STATIC)]
    ladder += [([Dim.STATIC] * len(tensors), Dim.STATIC)]
    best: _Result | None = None
    failure, reason = Exception(), ""
    while ladder:
        batches, sequence = ladder.pop(0)
        try:
            exported = _export_once(model, args, kwargs, tensors, lengths, batches, sequence)
        except CaptureError:  # no choice of sizes can mend it
            raise
        except Exception as error:  # torch raises anything here, and so does the model
            if not reason:
                failure = error
                cause = why_capture_failed(error, model, args, kwargs, name)
                if cause is not None:  # no choice of sizes can mend it
                    raise cause from error
            reason = reason or first_line(error)
            continue
        labels = _shared_batches(exported, len(tensors)) if batches is own else None
        if labels is not None:
            reason = reason or "the inputs must have the same batch size"
            ladder.insert(0, ([Dim.AUTO if i is None else Dim(f"batch_{i}") for i in labels], sequence))
            continue
        result = _Result(exported, *_fixed(exported, lengths))
        if best is None or result.rank < best.rank:
            best = result
        if not best.batch_fixed:
            break
    if best is None:
        if not warm:  # what the model makes at its first call may be what tracing cannot follow
            with untouched(model, args, kwargs):
                model(
                    *pytree.tree_map_only(Tensor, torch.clone, args),
                    **pytree.tree_map_only(Tensor, torch.clone, kwargs),
                )
                return _export(model, args, kwargs, notes, name, warm=True)
        raise last_word(failure, name) from failure
    why = f": {reason or 'the code of the model fixes it'}"
    if best.batch_fixed:
        notes.append(f"batch size fixed at {next((t.shape[0] for t in tensors if t.dim()), 1)}{why}")
    if best.sequence_fixed:
        notes.append(f"sequence length fixed at {', '.join(map(str, sorted(lengths)))}{why}")
    return best.exported


def _export_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    lengths: set[int],
    batches: list[Any],
    sequence: Any,
) -> ExportedProgram:
    shapes = ShapesCollection()
    for tensor, batch in zip(tensors, batches, strict=True):
        if tensor.dim():
            shapes[tensor] = {0: batch, **{i: sequence for i in _sequence_dims(tensor, lengths)}}
    open_sizes = shapes.dynamic_shapes(model, args, kwargs)
    before = {n for n, _ in model.named_parameters()}
    with untouched(model, args, kwargs):  # every attempt begins with the model as it was given
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=open_sizes, strict=False)
        made = [n for n, _ in model.named_parameters() if n not in before]
    if made:
        raise CaptureError(
            "the model makes weights of its own when it first runs",
            where=shorten(made),
            why="a module that was never called has none there, and every copy of it would draw others",
            cure="call it once on an input before passing it",
        )
    for held, value in exported.constants.items():
        if not isinstance(value, Tensor):
            raise CaptureError(
                "the model computes with an object that is no tensor",
                where=held,
                why=f"it is a {type(value).__name__}, which no artefact can hold",
                cure="compute what it gives outside the model, and pass that as an input",
            )
    return exported


def _sequence_dims(tensor: Tensor, lengths: set[int]) -> tuple[int, ...]:
    return (1,) if tensor.dim() == 2 and tensor.shape[1] in lengths else ()


def _counts(tensor: Tensor) -> bool:
    """Token ids, masks and positions: what has a sequence length in dimension 1."""
    return not (tensor.is_floating_point() or tensor.is_complex())


def _fixed(exported: ExportedProgram, lengths: set[int]) -> tuple[bool, bool]:
    """Whether the batch, and whether the sequence length, became a constant in some input that is used."""
    inputs = set(exported.graph_signature.user_inputs)
    batch = sequence = False
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in inputs or not node.users or not isinstance(value, Tensor):
            continue
        sizes = [_constant(size) for size in value.shape]
        batch |= value.dim() > 0 and sizes[0] not in (None, 1)
        sequence |= value.dim() == 2 and sizes[1] in lengths
    return batch, sequence


def _constant(size: int | torch.SymInt) -> int | None:
    """The value of a size without symbols; a specialised one is still a SymInt."""
    if isinstance(size, torch.SymInt):
        return None if size.node.expr.free_symbols else int(size.node.expr)
    return size


def _shared_batches(exported: ExportedProgram, count: int) -> list[int | None] | None:
    """Which of the ``count`` input tensors must have the same batch although the graph does not know it.

    One label per tensor, the same for tensors that share; None for a tensor whose batch is constant. None in all when
    nothing has to be shared. The signs: a size such as ``(16*s98)//s67`` of two batches, or an op on two tensors that
    lead with them (``scaled_dot_product_attention`` with a mask checks nothing while it is traced). Texts and images of
    a CLIP may differ: they meet in neither way.
    """
    names = set(exported.graph_signature.user_inputs)
    inputs = [n.meta.get("val") for n in exported.graph.nodes if n.name in names]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    batches = [str(t.shape[0]) if t.dim() and _constant(t.shape[0]) is None else None for t in tensors]
    label = {batch: i for i, batch in enumerate(batches) if batch is not None}
    before = len(set(label.values()))
    for node in exported.graph.nodes:
        if node.op == "output":
            continue
        meeting = [{str(t.shape[0]) for t in _tensors(node.all_input_nodes) if t.dim()}]
        for size in pytree.tree_leaves([list(t.shape) for t in _tensors([node])]):
            if isinstance(size, torch.SymInt):
                divisions = size.node.expr.atoms(FloorDiv, Mod, PythonMod)
                meeting += [{str(symbol) for symbol in division.free_symbols} for division in divisions]
        for group in meeting:
            together = {label[b] for b in group if b in label}
            if len(together) > 1:
                label = {b: min(together) if i in together else i for b, i in label.items()}
    if len(set(label.values())) == before or len(tensors) != count:
        return None
    return [None if batch is None else label[batch] for batch in batches]


def _tensors(nodes: Sequence[Node]) -> list[Tensor]:
    values = pytree.tree_leaves([node.meta.get("val") for node in nodes])
    return [value for value in values if isinstance(value, Tensor)]
