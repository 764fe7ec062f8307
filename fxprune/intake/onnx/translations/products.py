"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..table import Op, translates


@translates("fxprune::Linear")
def linear(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a product with a constant matrix, and the sum behind it, were turned into when the graph was read."""
    return F.linear(x, weight, bias)


@translates("MatMul")
def matmul(op: Op, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@translates("com.microsoft::FusedMatMul")
def matmul_turned(op: Op, a: Tensor, b: Tensor) -> Tensor:
    a = a.transpose(-1, -2) if op.flag("transA") else a
    b = b.transpose(-1, -2) if op.flag("transB") else b
    scale = op.attribute("alpha", 1.0)
    product = torch.matmul(a, b)
    return product if scale == 1 else product * scale


@translates("Gemm")
def gemm(op: Op, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if op.flag("transA") else a
    b = b if op.flag("transB") else b.t()
    alpha, beta = op.attribute("alpha", 1.0), op.attribute("beta", 1.0)
    product = F.linear(a, b)
    product = product if alpha == 1 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1 else c * beta)


@translates("Einsum")
def einsum(op: Op, *inputs: Tensor) -> Tensor:
    return torch.einsum(op.attribute("equation").replace(" ", ""), *inputs)
