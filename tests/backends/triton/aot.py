"""Run by test_kernel.py in a process of its own, without a GPU: compile the kernel for real chips and look at it.
Its arguments are the chips, as numbers of compute capability.

Prints one JSON list of {arch, tile, configuration, dtype, precision, shared, spills, mma}: bytes of shared memory,
bytes of register spills that ptxas reports, and the tensor-core instruction in the PTX.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxprune.backends.triton.configurations import CONFIGURATIONS, Configuration, Tile, usable
from fxprune.backends.triton.kernels.block_sparse import block_sparse

triton.knobs.compilation.always_compile = True
triton.knobs.nvidia.dump_ptxas_log = True
POINTERS = ("x", "tiles", "bias", "y")


def compiled(
    arch: int, tile: Tile, configuration: Configuration, dtype: str, precision: str = "ieee"
) -> dict[str, Any]:
    signature: dict[str, str] = {
        **dict.fromkeys(POINTERS, f"*{dtype}"),
        "offsets": "*i32",
        "columns": "*i32",
        **dict.fromkeys(("m", "n", "k", "y_stride"), "i32"),
    }
    constants = {
        "BM": configuration.rows,
        "BN": tile[0],
        "BK": tile[1],
        "ACTIVATION": "gelu",
        "BIAS": True,
        "PRECISION": precision,
    }
    signature.update(dict.fromkeys(constants, "constexpr"))
    aligned = ("x", "tiles", "offsets", "columns", "bias", "y", "n", "k", "y_stride")
    attributes = {(block_sparse.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(block_sparse, signature, constants, attributes)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # what ptxas -v says of the very cubin
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": configuration.warps, "num_stages": configuration.stages},
        )
    spilt = re.findall(r"(\d+) bytes spill", said.getvalue())
    found = re.search(r"\b(wgmma|mma)\.[\w.]+", kernel.asm["ptx"])
    assert len(spilt) == 2, f"ptxas was expected to count spill stores and loads, it said {said.getvalue()}"
    return {
        "arch": arch,
        "tile": tile,
        "configuration": str(configuration),
        "dtype": dtype,
        "precision": precision,
        "shared": kernel.metadata.shared,
        "spills": sum(map(int, spilt)),
        "mma": found.group() if found else "",
    }


if __name__ == "__main__":
    chips = [int(word) for word in sys.argv[1:]]
    made = [
        compiled(arch, tile, one, "fp16")
        for arch in chips
        for tile, several in CONFIGURATIONS.items()
        for one in several
    ]
    made += [compiled(arch, (64, 64), usable((64, 64), 2)[-1], "bf16") for arch in chips]
    made += [
        compiled(arch, (64, 64), usable((64, 64), 4)[-1], "fp32", precision)
        for arch in (86, 90)
        if arch in chips
        for precision in ("tf32", "ieee")
    ]
    print(json.dumps(made))
