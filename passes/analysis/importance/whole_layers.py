"""What criteria of whole layers share: they say what losing one costs, and nothing of the elements inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....data.batch import Batch, Calibration, evenly
from ....errors import InternalError
from ....ir.bypass import Bypassing
from ....ir.group import LAYERS, PruneGroup, Switch
from ....ir.program import Program
from ....ir.signature import samples_in
from .criterion import Criterion
from .mask_gradients import not_finite
from .objective import Target, targets


class LayerCriterion(Criterion):
    """A criterion of attentions, feed-forwards and whole layers (``FindLayers``): it scores no groups, ``MeasureRungs``
    asks it for layers (``together``)."""

    needs_data = True
    comparable = True
    only = frozenset(map(str, LAYERS))

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {}

    def together(
        self, program: Program, data: Calibration | None, seed: int, wanted: Mapping[PruneGroup, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        """What losing each of the layers costs. [1] each"""
        parts = [g for g in wanted if isinstance(g, Switch) and g.past]
        found = self.losses(program, data, parts) if parts else {}
        for part in parts:
            if not 0 <= found[part.name] < float("inf"):
                raise not_finite(program, self.select_samples(program, data)[0], f"what follows layer {part.name}")
        return {name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()}

    def losses(self, program: Program, data: Calibration | None, parts: Sequence[Switch]) -> dict[str, float]:
        """Name -> what losing the layer costs, at least zero."""
        raise NotImplementedError

    def select_samples(self, program: Program, data: Calibration | None) -> list[Batch]:
        """``samples`` samples from all over the data; whole batches where their size is fixed."""
        if data is None or not data.batches:
            raise InternalError(f"{self.name} importance needs calibration data")
        samples: int = getattr(self, "samples", 32)
        if program.fixed_batch:
            return evenly(data.batches, -(-samples // data.batches[0].size))
        chosen = evenly(data.batches, min(samples, len(data.batches)))
        each = -(-samples // len(chosen))
        return [b if b.size <= each else b.pick(torch.tensor(evenly(range(b.size), each))) for b in chosen]


@torch.no_grad()
def outputs_without(program: Program, batches: Sequence[Batch], gone: Sequence[Switch]) -> Iterator[list[Target]]:
    """Per batch, the outputs of the program with these layers gone, as criteria look at them."""
    for batch in batches:
        flat = program.flatten(batch.args, batch.kwargs)
        run: Any = Bypassing(program.exported.graph_module, gone)
        yield targets(program, list(run.run(*program.arguments(flat))), batch, samples_in(flat))
