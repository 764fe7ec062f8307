"""A serialised engine as a runner: inputs and outputs by name, on the GPU, synchronised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from .profiles import InputProfile
from .toolchain import Toolchain

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
}


def interface(payload: Path) -> Path:
    """The file beside an engine that says what goes in and comes out."""
    return payload.with_name(f"{payload.name}.json")


def write_interface(payload: Path, inputs: Sequence[InputProfile], outputs: Sequence[str], tools: Toolchain) -> Path:
    """Write it: names, dtypes and shapes of the inputs in order, names of the outputs, and what built the engine."""
    path = interface(payload)
    said = {
        "built_by": str(tools),
        "outputs": list(outputs),
        "inputs": [
            {
                "name": one.name,
                "dtype": str(one.dtype).removeprefix("torch."),
                "least": one.shapes[0],
                "best": one.shapes[1],
                "largest": one.shapes[2],
            }
            for one in inputs
        ],
    }
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return path


class EngineRunner:
    """Calls an engine with user inputs, flat and in graph order; outputs come back to where the inputs lie.

    Raises LoadError when TensorRT does not take the file: another version, another GPU, or a damaged one.
    """

    def __init__(self, payload: Path, tools: Toolchain) -> None:
        trt = tools.trt
        try:
            said = json.loads(interface(payload).read_text(encoding="utf-8"))
            self.inputs = [str(one["name"]) for one in said["inputs"]]
            self.outputs = [str(name) for name in said["outputs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LoadError(
                "the engine's interface cannot be read",
                where=interface(payload).name,
                why=str(error)[:200],
                cure="lower the artefact again",
            ) from None
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # the engine needs it as long as it lives
        self.engine = self.runtime.deserialize_cuda_engine(payload.read_bytes())
        if self.engine is None:
            raise LoadError(
                "TensorRT does not take the engine",
                where=payload.name,
                why=f"it was built by {said.get('built_by', 'another version')}, this is {tools}",
                cure="build it here: fxprune lower ARTIFACT --target trt",
            )
        self.context = self.engine.create_execution_context()
        self.names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        self.dtypes = {name: DTYPES[self.engine.get_tensor_dtype(name).name] for name in self.names}
        self.stream = torch.cuda.Stream()

    def __call__(self, flat: Sequence[Any]) -> list[Tensor]:
        tensors = [t for t in flat if isinstance(t, Tensor)]
        home = tensors[0].device if tensors else torch.device("cpu")
        held = []  # inputs must outlive the call
        for name, tensor in zip(self.inputs, tensors, strict=True):
            if name not in self.names:
                continue  # TensorRT drops inputs that nothing reads
            held.append(tensor.to("cuda", self.dtypes[name]).contiguous())
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, held[-1].data_ptr())
        results = []
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=self.dtypes[name], device="cuda"))
            self.context.set_tensor_address(name, results[-1].data_ptr())
        self.stream.wait_stream(torch.cuda.current_stream())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run the engine at these shapes")
        self.stream.synchronize()
        return [r.to(home) for r in results]
