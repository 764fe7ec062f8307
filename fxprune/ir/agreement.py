"""Do two runs of one computation agree? Tolerances by dtype, random numbers drawn alike, the worst difference named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import VerifyError
from ..process.determinism import exact_products, seed_generators
from .dataflow import VIEWS, bind, family, is_random, op_name
from .program import Program
from .signature import input_values, output_names

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""Largest accepted difference, relative to the largest magnitude of the reference output."""


OF_ONE = 1e-6
"""What kernels of functions that end at 1 (``BOUNDED``) are off by at most in fp32, whatever comes out."""
BOUNDED = frozenset({"sigmoid", "softmax", "_softmax", "tanh", "hardsigmoid", "erf"})


def find_bounded_outputs(program: Program) -> set[str]:
    """Outputs that end at 1 because of the op that gives them, seen otherwise since."""
    returned = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    returned = returned[len(returned) - program.exported.call_spec.out_spec.num_leaves :]
    tensors = [n for n in returned if not isinstance(n, Node) or isinstance(n.meta.get("val"), Tensor)]
    found = set()
    for name, node in zip(output_names(program.exported), (n for n in tensors if isinstance(n, Node)), strict=False):
        while family(node) in VIEWS and isinstance(node.args[0], Node):
            node = node.args[0]
        if node.op == "call_function" and op_name(node) in BOUNDED:
            found.add(name)
    return found


def tolerance_of(program: Program, tolerance: Mapping[torch.dtype, float] = TOLERANCE) -> float:
    """The tolerance of the coarsest floating dtype among the program's tensors and inputs."""
    tensors = [*program.tensors.values(), *(v for v in input_values(program) if isinstance(v, Tensor))]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()} or {torch.float32}
    return max(tolerance.get(d, max(tolerance.values())) for d in dtypes)


def random_ops(program: Program) -> list[str]:
    """Names of the nodes that draw random numbers whenever the program runs."""
    return [n.name for n in program.graph.nodes if is_random(n) and not _at_rest(n)]


def _at_rest(node: torch.fx.Node) -> bool:
    """An op that may draw and does not: dropout in evaluation form, attention without dropout."""
    given = bind(node)
    chance = given.get("p", given.get("dropout_p"))
    return chance == 0 or given.get("train", given.get("training")) is False


def why_random(program: Program) -> tuple[str, str]:
    """(why, cure) for a program that draws random numbers, two empty texts for any other."""
    drawn = random_ops(program)
    if not drawn:
        return "", ""
    return (
        f"the model draws random numbers in evaluation ({', '.join(drawn[:3])}{', ...' if drawn[3:] else ''})",
        "make the model deterministic, or pass what it draws as an input",
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random ops draw the same numbers in every such block, and a GPU rounds as a CPU does; the caller's generators and
    switches are left as they were."""
    with seed_generators(seed), exact_products():
        yield


def compare(
    got: Tensor,
    want: Tensor,
    tolerance: float,
    *,
    what: str,
    where: str,
    label: str = "",
    cure: str = "",
    reference: str = "the pruned graph",
    bounded: bool = False,
) -> tuple[float, float]:
    """(max |got - want|, the same over max |want|). Raises VerifyError beyond ``tolerance``.

    NaN and infinities must sit at the same places; integers and booleans must be equal. Magnitudes that the dtype holds
    with fewer digits (subnormal numbers) count as the least that it holds with all of them.

    bounded  the output ends at 1 because of the function that gives it, whose kernels are exact to ``OF_ONE`` of that:
             where all of it is nearly 0, such a difference counts relative to 1

    what, reference   in words, what gave ``got`` and ``want``;  where, label  the output, and the sizes of the run
    """
    at = f"{where} {list(want.shape)}" + (f", at {label}" if label else "")
    differs = f"{what} does not compute what {reference} computes"
    got, want = got.detach().cpu(), want.detach().cpu()
    if got.shape != want.shape:
        raise VerifyError(f"{what} returns another shape", where=at, why=f"got {list(got.shape)}", cure=cure)
    if not want.numel():
        return 0.0, 0.0
    if not want.is_floating_point() and not want.is_complex():
        if got.dtype != want.dtype or not torch.equal(got, want):
            differ = int((got.to(want.dtype) != want).sum())
            why = f"{differ} of {want.numel()} {want.dtype} values differ, dtype {got.dtype}"
            raise VerifyError(differs, where=at, why=why, cure=cure)
        return 0.0, 0.0
    finite = want.isfinite()
    if not bool(finite.any()) and bool(want.isnan().all()):
        raise VerifyError(
            f"{reference} itself returns only NaN, so nothing can be verified",
            where=at,
            why="its weights or inputs hold NaN or overflow",
            cure="check the weights of the model",
        )
    full = torch.finfo(want.dtype).tiny
    got, want = _wide(got), _wide(want)
    odd = _count_misplaced(got, want, finite)
    if odd:
        why = f"NaN or infinity at {odd} places where the graph has something else"
        raise VerifyError(differs, where=at, why=why, cure=cure)
    error = torch.where(finite, (got - want).abs(), 0.0)
    largest, scale = float(error.max()), float(want[finite].abs().max()) if bool(finite.any()) else 0.0
    relative = largest / max(scale, full) if scale else largest
    if bounded and largest <= OF_ONE:
        relative = min(relative, largest)
    if relative > tolerance:
        raise VerifyError(differs, where=at, why=_in_words(got, want, error, relative, tolerance, scale), cure=cure)
    return largest, relative


def relative_error(got: Sequence[Any], want: Sequence[Any]) -> float:
    """max |got - want| / max |want| over all floating outputs; infinity when shapes differ or a NaN is on one side."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            worst = max(worst, float((a != b).any()))
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        least = torch.finfo(b.dtype).tiny
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(max(1e-12, least))))
    return worst


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _count_misplaced(got: Tensor, want: Tensor, finite: Tensor) -> int:
    """Places where one is NaN or infinite and the other is not, or is another infinity."""
    other = got.isfinite() != finite
    if not want.is_complex():
        other |= ~finite & (got.nan_to_num(0, 1, -1) != want.nan_to_num(0, 1, -1))
        other |= got.isnan() != want.isnan()
    return int(other.sum())


def _in_words(got: Tensor, want: Tensor, error: Tensor, relative: float, tolerance: float, scale: float) -> str:
    index = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    number = complex if want.is_complex() else float
    return (
        f"relative error {relative:.2e} is above the tolerance {tolerance:.0e}: max |difference| "
        f"{float(error.max()):.2e} at index {index} (got {number(got[tuple(index)]):.6g}, "
        f"expected {number(want[tuple(index)]):.6g}), "
        f"mean {float(error.mean()):.2e}, max |reference| {scale:.2e}"
    )
