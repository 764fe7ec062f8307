"""A few of the soak's random models; ``tools/soak`` runs two hundred, or as many as you like."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import soak


@pytest.mark.drawn(3)
@pytest.mark.parametrize("seed", range(12))
def test_a_random_model_keeps_every_law(seed: int, tmp_path: Path) -> None:
    assert soak.check(seed, tmp_path / "out") in ("done", "BudgetInfeasible", "NothingToPrune")


def test_seeds_make_different_models_and_the_same_seed_the_same() -> None:
    kinds = {type(soak.case(seed).model).__name__ for seed in range(12)}
    assert kinds == {"Transformer", "Convolutions"}
    one, two = soak.case(3), soak.case(3)
    assert {k: v.sum().item() for k, v in one.model.state_dict().items()} == {
        k: v.sum().item() for k, v in two.model.state_dict().items()
    }
    assert one.options["align"] == two.options["align"]
