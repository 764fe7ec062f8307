"""Fisher information of a mask on each element: the second-order loss of removing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....data import Calibration
from ....errors import OptionError
from ....program import Program
from .criterion import Criterion, prunable
from .mask_gradients import mask_gradients, notes_on_samples


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
            raise OptionError("rows of gradients cannot be negative", where=f"--importance fisher{{rows={self.rows}}}",
                              cure="0 keeps none")

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return self._sums(program, data, seed, None)

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        held: dict[str, list[Tensor]] = {g.name: [] for g in prunable(program)}
        values = self._sums(program, data, seed, held if self.rows else None)
        found = {name: {"values": value} for name, value in values.items()}
        for name in found if self.rows else ():
            # a group that no gradient reached: zeros, which say that all of its elements may go
            rows = torch.cat(held[name]) if held[name] else torch.zeros(1, len(values[name]))
            found[name]["gradients"] = in_runs(rows, self.rows)
        return found

    def _sums(self, program: Program, data: Calibration | None, seed: int,
              held: dict[str, list[Tensor]] | None) -> dict[str, Tensor]:
        """The scores; the gradients' rows are added to ``held``."""
        result = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in prunable(program)}
        seen, passes = 0, max(1, len(data.batches) * self.probes) if data is not None else 1
        for gradients, samples in mask_gradients(program, data, seed, self.probes):
            seen += samples
            for name, g in gradients.items():
                # without a batch axis g is the sum over samples: its square has the same expectation (independence)
                result[name] += g.square().sum(0)
                if held is not None:
                    held[name].append(in_runs(g, max(1, self.rows // passes)).float())
        return {name: 0.5 * total / max(seen, 1) for name, total in result.items()}

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
