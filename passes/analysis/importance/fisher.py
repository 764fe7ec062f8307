"""Fisher information of a mask on each element: the second-order loss of removing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data.batch import Calibration
from ....errors import OptionError
from ....ir.program import Program
from .criterion import Criterion, prunable
from .mask_gradients import Gradients, Passes, batch_by_batch, notes_on_samples

ROWS = " rows"  # no parameter's name ends so


@dataclass(frozen=True)
class Fisher(Criterion):
    """``I[i] = 1/2 * mean over samples b of ( dL_b / dm[i] )^2``     m: 0/1 mask on the consumers, at m = 1

    One mask per element reaches all consumers of its group, so their gradients are summed *before* squaring, and
    gradients are per sample: squares of batch means are smaller and rank differently.
    ``L_b`` is the loss to the sample's label, or without labels the Fisher of the model's output (``objective.py``).

    Shapes   dL/dm is [batch, size]
    Unit     nats per sample (squared output deviations for outputs that are no logits); comparable across groups
    Source   Kwon et al. 2022, arXiv:2204.09656, eq. 6, with per-sample gradients and the factor 1/2 of the Taylor term
    Law      zero for an element that nothing depends on; unchanged by relabelling elements; batching does not matter

    The gradients themselves are kept for ``Rearrange``, in at most ``rows`` rows per group: the diagonal, which the
    scores are, treats elements as if they were independent. Where there are more samples (and probes), a row is the sum
    over a run of them, as in the reference code, whose rows are means over batches of 32.

    probes   random directions per unlabelled sample; each costs one backward pass
    rows     of gradients to keep, each of 4 bytes per element; 0 keeps none

    Raises OptionError for negative rows.
    """

    probes: int = 2
    rows: int = 512

    name = "fisher"
    unit = "nats"
    needs_data = True
    comparable = True

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise OptionError(
                "rows of gradients cannot be negative",
                where=f"--importance fisher{{rows={self.rows}}}",
                cure="0 keeps none",
            )

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {name: found["values"] for name, found in self._assess(program, data, seed, 0).items()}

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        return self._assess(program, data, seed, self.rows)

    def _assess(self, program: Program, data: Calibration | None, seed: int, rows: int) -> dict[str, dict[str, Tensor]]:
        each = max(1, rows // max(1, len(data.batches) * self.probes)) if data is not None else 1

        def of_batch(passes: Passes) -> Gradients:
            squares, held = Gradients(), dict[str, list[Tensor]]()
            for gradients, _ in passes:
                for name, g in gradients.items():
                    # without a batch axis g is the sum over samples: its square has the same expectation (independence)
                    square = g.square().sum(0)
                    squares[name] = squares[name] + square if name in squares else square
                    if rows:
                        held.setdefault(name, []).append(in_runs(g, each).float())
            return {**squares, **{name + ROWS: torch.cat(parts) for name, parts in held.items()}}

        batches, seen = batch_by_batch(self.name, program, data, seed, self.probes, of_batch)
        result = {}
        for group in prunable(program):
            values = torch.zeros(group.size, dtype=torch.float64)
            for batch in batches:
                values = values + batch[group.name] if group.name in batch else values
            result[group.name] = {"values": 0.5 * values / max(seen, 1)}
            if rows:
                # a group that no gradient reached: zeros, which say that all of its elements may go
                held = [b[group.name + ROWS] for b in batches if group.name + ROWS in b]
                result[group.name]["gradients"] = in_runs(torch.cat(held) if held else torch.zeros(1, group.size), rows)
        return result

    def notes(self, program: Program) -> Sequence[str]:
        return notes_on_samples(program)


def in_runs(rows: Tensor, most: int) -> Tensor:
    """[rows, size] -> at most ``most`` rows, each the sum of a run of them; runs are equally long but for the last.

    >>> in_runs(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), 3).flatten().tolist()
    [3.0, 7.0, 5.0]
    """
    run = -(-len(rows) // most)
    if run < 2:
        return rows
    return torch.stack([part.sum(0) for part in rows.split(run)])
