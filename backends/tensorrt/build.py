"""Networks and engines: through torch-tensorrt's converters, or through TensorRT's ONNX parser."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import LoweringError, OptionError
from ...ir.program import Program
from ...ir.provenance import first_line
from ...ir.signature import output_names
from .coverage import check_coverage, lower_graph
from .profiles import InputProfile
from .toolchain import Toolchain

HARDWARE = {"": "NONE", "ampere+": "AMPERE_PLUS", "same-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Flags:
    """What the builder is told. Networks are strongly typed always: dtypes are those of the graph.

    tf32                whether float32 products may be computed in TF32
    workspace_bytes     0 leaves it to TensorRT
    optimization_level  0 to 5
    sparse_weights      may use kernels for weights with 2:4 zeros
    hardware            a key of ``HARDWARE``: which other GPUs the engine is to run on
    version_compatible  runs on later versions of TensorRT as well
    timing_cache        a file, "" for none
    capabilities        compute capabilities such as ``8.9`` to build for, on TensorRT for RTX; () for the GPU here
    """

    tf32: bool = False
    workspace_bytes: int = 0
    optimization_level: int = 3
    sparse_weights: bool = False
    hardware: str = ""
    version_compatible: bool = False
    timing_cache: str = ""
    capabilities: tuple[str, ...] = ()


def by_converters(program: Program, inputs: Sequence[InputProfile], tools: Toolchain, flags: Flags) -> bytes:
    """The engine of ``program`` by torch-tensorrt. Raises LoweringError: before the build for what is not covered."""
    import torch_tensorrt
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    chosen = settings(flags)
    module = lower_graph(program, chosen)
    check_coverage(program, module, chosen)
    specs = [_spec(torch_tensorrt, one) for one in inputs]
    with hear_converters() as said:
        try:
            with quiet_warnings():
                making = TRTInterpreter(
                    module, specs, output_dtypes=infer_module_output_dtypes(module), compilation_settings=chosen
                )
                making._construct_trt_network_def()
                config = making._populate_trt_builder_config()
        except Exception as error:  # converters raise whatever they run into, and name the node themselves
            guilty = getattr(making, "_cur_node_name", None) if "making" in locals() else None
            raise LoweringError(
                "torch-tensorrt cannot make a network of the graph",
                where=f"node {guilty}" if guilty else program.name,
                why=first_line(error),
                cure="try `--target 'trt{via=onnx}'`; `--target onnx` works meanwhile",
            ) from error
        network = making.ctx.net
        for position, name in enumerate(output_names(program.exported)):
            network.get_output(position).name = name
        return _engine(making.builder, network, config, tools, flags, said)


def by_parser(onnx_file: Path, inputs: Sequence[InputProfile], tools: Toolchain, flags: Flags) -> bytes:
    """The engine of an ONNX file. Raises LoweringError with the parser's words and the node it stumbled over."""
    trt = tools.trt
    said: list[str] = []
    builder = trt.Builder(_logger(trt, said))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, _logger(trt, said))
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise LoweringError(
            "TensorRT's parser refuses the ONNX file",
            where="; ".join(f"node {e.node_name() or e.node()} ({e.node_operator()})" for e in errors[:5])
            or onnx_file.name,
            why="; ".join(e.desc() for e in errors[:3]) or "no reason was given",
            cure="try `--target trt` (torch-tensorrt's converters), or another opset",
        )
    config = builder.create_builder_config()
    if any(not one.static for one in inputs):
        profile = builder.create_optimization_profile()
        for one in inputs:
            profile.set_shape(one.name, *one.shapes)
        config.add_optimization_profile(profile)
    _configure(config, tools, flags)
    return _engine(builder, network, config, tools, flags, said)


