"""2:4 on GPUs: hand weights with two zeros in every four inputs to torch's semi-structured kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ir.sparsity import is_two_of_four

SHAPES: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
}
"""dtype -> multiples of (out, in) that the kernels take."""
CAPABILITY = (8, 0)


def why_not(weight: Tensor) -> str:
    """Why this weight [out, in] cannot run in the semi-structured kernels of this machine, or "" when it can.

    A weight on the CPU is asked about as if it were on the first GPU.
    """
    if weight.dim() != 2 or not is_two_of_four(weight):
        return "it does not hold two zeros in every four inputs"
    if weight.dtype not in SHAPES:
        return (
            f"the kernels take {', '.join(str(d).removeprefix('torch.') for d in SHAPES)}, not "
            f"{str(weight.dtype).removeprefix('torch.')}"
        )
    rows, columns = SHAPES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {list(weight.shape)} is no multiple of {rows}x{columns}"
    if not torch.cuda.is_available():
        return "this machine has no GPU"
    have = torch.cuda.get_device_capability(weight.device if weight.is_cuda else 0)
    return "" if have >= CAPABILITY else f"the GPU has compute capability {have[0]}.{have[1]}, 8.0 is needed"


def to_semi_structured(module: nn.Module) -> dict[str, str]:
    """Replace every parameter that can by torch's sparse form, in place; returns why other 2:4 weights stayed dense.

    module   a result of ``fxprune.load`` (or any module that multiplies by its weights with ``linear``), on its GPU and
             in its dtype already. For inference: the weights do not train any more

    An empty dict says that all of them were replaced. Times are not known before they are measured.
    """
    from torch.sparse import to_sparse_semi_structured

    left = {}
    for name, weight in list(module.named_parameters()):
        if weight.dim() != 2 or not is_two_of_four(weight):
            continue
        why = why_not(weight) or ("" if weight.is_cuda else "it is not on the GPU")
        if why:
            left[name] = why
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        setattr(
            owner,
            name.rpartition(".")[2],
            nn.Parameter(to_sparse_semi_structured(weight.detach().contiguous()), requires_grad=False),
        )
    return left
