"""Block influence (ShortGPT): how far a layer turns the stream that passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ....data.batch import Calibration
from ....errors import OptionError
from ....ir.bypass import Bypassing
from ....ir.group import Switch
from ....ir.program import Program
from ....ir.signature import padding_mask
from .features import wide
from .whole_layers import LayerCriterion


@dataclass(frozen=True)
class BlockInfluence(LayerCriterion):
    """``BI = 1 - E[ x . y / (|x| |y|) ]``     x, y: a row (token) of the stream before and behind the layer

    samples   that are looked at, from all over the data

    Shapes   x and y are [.., width], or maps [samples, width, height, width]; padding rows do not count
    Unit     one minus a cosine, 0 to 2; comparable between layers, and blind to what follows them
    Source   Men et al. 2024, arXiv:2403.03853, eq. 1; for attentions and feed-forwards as for whole layers
    Cost     one run of the model
    Law      zero for a layer that adds nothing, or a multiple of the stream
    """

    samples: int = 32

    name = "block-influence"
    unit = "1 - cosine"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise OptionError("at least one sample is looked at", where=f"block-influence{{samples={self.samples}}}")

    @torch.no_grad()
    def losses(self, program: Program, data: Calibration | None, parts: Sequence[Switch]) -> dict[str, float]:
        batches, sums = self.select_samples(program, data), dict.fromkeys((p.name for p in parts), 0.0)
        rows = dict.fromkeys(sums, 0)
        for batch in batches:
            flat = program.flatten(batch.args, batch.kwargs)
            run = Bypassing(program.exported.graph_module, (), {n for p in parts for pair in p.past for n in pair})
            run.run(*program.arguments(flat))
            mask = padding_mask(program, flat)
            for part in parts:
                ((behind, before),) = part.past
                after, x = (wide(run.found[name]) for name in (behind, before))
                each = functional.cosine_similarity(x.double(), after.double(), dim=1 if x.dim() == 4 else -1).flatten()
                if mask is not None and mask.numel() == len(each):
                    each = each[mask.flatten().to(each.device).bool()]
                sums[part.name] += float((1 - each).clamp_min(0).sum())
                rows[part.name] += len(each)
        return {name: total / max(rows[name], 1) for name, total in sums.items()}