def settings(flags: Flags) -> Any:
    """torch-tensorrt's settings for these flags."""
    from dataclasses import fields

    from torch_tensorrt.dynamo._settings import CompilationSettings

    wanted = {
        "min_block_size": 1,
        "disable_tf32": not flags.tf32,
        "workspace_size": flags.workspace_bytes,
        "optimization_level": flags.optimization_level,
        "sparse_weights": flags.sparse_weights,
        "hardware_compatible": flags.hardware == "ampere+",
        "version_compatible": flags.version_compatible,
        "use_explicit_typing": True,  # a setting of older releases; newer ones know nothing else
        "attn_bias_is_causal": False,  # its default takes every attention bias for a causal mask
    }
    known = {f.name for f in fields(CompilationSettings)}
    return CompilationSettings(**{k: v for k, v in wanted.items() if k in known})


def _configure(config: Any, tools: Toolchain, flags: Flags) -> None:
    """The flags on a bare builder configuration, as torch-tensorrt sets them on its own."""
    trt = tools.trt
    if flags.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace_bytes)
    config.builder_optimization_level = flags.optimization_level
    if flags.sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not flags.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if flags.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _engine(builder: Any, network: Any, config: Any, tools: Toolchain, flags: Flags, said: list[str]) -> bytes:
    trt = tools.trt
    if flags.hardware:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[flags.hardware])
    _aim(config, tools, flags.capabilities)
    cache = None
    if flags.timing_cache and not tools.rtx:  # TensorRT for RTX times nothing while it builds
        held = Path(flags.timing_cache)
        cache = config.create_timing_cache(held.read_bytes() if held.is_file() else b"")
        config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise LoweringError(
            "TensorRT cannot build the engine",
            where=_guilty(said),
            why="; ".join(said[-3:])[:600] or "it gives no reason",
            cure="try `--target 'trt{via=onnx}'`, another dtype or optimization_level",
        )
    if cache is not None:
        _keep(Path(flags.timing_cache), bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(plan)


def _aim(config: Any, tools: Toolchain, capabilities: Sequence[str]) -> None:
    if not capabilities:
        return
    known = getattr(tools.trt, "ComputeCapability", None)
    if not tools.rtx or known is None:
        raise OptionError(
            "engines for another GPU need TensorRT for RTX",
            where="--target trt {capability=...}",
            why=f"this is {tools}",
            cure="build on the GPU itself, or use hardware=ampere+",
        )
    names = [f"SM{c.replace('.', '')}" for c in capabilities]
    for name, text in zip(names, capabilities, strict=True):
        if name not in known.__members__:
            raise OptionError(
                f"engines cannot be built for compute capability {text}",
                where="--target trt {capability=...}",
                cure=", ".join(f"{n[2:-1]}.{n[-1]}" for n in known.__members__ if n[2:].isdigit()),
            )
    config.num_compute_capabilities = len(names)
    for position, name in enumerate(names):
        config.set_compute_capability(known.__members__[name], position)


def _keep(path: Path, content: bytes) -> None:
    """The timing cache for the next build, whole or not at all; a cache that cannot be written costs time only."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)


def _spec(torch_tensorrt: Any, one: InputProfile) -> Any:
    if one.static:
        return torch_tensorrt.Input(shape=one.shapes[1], dtype=one.dtype, name=one.name)
    least, best, largest = one.shapes
    return torch_tensorrt.Input(min_shape=least, opt_shape=best, max_shape=largest, dtype=one.dtype, name=one.name)


def _logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):
        """Keeps errors for our own message and drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)

    return Logger()


@contextmanager
def hear_converters() -> Iterator[list[str]]:
    """What torch-tensorrt logs as errors while the block runs; nothing of it reaches the screen."""
    said: list[str] = []

    class Handler(logging.Handler):
        """Keeps messages."""

        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    one, handler = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]"), Handler(logging.ERROR)
    propagate, one.propagate = one.propagate, False
    one.addHandler(handler)
    try:
        yield said
    finally:
        one.removeHandler(handler)
        one.propagate = propagate


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """No Python warnings and no infos of torch-tensorrt; its errors go on to :func:`heard`."""
    import warnings

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _guilty(said: Sequence[str]) -> str:
    """The node in TensorRT's words: ``[...]`` or ``node_name`` in the last message that has one."""
    for message in reversed(said):
        named = re.search(r"(?:node|layer)[ :]+'?\"?([\w./\[\]-]+)", message, re.IGNORECASE)
        if named:
            return f"node {named[1]}"
    return "the whole network"
