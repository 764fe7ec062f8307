"""ONNX: one file with the weights inside, named inputs and outputs, open batch and sequence, checked by running it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data.memory import give_back
from ...errors import LoweringError, OptionError
from ...intake.companions import copy_companions
from ...intake.load import Loaded
from ...intake.stated import StatesInputs
from ...ir.pipeline import Pass, Pipeline
from ...ir.program import Program
from ...ir.provenance import first_line
from ...ir.signature import dim_names, output_names
from ...process.environment import cpu_name, versions
from ...target.backend import Backend, Lowered, Runner
from ...target.block_table import table_for
from ...target.gate import report, words
from ...target.timing import session
from .block_ell import UseBlockEll
from .file import write_checked
from .legalize import CastMinuends, RelaxViews, SpellOutAttention
from .runtime_forms import part_sums_from_norms, turn_gelus
from .translate import translate

INLINE_LIMIT = 2**29  # a protobuf message ends at 2 GiB, and long before that onnxruntime maps what lies beside it
OPSETS = (18, 20)  # the exporter's translations start at 18; TensorRT builds fail on what 23 brings


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """``model.onnx``, and ``model.onnx.data`` beside it when the weights are larger than 512 MiB: onnxruntime maps that
    file into memory, and copies what lies in the first. Of a Hugging Face folder the tokenizer, config and every other
    small file lie beside it as they were.

    opset    18 to 20
    external the weights lie in ``model.onnx.data`` whatever their size
    threads  of ONNX Runtime where the file is run again; 0 lets it choose
    table    path of a recorded table of block timings; by default the one that ``fxprune tune --target onnx`` measured
             on this machine's CPU. Weights with zeros in tiles become block-ELL where it says that this is faster
    """

    opset: int = 18
    threads: int = 0
    table: str = ""
    external: bool = False
    folder: Path | None = field(default=None, repr=False, compare=False)
    names: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[str] = "onnx"
    requires: ClassVar[Sequence[str]] = ("onnx", "onnxscript", "onnxruntime")
    packages: ClassVar[Sequence[str]] = (*requires, "onnxruntime-gpu")
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self) -> None:
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise OptionError(
                f"opset {self.opset} is not supported",
                why="the ops this needs come with 18; runtimes do not yet build what comes after 20",
                cure=f"{OPSETS[0]} to {OPSETS[1]}",
            )

    def with_source(self, source: Loaded) -> OnnxBackend:
        names = source.model.own_names if isinstance(source.model, StatesInputs) else {}
        return replace(self, folder=source.folder, names=names)

    def legalize(self) -> tuple[Pass, ...]:
        return (RelaxViews(), SpellOutAttention(), CastMinuends())

    def lower(self, program: Program, directory: Path) -> Lowered:
        _refuse_dtypes(program)
        _refuse_numbers(program)
        table = table_for(cpu_name(), "ell", self.table)
        gate = UseBlockEll(table, f"onnxruntime on {cpu_name()}")
        program, (gated,) = Pipeline((gate,)).apply(program)
        files, said = self.write(program, directory)
        left_out = [] if self.folder is None else copy_companions(self.folder, directory)
        uncopied = [f"file not copied, large or with an odd name: {name}" for name in left_out]
        about = report(gated.record, table), (*words(gated.record), *said, *uncopied)
        give_back()  # the exporter's graphs are full of cycles, and onnxruntime is about to read the weights again
        payload = self.payload(directory)
        try:
            return Lowered(payload, files, self.load(payload), *about, runtime="onnxruntime on CPU")
        except Exception as error:  # onnxruntime's exception types are its own and many
            raise LoweringError(
                "onnxruntime refuses the exported file",
                where=payload.name,
                why=first_line(error),
                cure="update onnxruntime, or try another --opset",
            ) from error

    def write(self, program: Program, directory: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        """Translate, check and write a legalized program, and run nothing: (files, the main one last; notes)."""
        model, notes = translate(program, self.opset)
        part_sums_from_norms(model.model)
        turn_gelus(model.model)
        _name_everything(model.model, program, self.names)
        weights = sum(t.numel() * t.element_size() for t in program.tensors.values())
        aside = Path(tempfile.mkdtemp(prefix=".onnx-", dir=directory))
        try:
            write_checked(model.model, self.payload(aside), inline=weights < INLINE_LIMIT and not self.external)
            written = sorted(aside.iterdir(), key=lambda p: p.suffix == self.suffix)  # the main file comes last
            files = tuple(directory / p.name for p in written)
            for source, target in zip(written, files, strict=True):
                os.replace(source, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return files, notes

    def load(self, payload: Path) -> Runner:
        running = session(payload, self.threads)
        names = [i.name for i in running.get_inputs()]

        def run(flat: Sequence[Any]) -> list[Any]:
            tensors = [t.detach().cpu().contiguous().numpy() for t in flat if isinstance(t, Tensor)]
            return [torch.from_numpy(o) for o in running.run(None, dict(zip(names, tensors, strict=True)))]

        return run


def _refuse_dtypes(program: Program) -> None:
    for name, tensor in program.tensors.items():
        if tensor.dtype is torch.bfloat16:
            raise LoweringError(
                "bfloat16 cannot be verified",
                where=name,
                why="onnxruntime has no bfloat16 kernels on a CPU",
                cure="convert the model first: model.float() or model.half()",
            )


def _refuse_numbers(program: Program) -> None:
    """Outputs that are numbers have no place in a graph of tensors; the exporter dies of them without a word."""
    returned = program.graph.output_node().args[0]
    values = [v.meta.get("val") if isinstance(v, torch.fx.Node) else v for v in returned]  # type: ignore[union-attr]
    for value in values:
        if not isinstance(value, Tensor) and value is not None:
            raise LoweringError(
                "an output that is no tensor cannot be exported",
                where=program.name,
                why=f"the model returns {value!r} among its outputs",
                cure="return tensors alone, or use `--target eager`",
            )


def _name_everything(model: Any, program: Program, names: Mapping[str, str]) -> None:
    """Inputs as captured, or as ``names`` calls them, outputs by their keys, open dims as words, and nothing of this
    machine in the file.

    The exporter names outputs after its nodes, dims after its solver's symbols, and writes the paths of the model's
    source files into every node.
    """
    graph = model.graph
    wanted = [
        names.get(n.name, n.name)
        for n in program.placeholders()
        if n.name in set(program.user_inputs) and isinstance(n.meta.get("val"), Tensor)
    ]
    results = output_names(program.exported)
    if len(graph.inputs) != len(wanted) or len(graph.outputs) != len(results):
        raise LoweringError(
            "inputs or outputs that are no tensors cannot be exported",
            where=program.name,
            why=f"ONNX has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, the program has {len(wanted)} "
            f"and {len(results)} tensors",
            cure="return tensors only",
        )
    symbols = dim_names(program)
    named = dict(zip([*graph.inputs, *graph.outputs], [*wanted, *results], strict=True))
    reserved, values = set(named.values()), list(graph.inputs)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in [*values, *graph.initializers.values()]:
        if value not in named and value.name in reserved:
            value.name = f"{value.name}_inner"
    for value, name in named.items():
        value.name = name
    for value in values:
        dims = [getattr(dim, "value", dim) for dim in value.shape or ()]
        if any(isinstance(dim, str) for dim in dims):
            value.shape = type(value.shape)(
                [  # a new one: since onnx_ir 1.1 the exporter's may be frozen
                    re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), dim) if isinstance(dim, str) else dim
                    for dim in dims
                ]
            )
    model.producer_name, model.producer_version = "fxprune", versions().get("fxprune", "0")
    model.graph.name = re.sub(r"\W", "_", program.name)
