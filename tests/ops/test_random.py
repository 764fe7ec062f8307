"""The random baseline: seeded, the same for every image, fair, and the laws of a token op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import drawing
from support.token_laws import (
    Deployed,
    Layout,
    assert_counted,
    assert_identity,
    assert_reduces,
    assert_registered,
    assert_sound,
    call,
    layouts,
    most_dropped,
    other_batch,
)

from fxprune.ops.random import drop_tokens


@settings(deadline=None, max_examples=drawing.of(15, 60))
@given(layouts(), st.integers(0, 99), st.data())
def test_every_image_keeps_the_same_tokens_unchanged(layout: Layout, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, most_dropped(layout)))
    results = call("drop_tokens", layout.x, layout.size, r, layout.protected, seed)
    place = results[2][0]
    kept = (place >= 0).nonzero().flatten()
    assert place[kept].tolist() == list(range(layout.tokens - r))
    images = zip(layout.x, layout.counts, strict=True)
    assert_reduces(layout, r, results, [(x[kept], size[kept], place) for x, size in images])
    if r == 0:
        assert_identity(layout, results)


def test_seeds_choose_fairly() -> None:
    seeds, tokens, r = 400, 21, 5
    x = torch.zeros(1, tokens, 1)
    gone = torch.stack([(drop_tokens(x, None, r, 1, seed)[2][0] < 0).double() for seed in range(seeds)])
    share = r / (tokens - 1)
    assert gone[:, 0].sum() == 0
    assert (gone[:, 1:].mean(0) - share).abs().max() < 4 * (share * (1 - share) / seeds) ** 0.5
    pairs = (gone[:, 1:].T @ gone[:, 1:] / seeds)[~torch.eye(tokens - 1, dtype=torch.bool)]
    together = share * (r - 1) / (tokens - 2)
    assert (pairs - together).abs().max() < 5 * (together * (1 - together) / seeds) ** 0.5


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"removes 0 to 7, not 8"):
        call("drop_tokens", torch.randn(1, 9, 4), None, 8, 1, 0)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_sound(protected: int) -> None:
    assert_sound("drop_tokens", (torch.randn(2, 20, 6), torch.randint(1, 40, (2, 20, 1)).float()), (4, protected, 0))


def test_registered() -> None:
    assert_registered("drop_tokens", (torch.randn(2, 9, 6),), (None, 3, 1, 0))


def test_nothing_is_multiplied() -> None:
    tensors = {"x": torch.randn(3, 9, 6), "size": torch.ones(3, 9, 1)}
    assert assert_counted("drop_tokens", tensors, {"r": 3, "protected": 1, "seed": 0}) == 0


def test_deploys() -> None:
    size = torch.tensor([1.0, 2]).repeat(10)[None, :, None]
    deployed = Deployed("drop_tokens", (torch.randn(1, 20, 6), size), (7, 1, 3))
    deployed.assert_deploys(other_batch)
