"""TensorRT: an engine of the whole graph, run against the program; without a GPU, all that it takes to build one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import registry
from ...data.batch import Calibration
from ...errors import OptionError, nearest
from ...ir.agreement import TOLERANCE
from ...ir.pipeline import Pipeline
from ...ir.program import Program
from ...ir.signature import output_names, samples_in
from ...target.backend import Backend, Lowered, Runner
from ...target.parity import eager
from .build import HARDWARE, Flags, by_converters, by_parser
from .legalize import FOR_CONVERTERS, PoolByMean
from .profiles import InputProfile, profiles, ranges, read_ranges
from .ranges import SAMPLES, check_ranges
from .runtime import EngineRunner, write_interface
from .toolchain import Toolchain, find, runtime

DTYPES: Mapping[str, float] = {"fp32": TOLERANCE[torch.float32], "tf32": 5e-3, "fp16": 2e-2, "bf16": 5e-2}
"""What products are computed in -> largest accepted difference to the float32 program, relative to its output."""
HALVES = {"fp16": "float16", "bf16": "bfloat16"}
TIGHT = 2.0  # values that come closer than this factor to float16's end are worth a note
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class TensorRTBackend(Backend):
    """``model.engine`` and ``model.engine.json`` (names, dtypes, shapes): TensorRT alone runs them.

    Where the machine lacks a GPU or the packages, ``model.onnx`` for TensorRT's parser is written instead, run by
    onnxruntime, and the report says what is missing and how to finish.

    dtype               ``fp32`` (as captured, no TF32), ``tf32``, ``fp16`` or ``bf16``; inputs and outputs stay float32
    via                 ``dynamo``: torch-tensorrt's converters; ``onnx``: TensorRT's parser, which needs TensorRT alone
    shapes              range of every open size, as ``batch:1:8:64/sequence:1:128:512``; from what was captured else
    workspace           memory for a layer's scratch space, as ``4GiB``; TensorRT's choice else
    optimization_level  0 to 5: how long to look for kernels
    timing_cache        file of kernel timings, read and written; kept per GPU and version else; ``off`` for none
    sparse_weights      consider kernels for 2:4 zeros
    hardware            ``ampere+`` or ``same-capability``: GPUs besides this one that are to run the engine
    version_compatible  later versions of TensorRT are to run it
    capability          compute capabilities such as ``8.6+8.9`` to build for with TensorRT for RTX, GPU or not
    opset               of the ONNX file, 18 to 20: builds of what 23 brings fail
    """

    dtype: str = "fp32"
    via: str = "dynamo"
    shapes: str = ""
    workspace: str = ""
    optimization_level: int = 3
    timing_cache: str = ""
    sparse_weights: bool = False
    hardware: str = ""
    version_compatible: bool = False
    capability: str = ""
    opset: int = 20
    calibration: Calibration | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "trt"
    requires: ClassVar[Sequence[tuple[str, str]]] = (
        ("tensorrt or tensorrt_rtx", "pip install 'fxprune[tensorrt]'"),
        ("a CUDA GPU", "an engine runs on the kind of GPU it was built for"),
    )
    packages: ClassVar[Sequence[str]] = ("tensorrt", "tensorrt-rtx", "torch-tensorrt", "torch-tensorrt-rtx")
    suffix: ClassVar[str] = ".engine"

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("via", self.via, ("dynamo", "onnx"))
        _one_of("hardware", self.hardware, HARDWARE)
        read_ranges(self.shapes)
        size_of(self.workspace)
        if not 0 <= self.optimization_level <= 5:
            raise OptionError(
                f"there is no optimization level {self.optimization_level}",
                where="--target trt {optimization_level=...}",
                cure="0 to 5",
            )
        if not all(re.fullmatch(r"\d+\.\d", c) for c in self._capabilities):
            raise OptionError(
                f"'{self.capability}' names no compute capability",
                where="--target trt {capability=...}",
                cure="write 8.9, or 8.6+8.9 for several",
            )
        registry.backend("onnx", opset=self.opset)

    def tolerances(self) -> Mapping[torch.dtype, float]:
        return {**self.tolerance, torch.float32: DTYPES[self.dtype]}

    def runs_on(self) -> str:
        return "cuda"

    def with_data(self, calibration: Calibration | None) -> Backend:
        return replace(self, calibration=calibration)

    def lower(self, program: Program, directory: Path) -> Lowered:
        sizes = ranges(program, read_ranges(self.shapes))
        inputs = profiles(program, sizes)
        plain = Pipeline((PoolByMean(),)).run(program)
        tools, missing = find(self.via, bool(self._capabilities))
        by_onnx = tools is None or self.via == "onnx"
        cast = plain
        about: dict[str, Any] = {"dtype": self.dtype, "via": "onnx" if by_onnx else "dynamo", "shapes": sizes}
        if self.dtype in HALVES:
            spatial = self.dtype == "fp16" or not by_onnx
            cast = Pipeline((registry.lookup("pass", "cast-floats")(HALVES[self.dtype], spatial),)).run(plain)
        notes: tuple[str, ...] = ()
        if self.dtype == "fp16":
            about["float16"] = check_ranges(plain, cast, self._batches(program))
            notes = _tight(about["float16"])
        onnx = self._onnx(cast, directory) if by_onnx else None
        if onnx is not None:
            about["trtexec"] = trtexec(onnx.payload.name, inputs, tf32=self.dtype != "fp32")
        if tools is None:
            assert onnx is not None
            return replace(onnx, about=about, notes=notes, missing=missing)
        if onnx is None:
            legal = Pipeline(tuple(one() for one in FOR_CONVERTERS)).run(cast)
            plan = by_converters(legal, inputs, tools, self._flags(tools))
            checked, by = eager(legal.exported), "PyTorch"
        else:
            plan = by_parser(onnx.payload, inputs, tools, self._flags(tools))
            checked, by = onnx.run, onnx.runtime
        payload = self.payload(directory)
        payload.write_bytes(plan)
        described = write_interface(payload, inputs, output_names(program.exported), tools)
        files = (payload, described, *(() if onnx is None else onnx.files))
        made = Lowered(payload, files, checked, about={**about, "built_by": str(tools)}, notes=notes)
        if missing:
            return replace(
                made,
                runtime=f"{by}; the engine was built, not run",
                missing=tuple(f"{m} (the engine was built, it was not run)" for m in missing),
            )
        return replace(made, run=self.load(payload), runtime=str(tools))

    def load(self, payload: Path) -> Runner:
        return EngineRunner(payload, runtime())

    @property
    def _capabilities(self) -> tuple[str, ...]:
        return tuple(filter(None, self.capability.split("+")))

    def _flags(self, tools: Toolchain) -> Flags:
        cache = self.timing_cache or str(_find_cache(tools))
        return Flags(
            self.dtype != "fp32",
            size_of(self.workspace),
            self.optimization_level,
            self.sparse_weights,
            self.hardware,
            self.version_compatible,
            "" if cache == "off" else cache,
            self._capabilities,
        )

    def _batches(self, program: Program) -> list[Sequence[Any]]:
        """User inputs to look at: calibration data, up to ``SAMPLES`` of it, else the example's."""
        if self.calibration is None:
            return [program.flatten(*program.example_inputs)]
        found: list[Sequence[Any]] = []
        count = 0
        for batch in self.calibration.batches:
            found.append(program.flatten(batch.args, batch.kwargs))
            count += samples_in(found[-1])
            if count >= SAMPLES:
                break
        return found

    def _onnx(self, cast: Program, directory: Path) -> Lowered:
        """The ONNX file; what ran it is onnxruntime, or PyTorch where that lacks the dtype."""
        onnx: Any = registry.backend("onnx", opset=self.opset)
        legal = Pipeline(onnx.legalize()).run(cast)
        if all(t.dtype is not torch.bfloat16 for t in legal.tensors.values()):
            made: Lowered = onnx.lower(legal, directory)
            return made
        files, notes = onnx.write(legal, directory)
        return Lowered(
            files[-1],
            files,
            eager(legal.exported),
            notes=notes,
            runtime="PyTorch (onnxruntime has no bfloat16 kernels, so the ONNX file was not run)",
        )


