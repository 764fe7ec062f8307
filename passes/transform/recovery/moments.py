"""Weighted second moments of a layer's inputs and of what it misses, and the closed forms that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import InternalError

SCALE_LIMIT = 10.0
"""A unit's scale beyond this means that the system was nearly singular (PTF's rule)."""


class Moments:
    """Streaming sums over rows (tokens, pixels) with weights ``w >= 0``: inputs ``c`` [n, k], residuals ``r`` [n, o].

    ``r = target - (W c + b)`` is what the layer as it stands still misses. Products run in the dtype of the rows (at
    least fp32) and are added up in fp64 around a shift taken from the first rows, so that centring does not cancel.

    products: False where only the bias will move; k^2 per row are then saved.  home: the device that rows come from
    """

    def __init__(self, products: bool = True, home: torch.device | None = None) -> None:
        self.rows, self.products, self.home = 0, products, home
        self._started = False

    def add(self, c: Tensor, r: Tensor, w: Tensor) -> None:
        """Take in rows: c [n, k], r [n, o], w [n]. Rows of weight zero do not count."""
        seen = w > 0
        if not bool(seen.all()):
            c, r, w = c[seen], r[seen], w[seen]
        if not len(w):
            return
        c, r, w = _wide(c), _wide(r), _wide(w)
        if not self._started:
            self._start(c, r, w)
        c, r = c - self._c0.to(c), r - self._r0.to(r)
        weighted = c * w[:, None]
        if self.products:
            self._cc += (c.T @ weighted).double()
            self._cr += (weighted.T @ r).double()
        self._c += weighted.sum(0, dtype=torch.float64)
        self._r += (r * w[:, None]).sum(0, dtype=torch.float64)
        self._rr += float((r.double().square().sum(1) * w.double()).sum())
        self._w += float(w.sum(dtype=torch.float64))
        self.rows += len(w)

    def _start(self, c: Tensor, r: Tensor, w: Tensor) -> None:
        self._started = True
        self._c0, self._r0 = ((x * w[:, None]).sum(0, dtype=torch.float64) / w.sum(dtype=torch.float64) for x in (c, r))
        k, o = (c.shape[1], r.shape[1]) if self.products else (0, 0)
        self._cc, self._cr = (c.new_zeros(k, n, dtype=torch.float64) for n in (k, o))
        self._c, self._r = torch.zeros_like(self._c0), torch.zeros_like(self._r0)
        self._rr = self._w = 0.0

    def tensors(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """Plain sums about zero, fp64, to be added up over processes; see :meth:`of`.

        rows []  w []  c [k]  r [o]  rr []  cc [k, k]  cr [k, o] (the last two [0, 0] without products); zeros of that
        size when no row was seen. Leaving the shift costs fp64 rounding of the squared means: 1e-16 mean^2 / variance.
        """
        k, o = (inputs, outputs) if self.products else (0, 0)
        if not self._started:
            empty = {"rows": (), "w": (), "rr": (), "c": (inputs,), "r": (outputs,), "cc": (k, k), "cr": (k, o)}
            return {name: torch.zeros(shape, dtype=torch.float64, device=self.home) for name, shape in empty.items()}
        c, r, w = self._c + self._w * self._c0, self._r + self._w * self._r0, self._w
        cc, cr = self._cc, self._cr
        if self.products:
            cc = cc + torch.outer(self._c0, self._c) + torch.outer(c, self._c0)
            cr = cr + torch.outer(self._c0, self._r) + torch.outer(c, self._r0)
        rr = self._rr + float(self._r0 @ self._r) + float(self._r0 @ r)
        scalars = {n: c.new_tensor(v, dtype=torch.float64) for n, v in (("rows", self.rows), ("w", w), ("rr", rr))}
        return {**scalars, "c": c, "r": r, "cc": cc, "cr": cr}

    @staticmethod
    def of(sums: Mapping[str, Tensor], products: bool = True) -> Moments:
        """The moments whose :meth:`tensors` are ``sums``: of all rows that went into them."""
        made = Moments(products, sums["c"].device)
        made.rows = round(float(sums["rows"]))
        if made.rows:
            made._started = True
            made._cc, made._cr, made._c, made._r = (sums[n] for n in ("cc", "cr", "c", "r"))
            made._c0, made._r0 = torch.zeros_like(made._c), torch.zeros_like(made._r)
            made._rr, made._w = float(sums["rr"]), float(sums["w"])
        return made

    def finish(self, centred: bool) -> System:
        """The normal equations; about zero instead of the means when the layer has no bias to move."""
        if not self._started:
            raise InternalError("no rows were collected for a recovery site")
        total = self._w
        cc, cr = self._cc, self._cr
        if self.products:
            cc = cc - torch.outer(self._c, self._c) / total
            cr = cr - torch.outer(self._c, self._r) / total
        rr = max(self._rr - float(self._r.square().sum()) / total, 0.0)
        mean_c, mean_r = self._c0 + self._c / total, self._r0 + self._r / total
        if not centred and self.products:
            cc, cr = cc + total * torch.outer(mean_c, mean_c), cr + total * torch.outer(mean_c, mean_r)
        if not centred:
            rr, mean_c, mean_r = rr + total * float(mean_r.square().sum()), 0 * mean_c, 0 * mean_r
        return System(cc / total, cr / total, rr / total, mean_c, mean_r, self.rows)


@dataclass(frozen=True)
class System:
    """Weighted means of products per row, fp64.

    g [k, k] of (c - mean_c)(c - mean_c)^T,  b [k, o] of (c - mean_c)(r - mean_r)^T,  rr of |r - mean_r|^2;
    rows: how many rows, for those who need sums
    """

    g: Tensor
    b: Tensor
    rr: float
    mean_c: Tensor
    mean_r: Tensor
    rows: int = 1

    def ridge(self, rel: float) -> Tensor:
        """Change of the weight, [o, k]: ``[(g + rel * mean(diag g) I)^-1 b]^T``.

        A ridge anchored at the current weight: no evidence, no change. Equals damped OBS (methods 8.1).
        """
        k = len(self.g)
        diagonal = self.g.diagonal()
        if k == 0 or float(diagonal.sum()) <= 0:
            return self.b.T.new_zeros(self.b.shape[1], k)
        damped = self.g + rel * float(diagonal.mean()) * torch.eye(k, dtype=self.g.dtype, device=self.g.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            solved = torch.cholesky_solve(self.b, factor)
            if bool(torch.isfinite(solved).all()):
                return solved.T
        return (torch.linalg.pinv(damped, hermitian=True) @ self.b).T

    def bias(self, change: Tensor | None = None) -> Tensor:
        """Change of the bias that makes the weighted mean right after the weight moved by ``change``. [o]"""
        return self.mean_r if change is None else self.mean_r - change @ self.mean_c

    def scale(self, weight: Tensor, unit: Tensor, rel: float, solver: str = "ridge") -> Tensor | None:
        """Change of the weight when each unit's columns are only rescaled (mask tuning), [o, k]; None: out of range.

        weight  [o, k];  unit [k]: which unit each column belongs to. The contribution of unit u to a row is
        ``a_u = sum of W_j c_j over its columns``, so ``N = A^T A = (W^T W) * g`` summed over units; scales ``1 + x``.

        solver  ``ridge``  ``(N + rel mean(diag N) I) x = A^T r``
                ``lsmr``   the reference's system: minimise ``|N x - A^T r|^2 + |x|^2`` with N and A^T r as *sums* over
                           rows (damping 1, absolute: it depends on the number of rows and the scale of the features).
                           Its iterative solver is replaced by the exact minimiser in the eigenbasis of N, so there is
                           no "did not converge"; rows keep their norm weights (of mean 1), and centring stands for its
                           scalar offset column
        A scale outside [-10, 10] means that the system was nearly singular: None (PTF's rule; it then stops at once,
        we leave the layer out unless asked to stop).
        Source: Kwon et al. 2022, arXiv:2204.09656, section 4.3
        """
        w = weight.double()
        count = int(unit.max()) + 1 if len(unit) else 0
        if not count:
            return torch.zeros_like(w)
        member = torch.zeros(count, len(unit), dtype=torch.float64, device=w.device)
        member[unit, torch.arange(len(unit), device=w.device)] = 1
        normal = member @ ((w.T @ w) * self.g) @ member.T
        right = member @ (w.T * self.b).sum(1)
        level = float(normal.diagonal().mean())
        if level <= 0:
            return torch.zeros_like(w)
        if solver == "lsmr":
            values, basis = torch.linalg.eigh(normal * self.rows)
            x = basis @ ((basis.T @ right * self.rows) * values / (values.square() + 1))
        else:
            x = torch.linalg.solve(normal + rel * level * torch.eye(count, dtype=torch.float64, device=w.device), right)
        if not bool(torch.isfinite(x).all()) or float((1 + x).abs().max()) > SCALE_LIMIT:
            return None
        return w * (member.T @ x)

    def error(self, change: Tensor | None = None, bias: Tensor | None = None) -> float:
        """Weighted mean of |target - output|^2 per row after the weight and the bias moved by these."""
        left, mean = self.rr, self.mean_r
        if change is not None and change.shape[1]:
            left = left - 2 * float((change.T * self.b).sum()) + float(((change @ self.g) * change).sum())
            mean = mean - change @ self.mean_c
        if bias is not None:
            mean = mean - bias
        return max(left, 0.0) + float(mean.square().sum())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
