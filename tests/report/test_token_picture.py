"""The picture of what merged: its size, its colours, and when there is none."""

from __future__ import annotations

import io

import torch
from PIL import Image
from support.token_models import TokenViT, analysed, planned, scrambled

from fxprune.passes.transform.merge_tokens import MergeTokens
from fxprune.report.token_picture import GAP, SIDE, places, token_picture


def test_patches_of_one_token_share_their_colour_and_dropped_ones_are_black() -> None:
    dense = analysed(scrambled(TokenViT()))
    images = torch.rand(2, 3, 32, 32)
    for reducer, dropped in (("tome", 0), ("prune", 9)):
        small = MergeTokens().run(planned(dense, reducer, [4, 3, 2]))
        place = places(small, [images])
        assert place is not None
        assert place.shape == (2, 17)
        assert int((place[0] < 0).sum()) == dropped
        found = token_picture(dense.need("tokens"), small, [images])
        assert found is not None
        picture = Image.open(io.BytesIO(found))
        assert picture.size == (2 * SIDE + GAP, 2 * SIDE + GAP)
        cell = SIDE // 4
        middle = [
            [picture.getpixel((x * cell + cell // 2, SIDE + GAP + y * cell + cell // 2)) for x in range(4)]
            for y in range(4)
        ]
        group = place[0, 1:].reshape(4, 4)
        for g in group.unique().tolist():
            colours = {middle[y][x] for y, x in (group == g).nonzero().tolist()}
            assert len(colours) == 1
            assert (colours == {(10, 10, 10)}) == (g < 0)


def test_what_is_no_picture() -> None:
    dense = analysed(scrambled(TokenViT()))
    assert token_picture(dense.need("tokens"), dense, [torch.rand(2, 3, 32, 32)]) is None  # nothing merged
    small = MergeTokens().run(planned(dense, "tome", [4, 3, 2]))
    assert token_picture(dense.need("tokens"), small, [torch.rand(2, 7)]) is None