def size_of(text: str) -> int:
    """Bytes of ``4GiB``, ``512MiB`` or a number; 0 for "". Raises OptionError.

    >>> size_of("1GiB")
    1073741824
    """
    match = re.fullmatch(r"(\d+) *([kmg]?)(i?b)?", text.strip().lower() or "0")
    if match is None:
        raise OptionError(
            f"'{text}' is not an amount of memory",
            where="--target trt {workspace=...}",
            cure="write 4GiB, 512MiB or a number of bytes",
        )
    return int(match[1]) * _UNITS[match[2]]


def trtexec(file: str, inputs: Sequence[InputProfile], tf32: bool = True) -> str:
    """The command that builds the same engine from the ONNX file with TensorRT's own tool.

    >>> trtexec("m.onnx", [InputProfile("x", torch.float32, ((1, 3), (1, 3), (1, 3)))], tf32=False)
    'trtexec --onnx=m.onnx --stronglyTyped --noTF32 --saveEngine=model.engine'
    """
    words = [f"trtexec --onnx={file} --stronglyTyped", *([] if tf32 else ["--noTF32"])]
    if any(not one.static for one in inputs):
        for position, option in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{i.name}:{'x'.join(map(str, i.shapes[position]))}" for i in inputs)
            words.append(f"--{option}Shapes={shapes}")
    return " ".join([*words, "--saveEngine=model.engine"])


def _one_of(option: str, value: str, known: Any) -> None:
    if value not in known:
        raise OptionError(
            f"'{value}' is not known",
            where=f"--target trt {{{option}={value}}}",
            cure=nearest(value, [k for k in known if k]),
        )


def _tight(seen: Mapping[str, Any]) -> tuple[str, ...]:
    if seen["headroom"] is None or seen["headroom"] >= TIGHT:
        return ()
    one = seen["largest"][0]
    return (
        f"float16 is tight: node {one['node']} reaches {one['value']:.0f} of {seen['limit']:.0f} on "
        f"{seen['samples']} samples; bf16 has room",
    )


def _find_cache(tools: Toolchain) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{tools.gpu}-{tools.trt.__version__}")
    return root / "fxprune" / "tensorrt" / f"{name}.cache"
