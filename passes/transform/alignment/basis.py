"""The closed form: the basis in which a sum of products over d elements loses least when only the first are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLAMP = 1e-6
"""Eigenvalues of a gram below this share of the largest count as that much: roots of it then have an inverse."""


@dataclass(frozen=True)
class Basis:
    """``x -> left x`` for one factor and ``y -> right y`` for the other leave ``x^T y`` as it is, for every x and y.

    left, right   [d, d] fp64, left^T right = I
    strengths     [d], falling: the mean square of what element i adds to the sum is its square, so that keeping the
                  first r loses the sum of ``strengths[r:]^2``; zeros where a gram says nothing
    """

    left: Tensor
    right: Tensor
    strengths: Tensor


def balance(left: Tensor, right: Tensor) -> Basis:
    """The basis for factors whose grams (means of x x^T and of y y^T) are ``left`` and ``right``. [d, d] each

        left^1/2 right^1/2 = U s V^T,   T_left = s^1/2 U^T left^-1/2,   T_right = s^1/2 V^T right^-1/2

    Both new grams are diag(s). Keeping the first r is the best map of rank r where x and y are independent. The sign:
    the largest entry of each row of ``left`` is positive. Where a gram is zero or not finite, the basis stays.
    Source   bases.md 2.2; the same optimum as A^3's (arXiv:2505.12942)
    """
    roots = [_roots(one.detach().to("cpu", torch.float64)) for one in (left, right)]
    size = len(left)
    if roots[0] is None or roots[1] is None:
        same = torch.eye(size, dtype=torch.float64)
        return Basis(same, same.clone(), torch.zeros(size, dtype=torch.float64))
    (root, inverse), (other, other_inverse) = roots  # type: ignore[misc]
    u, s, v = torch.linalg.svd(root @ other)
    one, two = s.sqrt()[:, None] * (u.T @ inverse), s.sqrt()[:, None] * (v @ other_inverse)
    sign = one.gather(1, one.abs().argmax(1, keepdim=True)).sign()
    return Basis(one * sign, two * sign, s)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """(gram^1/2, gram^-1/2); None where it has neither."""
    if not bool(torch.isfinite(gram).all()):
        return None
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    if not float(values[-1]) > 0:
        return None
    root = values.clamp_min(CLAMP * float(values[-1])).sqrt()
    return vectors @ (root[:, None] * vectors.T), vectors @ (vectors.T / root[:, None])
