"""``Rearrange``: as many elements as the plan keeps, chosen again with what they do together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import OptionError
from ...ir.pipeline import Search
from ...ir.plan import CompressionPlan
from ...ir.program import Program

WHOLE = 4096  # elements up to which all products are held at once, 8 bytes each: 128 MiB


@dataclass(frozen=True)
class Rearrange(Search):
    """Choose again which elements of each group go, by the block of the Fisher matrix that lies within the group.

        ``minimise  || sum over u in P of g_u ||^2``      P: the elements that go, as many as the plan says;
        g_u [rows]: derivatives of the loss by the mask of u, one per sample (``ImportanceScores.gradients``)

    Half its mean is the second-order estimate of the loss of removing all of P together. Scores are its diagonal
    alone: they do not see that two elements cancel, or that two copies of one hurt four times as much as either.

    Greedy: P starts as the smallest ``|| g_u ||``; every other element, smallest first, is added, and the member
    whose leaving then leaves the smallest sum goes back. This need not find the optimum (the example of
    one round misses it), but never ends above its start, nor above the plan's own choice, which
    is kept when it is no worse.

    rounds   how often to go through the elements; more rounds end where none of them helps any more, and fit the
             samples at hand more closely

    Counts stay, so that the cost, the alignment and the floors of the plan do.

    Errors   OptionError where the scores hold no gradients, or rounds below one
    Cost     O(n k) per round for n elements of which k go, after O(n^2 rows) for their products
    Source   Kwon et al. 2022, arXiv:2204.09656, section 4.2. The reference code adds up all members anew for every
             newcomer, O(n k rows), and lets a member leave that ties with the newcomer; here only a strict
             improvement swaps. Its rows are gradients of batch means, here they are samples as far as memory allows.
             It takes the greedy result even where the search had chosen better
    """

    needs: ClassVar[tuple[str, ...]] = ("groups", "scores", "plan")
    gives: ClassVar[tuple[str, ...]] = ("plan",)

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise OptionError("rearrangement takes at least one round", where=f"--rearrange {self.rounds}")

    def run(self, program: Program) -> Program:
        plan: CompressionPlan = program.need("plan")
        scores, groups = program.need("scores"), program.group_by_name
        choices, swapped, before, after = plan.elements, 0, 0.0, 0.0
        for name, choice in plan.elements.items():
            if name not in groups or not 0 < len(choice.keep) < choice.size:
                continue
            gradients = scores[name].gradients if name in scores else None
            if gradients is None:
                raise OptionError(
                    "rearrangement needs mask gradients",
                    where=name,
                    why=_why(scores[name].criterion if name in scores else None),
                    cure="use `--importance fisher`, or leave rearrangement away",
                )
            pruned = sorted(set(range(choice.size)) - set(choice.keep))
            chosen = exchange_members(gradients, pruned, self.rounds)
            rows = gradients.to("cpu", torch.float64)
            before += float(_objective(rows, pruned))
            after += float(_objective(rows, chosen))
            swapped += len(set(pruned) - set(chosen))
            keep = tuple(sorted(set(range(choice.size)) - set(chosen)))
            choices[name] = replace(choice, keep=keep)
        about: dict[str, Any] = {"rounds": self.rounds, "swapped": swapped, "before": before, "after": after}
        return program.but(plan=plan.with_elements(choices, {**plan.about, "rearranged": about}))


def _why(criterion: str | None) -> str:
    if criterion is None:
        return "the group has no scores"
    if criterion == "fisher":
        return "fisher was told to keep none (rows=0)"
    return f"the criterion '{criterion}' keeps none"


def exchange_members(gradients: Tensor, pruned: Sequence[int], rounds: int = 1) -> list[int]:
    """As many elements as in ``pruned``, ascending, whose gradients add up to less, or ``pruned`` itself.

    gradients   [rows, size]

    >>> g = torch.tensor([[1.0, -1.0, 0.0, 0.95], [0.0, 0.1, 0.9, 0.0]])
    >>> exchange_members(g, [2, 3]), exchange_members(g, [2, 3], rounds=2)
    ([1, 3], [0, 1])
    """
    rows = gradients.detach().to("cpu", torch.float64)
    found = _greedy(rows, len(pruned), rounds)
    return found if _objective(rows, found) < _objective(rows, pruned) else sorted(pruned)


def _objective(rows: Tensor, pruned: Sequence[int]) -> Tensor:
    return rows[:, list(pruned)].sum(1).square().sum()


def _greedy(rows: Tensor, count: int, rounds: int) -> list[int]:
    """The search from the diagonal choice. Every step is O(size) once the products are there."""
    norms = rows.square().sum(0)
    order = torch.argsort(norms, stable=True)
    inside = torch.zeros(rows.shape[1], dtype=torch.bool)
    inside[order[:count]] = True
    products = _products(rows)
    dots = rows.T @ (rows @ inside.double())  # of every element with the sum over P
    total = float(dots[inside].sum())
    for _ in range(rounds):
        start = total
        for new in order[~inside[order]].tolist():
            # || s + g_new - g_v ||^2 - || s ||^2 for every member v
            added = products(new)
            change = norms[new] + 2 * dots[new] + norms - 2 * (dots + added)
            old = int(torch.where(inside, change, torch.inf).argmin())
            if float(change[old]) < -1e-12 * max(total, float(norms[new])):
                inside[new], inside[old] = True, False
                dots += added - products(old)
                total = float(dots[inside].sum())
        if total >= start:
            break
    return inside.nonzero().flatten().tolist()


def _products(rows: Tensor) -> Callable[[int], Tensor]:
    """u -> [size] products of every element's gradient with that of u."""
    if rows.shape[1] > WHOLE:
        return lambda u: rows.T @ rows[:, u]
    gram = rows.T @ rows
    return lambda u: gram[u]
