"""The file itself, in onnxruntime: what everything that is made of it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from ..rehearsal import first_line
from .graph import Graph

_NO_KERNEL = ("NOT_IMPLEMENTED", "Could not find an implementation")


class NoKernelError(Exception):
    """onnxruntime has no CPU kernel for an op or dtype of the file, so that it says nothing of it."""


class FileRun:
    """An inference session of an ONNX file on the CPU.

    Raises NoKernelError where onnxruntime cannot run such a file here, LoadError where it refuses it or is missing.
    """

    def __init__(self, graph: Graph) -> None:
        try:
            import onnxruntime
        except ImportError as failure:
            cure = "pip install onnxruntime"
            why = first_line(failure)
            raise LoadError("onnxruntime cannot be imported", where=str(graph.path), why=why, cure=cure) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        source: Any = str(graph.path)
        if graph.notes:  # it ends earlier than the file
            source = _ending_at(graph)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(graph.path.resolve().parent)
            )
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as failure:  # onnxruntime's exception types are its own and many
            if any(word in str(failure) for word in _NO_KERNEL):
                raise NoKernelError(first_line(failure)) from failure
            raise LoadError(
                "onnxruntime refuses the file",
                where=str(graph.path),
                why=first_line(failure),
                cure="onnx.checker.check_model(path, full_check=True) may say more; export it again",
            ) from failure
        self._outputs = graph.outputs

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for inputs by the file's names."""
        arrays = self._session.run(list(self._outputs), {n: t.detach().cpu().numpy() for n, t in given.items()})
        return {n: torch.from_numpy(a) for n, a in zip(self._outputs, arrays, strict=True)}


def _ending_at(graph: Graph) -> bytes:
    """The file with the outputs that ``graph`` has."""
    import onnx

    model = onnx.load(str(graph.path), load_external_data=False)
    known = {v.name: v for v in [*model.graph.output, *model.graph.value_info]}
    outputs = [known.get(n) or onnx.helper.make_empty_tensor_value_info(n) for n in graph.outputs]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    serialised: bytes = model.SerializeToString()
    return serialised
