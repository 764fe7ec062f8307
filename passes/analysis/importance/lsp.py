"""LSP: tiles ranked by a Taylor score, layers by how the loss grows as their tiles go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ....data.batch import Calibration
from ....errors import OptionError, nearest
from ....ir.program import Program
from ....ir.sparsity import TWO_OF_FOUR
from .distortion import CURVES, distortion, isotonic
from .tile_products import Products, tile_products
from .tiles import TileCriterion, tiles

ORDERS = ("fisher", "taylor")


@dataclass(frozen=True)
class Lsp(TileCriterion):
    """A Taylor score per tile, and per layer the distortion curve of removing tiles in that order.

    curve    ``fisher``: mean_n (sum over removed tiles of g_n^T W)^2, half of it being nats; ``taylor2``: first and
             second order, as the paper differentiates it (it may fall; its running maximum is taken)
    order    ``fisher``: ``1/2 mean_n P[n, b]^2``, the second-order term of removing the tile alone, in which products
             inside a tile add up; ``taylor``: the paper's ``mean over tile b of |W * mean_n dL_n/dW|``, which needs
             labels (without them the loss is a random projection, whose mean gradient says nothing). On a small ViT
             (digits, 16x16 at 0.35 of the MACs, no recovery) 84 and 74 % with labels, fisher without labels 90 %
    kappa    of the identity in H = kappa I + mean_n g_n g_n^T (1e-7 in the reference code, unstated in the paper)
    probes   random directions per unlabelled sample; each costs one backward run

    Shapes   P is [samples, tiles]; a border tile's mean is over what it holds
    Unit     nats per sample; comparable across layers
    Source   LSP, Eq. 6 to 13 (see ``distortion``). The reference code ranks by L1 magnitude in the end, because of a
             misspelt keyword, and derives its gradient from mean(logits^2) in training mode; we use the labels' loss,
             or the Fisher of the model's own output
    Law      the curve is zero when nothing is removed, and non-decreasing; batching does not matter

    Raises OptionError for unknown words.
    """

    curve: str = "fisher"
    order: str = "fisher"
    kappa: float = 0.0
    probes: int = 2

    name = "lsp"
    unit = "nats"
    needs_data = True
    comparable = True

    def __post_init__(self) -> None:
        for option, word, known in (("curve", self.curve, CURVES), ("order", self.order, ORDERS)):
            if word not in known:
                raise OptionError(f"unknown {option} '{word}'", where="--importance lsp", cure=nearest(word, known))
        if self.probes < 1 or not self.kappa >= 0:
            raise OptionError(
                "lsp needs at least one probe and a kappa that is not negative",
                where=f"--importance lsp{{probes={self.probes},kappa={self.kappa}}}",
            )

    def scores(self, program: Program, data: Calibration | None, seed: int) -> dict[str, Tensor]:
        return {name: found["values"] for name, found in self.assess(program, data, seed).items()}

    def assess(self, program: Program, data: Calibration | None, seed: int) -> dict[str, dict[str, Tensor]]:
        groups = tiles(program, self.name)
        if any(g.pattern == TWO_OF_FOUR for g in groups):
            raise OptionError(
                "lsp ranks tiles, not single weights",
                where=f"--sparse {TWO_OF_FOUR}",
                cure="use magnitude, wanda or obert",
            )
        found = tile_products(program, groups, data, seed, self.probes, slopes=self.order == "taylor")
        return {g.name: self._assess(found[g.name]) for g in groups}

    def _assess(self, found: Products) -> dict[str, Tensor]:
        values = found.taylor if self.order == "taylor" else 0.5 * found.products.double().square().mean(0)
        removal = values.argsort(stable=True)
        delta = distortion(found.products[:, removal], found.energy[removal], self.curve, self.kappa)
        delta = isotonic(0.5 * delta if self.curve == "fisher" else delta)
        return {"values": values, "order": removal.flip(0), "curve": delta[-1] - delta.flip(0)}
