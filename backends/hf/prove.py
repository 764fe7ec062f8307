"""A folder that came home, held against the program in a process of its own that knows nothing of fxprune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import VerifyError
from ...intake import pooling
from ...ir.agreement import relative_error, seeded
from ...ir.double import exactly, within_rounding
from ...ir.program import Program
from ...ir.signature import all_other, input_sizes
from ...process import libraries
from ...target.parity import eager, inputs_that_run
from . import fresh
from .fit import input_names
from .folder import CODE, SourceFolder

LIMIT = 1e-5
"""Largest difference of outputs, relative to the largest output."""


def prove_in_fresh_process(program: Program, folder: Path, source: SourceFolder, seed: int = 0) -> dict[str, Any]:
    """Load ``folder`` with transformers alone in a new process, run it at two sizes and let it generate.

    Returns what was found, as plain data: ``max_rel``, ``sizes``, ``generate`` (``equal``, ``no``: the class does not,
    or ``not compared: why`` where the dense model does not either), of a sentence encoder ``encode`` as well (with
    sentence-transformers, where it is installed). Raises VerifyError where outputs differ, or tokens
    with and without a cache.
    """
    reference, sizes = eager(program.exported), input_sizes(program)
    trials = [sizes, all_other(program)] if sizes else [sizes]
    runs = [inputs_that_run(program, reference, trial, seed + number) for number, trial in enumerate(trials)]
    names = input_names(program, source.model)
    with tempfile.TemporaryDirectory(prefix="fxprune-home-") as work:
        told, outputs = _run_fresh(folder, Path(work), source, names, [flat for flat, _ in runs])
    worst, named = 0.0, dict(zip(names, runs[0][0], strict=True))
    for number, (flat, want) in enumerate(runs):
        got = [outputs[f"{number}.{place}"] for place in range(len(want)) if f"{number}.{place}" in outputs]
        error = relative_error(got, want) if len(got) == len(want) else float("inf")
        if not error <= LIMIT and not within_rounding(got, want, exactly(program, flat), LIMIT):
            raise VerifyError(
                "the folder does not compute what the pruned graph computes",
                where=f"{source.class_name} in a fresh process, at {dict(trials[number])}",
                why=f"outputs differ by {error:.1e}, relative; at most {LIMIT:.0e} is accepted",
                cure="`--target eager` or `--target onnx` write the graph itself",
            )
        worst = max(worst, error)
    found = {
        "max_rel": worst,
        "sizes": [dict(t) for t in trials],
        "generate": _check_generation(told["generate"], source, named),
    }
    if not told["encode"]:
        return found
    if told["encode"].startswith("differs"):
        raise VerifyError(
            "sentence-transformers makes other embeddings of the folder, or none",
            where=f"{source.class_name} in a fresh process",
            why=told["encode"],
            cure="`--target hf` has the one layout that every loader reads; `--target onnx` writes the graph itself",
        )
    return {**found, "encode": told["encode"]}


def _run_fresh(
    folder: Path, work: Path, source: SourceFolder, names: Sequence[str], flats: Sequence[Sequence[Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(what the fresh process tells, its outputs by ``run.place``). Raises VerifyError with its last words."""
    from safetensors.torch import load_file, save_file

    given = {
        f"{number}.{name}": value.detach().clone().contiguous()
        for number, flat in enumerate(flats)
        for name, value in zip(names, flat, strict=True)
        if isinstance(value, Tensor)
    }
    save_file(given, work / "inputs.safetensors")
    autos = source.autos()
    auto = next((name for name, cls in autos.items() if cls == source.class_name), "")
    asked = {
        "auto": auto,
        "class": f"{CODE.removesuffix('.py')}.{source.class_name}",
        "inputs": list(names),
        "runs": len(flats),
        "pooling": str(pooling.__file__) if source.encoder else "",
        "dense": str(source.path.resolve()),
        "prepare": [str(libraries.__file__)],  # a torchvision that does not import would be in the way
    }
    (work / "ask.json").write_text(json.dumps(asked), encoding="utf-8")
    hidden = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-I", str(fresh.__file__), str(folder), str(work)]
    ran = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True)
    if ran.returncode != 0:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        raise VerifyError(
            "transformers does not load the folder in a fresh process",
            where=f"{source.class_name} at {folder.name}",
            why=lines[-1][:400] if lines else f"exit code {ran.returncode}",
            cure="`--target eager` or `--target onnx` write the graph itself",
        )
    told = json.loads((work / "told.json").read_text(encoding="utf-8"))
    return told, load_file(work / "outputs.safetensors")


def _check_generation(said: str, source: SourceFolder, inputs: Mapping[str, Any]) -> str:
    """What the fresh process says of generation. Raises VerifyError where the dense model does better."""
    if said in ("equal", "no"):
        return said
    with seeded(0):
        dense = fresh.generate(source.model, inputs)
    if dense != "equal":
        return f"not compared: the dense model does not do it either ({dense})"
    raise VerifyError(
        "the folder does not generate as its class does",
        where=f"{source.class_name}.generate",
        why=said,
        cure="`--target eager` or `--target onnx` write the graph itself",
    )
