"""Run by test_kernel.py in a process of its own, without a GPU: compile the kernel for real chips and look at it.

Prints one JSON list of {arch, tile, configuration, dtype, precision, shared, spills, mma}: bytes of shared memory,
bytes of register spills that ptxas reports, and the tensor-core instruction in the PTX.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxprune.backends.triton.configurations import CONFIGURATIONS, SHARED_LIMIT, Configuration, Tile
from fxprune.backends.triton.kernels.block_sparse import block_sparse

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
POINTERS = ("x", "tiles", "bias", "y")


def compiled(arch: int, tile: Tile, configuration: Configuration, dtype: str, precision: str = "ieee",
             ragged: bool = False) -> dict[str, Any]:
    signature: dict[str, str] = {**dict.fromkeys(POINTERS, f"*{dtype}"), "offsets": "*i32", "columns": "*i32",
                                 **dict.fromkeys(("m", "n", "k", "y_stride"), "i32")}
    constants = {"BM": configuration.rows, "BN": tile[0], "BK": tile[1], "ACTIVATION": "gelu", "BIAS": True,
                 "RAGGED": ragged, "PRECISION": precision}
    signature.update(dict.fromkeys(constants, "constexpr"))
    aligned = ("x", "tiles", "offsets", "columns", "bias", "y", *(() if ragged else ("n", "k", "y_stride")))
    attributes = {(block_sparse.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(block_sparse, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                            options={"num_warps": configuration.warps, "num_stages": configuration.stages})
    ptx = kernel.asm["ptx"]
    found = re.search(r"\b(wgmma|mma)\.[\w.]+", ptx)
    return {"arch": arch, "tile": tile, "configuration": str(configuration), "dtype": dtype, "precision": precision,
            "shared": kernel.metadata.shared, "spills": spills(ptx, arch), "mma": found.group() if found else ""}


def spills(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads."""
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        run = subprocess.run([str(PTXAS), "-v", f"--gpu-name={name}", str(file), "-o", str(Path(folder) / "kernel")],
                             capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", run.stdout + run.stderr))


if __name__ == "__main__":
    made = [compiled(arch, tile, one, "fp16") for arch in SHARED_LIMIT
            for tile, several in CONFIGURATIONS.items() for one in several]
    tile, one = (64, 64), CONFIGURATIONS[64, 64][-1]
    made += [compiled(arch, tile, one, "bf16") for arch in SHARED_LIMIT]
    made += [compiled(arch, tile, one, "fp32", precision) for arch in (80, 90) for precision in ("tf32", "ieee")]
    made += [compiled(90, tile, one, "fp16", ragged=True)]
    print(json.dumps(made))
