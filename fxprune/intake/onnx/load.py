"""An ONNX file opened: the module, inputs that it takes, and how near it is to the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import LoadError
from ...ir.proof import Link
from ...process.silence import quiet
from .module import OnnxModule, read_module
from .parity import compare_with_file
from .runtime import FileRun, NoKernelError
from .trials import Trial, as_example, draw, ids_below, try_sizes


@dataclass(frozen=True)
class FromOnnx:
    """What an ONNX file became.

    module  with example inputs
    proof   how near it is to the file in onnxruntime
    """

    module: OnnxModule
    proof: tuple[Link, ...]
    notes: tuple[str, ...]


def open_onnx(path: Path) -> FromOnnx:
    """The module that an ONNX file becomes, held against onnxruntime.

    Raises LoadError for a file that is damaged or reaches outside its folder, UnsupportedOp with the node and the op
    for what has no translation, CaptureError where the module computes something else.
    """
    with quiet():
        module, notes = read_module(path)
        try:
            run: FileRun | None = FileRun(module.graph)
        except NoKernelError as failure:
            run, notes = None, (*notes, f"the module was not held against the file: onnxruntime says {failure}")
        trial = try_sizes(module.graph, module.compute if run is None else run)
        if trial is None:
            raise _no_sizes(module, run)
        link = () if run is None else (compare_with_file(module, run, trial),)
    module.closed = dict(trial.closed)
    module.examples = as_example(module.inputs, draw(module.graph, trial.sizes))
    module.vocabulary = min(ids_below(module.graph).values(), default=module.vocabulary)
    return FromOnnx(module, link, (*notes, *_tell_closed(trial)))


def _tell_closed(trial: Trial) -> list[str]:
    return [
        f"the file leaves '{word}' open, and it is fixed at {trial.sizes[word]}: {why}"
        for word, why in trial.closed.items()
    ]


def _no_sizes(module: OnnxModule, run: FileRun | None) -> LoadError:
    stated = ", ".join(f"{one.name} {list(one.shape)}" for one in module.inputs.values())
    return LoadError(
        "no sizes were found that the file takes",
        where=f"{module.path}: {stated}",
        why=f"{'the module' if run is None else 'onnxruntime'} refuses every size that was tried for what is open",
        cure="fix the sizes in the file: onnxruntime.tools.make_dynamic_shape_fixed, or "
        "onnx.tools.update_model_dims.update_inputs_outputs_dims(...)",
    )
