"""Token sites: found by what the graph does with tokens, frozen with the reason."""

from __future__ import annotations

import pytest
import torch
from support.token_models import TokenViT, analysed, scrambled
from torch import Tensor, nn

from fxprune.ir.cost import CostModel
from fxprune.ir.token_flow import TokenFlow


def flow(unmerge: bool = False, **options: object) -> TokenFlow:
    found: TokenFlow = analysed(scrambled(TokenViT(**options)), unmerge=unmerge).need("tokens")  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("front", [0, 1, 2, 5])
def test_every_block_of_a_vit_is_a_site_and_leading_tokens_are_protected(front: int) -> None:
    found = flow(front=front, read="class" if front else "mean")
    assert [s.name for s in found.sites] == [f"blocks.{i}.proj:token" for i in range(3)]
    assert all(s.usable for s in found.sites)
    assert {(s.tokens, s.protected) for s in found.sites} == {(16 + front, front)}
    assert all(s.query and s.key and s.values for s in found.sites)
    # the attention of block 0 sees all tokens; those of the later blocks see what is left
    assert sorted(found.region[n] for n in found.softmaxes) == [0, 1]


@pytest.mark.parametrize("how", ["written", "parallel", "post"])
def test_other_forms_of_blocks(how: str) -> None:
    found = flow(how=how)
    assert len(found.usable) == 3
    assert all(s.key and s.values for s in found.sites)
    if how == "written":
        assert all(s.mapped and s.transposed and not s.query for s in found.sites)


@pytest.mark.parametrize(
    ("how", "reason"), [("rope", "holds all tokens"), ("bias", "holds all tokens"), ("causal", "causal attention")]
)
def test_positions_known_inside_the_blocks_freeze_all_but_the_last(how: str, reason: str) -> None:
    found = flow(how=how)
    assert all(reason in s.frozen for s in found.sites[:2])
    if how != "causal":  # nothing behind the last attention knows positions
        assert found.sites[2].usable


@pytest.mark.parametrize(("read", "reason"), [("all", "the graph returns every token"), ("grid", "part of the tokens")])
def test_heads_that_need_every_token_freeze_all_until_they_get_them_back(read: str, reason: str) -> None:
    found = flow(read=read)
    assert all(reason in s.frozen for s in found.sites)
    assert "unmerge=True" in found.sites[0].frozen or read == "grid"
    restored = flow(unmerge=True, read=read)
    assert len(restored.usable) == 3
    assert len(restored.restored) == 1


@pytest.mark.parametrize(("read", "count"), [("class", 0), ("mean", 1), ("mean-patches", 1), ("both", 1)])
def test_averages_over_tokens_are_found(read: str, count: int) -> None:
    found = flow(read=read)
    assert len(found.usable) == 3
    assert len(found.averages) == count


def test_every_region_has_an_axis_of_its_own_and_the_cost_follows_it() -> None:
    program = analysed(scrambled(TokenViT(front=1)))
    found = program.need("tokens")
    axes = [s.axis for s in found.usable]
    assert len(set(axes)) == 3
    model = CostModel(program, found.axes, also=axes)
    dense = CostModel(program)()
    assert model() == dense
    # behind site 1 there are the feed-forward layer of block 1 (2 * 24 * 48 per token) and block 2
    fewer = model({axes[1]: 15}).flops
    # block 2's attention runs on region 1: qkv 3*24*24, proj 24*24, and 2 products of 24 each over tokens^2
    saved = 2 * 24 * 48 + 4 * 24 * 24 + 2 * 24 * (17**2 - 16**2)
    assert dense.flops - fewer == saved


def test_an_open_number_of_tokens_is_frozen() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.block = nn.Embedding(11, 24), nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.block(self.table(ids))[:, 0]

    from fxprune.intake.capture import capture
    from fxprune.ir.pipeline import Pipeline
    from fxprune.passes.analysis.find_token_sites import FindTokenSites
    from fxprune.passes.analysis.propagate_axes import PropagateAxes
    from fxprune.passes.transform.clean import Clean

    program = capture(Text().eval(), (torch.randint(0, 11, (2, 7)),), {})
    found = Pipeline((Clean(), PropagateAxes(), FindTokenSites())).run(program).need("tokens")
    assert [s.frozen for s in found.sites] == ["the number of tokens is open"]


def test_two_streams_of_tokens_only_the_larger_one_is_taken() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = TokenViT(depth=2)
            self.two = TokenViT(size=2, depth=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.one(images) + self.two(images[:, :, :16, :16])

    found = analysed(scrambled(Two())).need("tokens")
    assert [s.usable for s in found.sites] == [True, True, False]
    assert "other tokens" in found.sites[2].frozen


def test_convolutions_have_no_sites() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 5))
    assert analysed(model.eval()).need("tokens").sites == ()


def test_a_token_that_is_picked_from_among_the_patches_freezes() -> None:
    class Picks(TokenViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(x + self.position))[:, 3])

    found = analysed(scrambled(Picks(front=0, read="mean"))).need("tokens")
    assert all("one token is picked" in s.frozen for s in found.sites)
