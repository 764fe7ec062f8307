"""The transform that reduces tokens: what it computes, what it costs, what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from support.laws import counted_macs
from support.token_models import TokenViT, analysed, planned, scrambled
from torch import Tensor

from fxprune.backends.eager.backend import EagerBackend
from fxprune.errors import OptionError, PlanError
from fxprune.ir.cost import CostModel
from fxprune.ir.dataflow import op_name
from fxprune.ir.pipeline import Pipeline
from fxprune.ir.plan import CompressionPlan, TokenPlan
from fxprune.ir.program import Program
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.merge_tokens import MergeTokens, trial
from fxprune.passes.transform.spell_out_tokens import SpellOutTokens
from fxprune.target.backend import lower_and_verify
from fxprune.testing import run_flat

REDUCERS = (
    "tome",
    "prune",
    "prune{score=class}",
    "prune{score=entropy-value}",
    "ppt",
    "zero-tprune",
    "transform",
    "random",
)
FACTS = ("axes", "groups", "tokens", "plan")


@functools.cache
def program(front: int = 1, read: str = "class", how: str = "sdpa", unmerge: bool = False) -> Program:
    return analysed(scrambled(TokenViT(front=front, read=read, how=how)), unmerge=unmerge)


def merged(dense: Program, reducer: str, counts: Sequence[int]) -> Program:
    """Through the pipeline, so that everything is verified."""
    return Pipeline((MergeTokens(),), start=FACTS).run(planned(dense, reducer, list(counts)))


def images(batch: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def values(of: Program, x: Tensor, wanted: str) -> list[Tensor]:
    """What the nodes of our ops called ``wanted`` return."""
    found: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if op_name(n) == wanted:
                found.append(value)
            return value

    run_flat(of, [x], Watch(of.exported.graph_module))
    return found


@pytest.mark.drawn(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_counts_equal_the_schedule_and_predicted_cost_equals_counted(reducer: str) -> None:
    small = merged(program(), reducer, [3, 2, 4])
    assert counted_macs(small) == CostModel(PropagateAxes().run(small))().flops
    assert CostModel(PropagateAxes().run(small))().flops < 1.02 * CostModel(program())().flops
    tokens = [
        n.meta["val"][0].shape[1]
        for n in small.graph.nodes
        if op_name(n).startswith("fxprune::") and isinstance(n.meta["val"], tuple)
    ]
    assert tokens == [14, 12, 8]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_batch_1_and_7_and_a_second_call(reducer: str) -> None:
    small = merged(program(), reducer, [3, 2, 4])
    x = images(7)
    (whole,) = run_flat(small, [x])
    assert torch.equal(whole, run_flat(small, [x])[0])
    for i in range(7):
        torch.testing.assert_close(run_flat(small, [x[i : i + 1]])[0], whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero-tprune", [(5, 0, 0), (5, 0, 0), (1, 0, 0)]),
        ("zero-tprune{iterations=30,lowest=0.01,highest=0.7}", [(30, 0.01, 0.7)] * 3),
    ],
)
def test_pagerank_iterates_while_most_tokens_are_there(text: str, expected: list[tuple[float, ...]]) -> None:
    ops = [n for n in merged(program(), text, [5, 4, 2]).graph.nodes if op_name(n) == "fxprune::pagerank_tokens"]
    assert [n.args[-3:] for n in ops] == expected  # 17, 12 and 8 of 17 tokens


def test_nothing_removed_is_the_program_itself() -> None:
    dense = planned(program(), "tome", [0, 0, 0])
    assert Pipeline((MergeTokens(),), start=FACTS).run(dense) is dense


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("front", "read", "how"),
    [
        (1, "class", "sdpa"),
        (1, "class", "written"),
        (0, "mean", "sdpa"),
        (2, "mean-patches", "sdpa"),
        (1, "both", "post"),
    ],
)
def test_merging_equal_tokens_changes_nothing(front: int, read: str, how: str) -> None:
    """Tokens that are the same count as often as they stand for: attention and averages do not notice.

    Without position embeddings an image of two colours has two kinds of patches, which stay two kinds in every block.
    """
    model = scrambled(TokenViT(front=front, read=read, how=how))
    with torch.no_grad():
        model.position.zero_()  # type: ignore[union-attr, operator]
    dense = analysed(model)
    small = merged(dense, "tome", [5, 3, 2])
    x = images(2, seed=1)[:, :, :1, :1].repeat(1, 1, 32, 32)
    x[:, :, 16:] = images(2, seed=2)[:, :, :1, :1]
    torch.testing.assert_close(run_flat(small, [x])[0], run_flat(dense, [x])[0], rtol=1e-4, atol=1e-4)


def test_attention_that_does_not_weigh_notices() -> None:
    model = scrambled(TokenViT(read="mean"))
    with torch.no_grad():
        model.position.zero_()  # type: ignore[union-attr, operator]
    dense = analysed(model)
    small = merged(dense, "tome{proportional=false}", [5, 3, 2])
    x = images(2, seed=1)[:, :, :1, :1].repeat(1, 1, 32, 32)
    x[:, :, 24:] = images(2, seed=2)[:, :, :1, :1]
    assert not torch.allclose(run_flat(small, [x])[0], run_flat(dense, [x])[0], rtol=1e-3, atol=1e-3)


def test_sizes_sum_to_the_tokens_and_the_class_token_is_untouched() -> None:
    small = merged(program(), "tome", [5, 4, 2])
    results = values(small, images(), "fxprune::merge_tokens")
    assert [r[0].shape[1] for r in results] == [12, 8, 6]
    for _, size, _ in results:
        assert torch.equal(size.sum(1), torch.full((3, 1), 17.0))
        assert torch.equal(size[:, 0], torch.ones(3, 1))


@pytest.mark.parametrize("read", ["all", "grid"])
def test_unmerged_heads_see_every_token_as_the_one_that_took_it_in(read: str) -> None:
    dense = program(read=read, unmerge=True)
    small = merged(dense, "tome", [4, 0, 3])
    got, want = run_flat(small, [images()])[0], run_flat(dense, [images()])[0]
    assert got.shape == want.shape
    if read == "all":  # tokens that share a place are equal; the class token is its own
        first, second = (r[2] for r in values(small, images(), "fxprune::merge_tokens"))
        place = second.gather(1, first)
        assert int(place.max()) == 9
        for b in range(3):
            for t in range(17):
                same = (place[b] == place[b, t]).nonzero()[:, 0]
                assert torch.equal(got[b, same], got[b, t].expand(len(same), -1))
        assert int((place == 0).sum()) == 3
    with pytest.raises(OptionError, match="cannot be restored"):
        merged(dense, "prune", [4, 0, 3])


@pytest.mark.drawn(2)
@pytest.mark.parametrize("reducer", ["tome", "ppt", "zero-tprune", "random"])
def test_spelt_out_ops_compute_the_same_and_cost_the_same(reducer: str) -> None:
    small = merged(program(), reducer, [3, 2, 4])
    plain = Pipeline((SpellOutTokens(),)).run(small)
    assert not any("fxprune" in str(n.target) for n in plain.graph.nodes)
    assert torch.equal(run_flat(plain, [images()])[0], run_flat(small, [images()])[0])
    assert CostModel(PropagateAxes().run(plain))() == CostModel(PropagateAxes().run(small))()


def test_the_spelt_out_program_saves_and_loads(tmp_path: object) -> None:
    plain = Pipeline((SpellOutTokens(),)).run(merged(program(), "tome", [3, 2, 4]))
    lowered, parity = lower_and_verify(EagerBackend(), plain, tmp_path)  # type: ignore[arg-type]
    assert parity.ok
    assert torch.equal(lowered.run([images()])[0], run_flat(plain, [images()])[0])


def test_a_trial_computes_what_the_transform_makes() -> None:
    dense = program(front=2, read="mean-patches")
    plan = planned(dense, "tome", [3, 2, 4]).need("plan").tokens
    module = trial(dense, plan)
    x = images()
    got = torch.fx.Interpreter(module).run(*dense.arguments([x]))
    assert torch.equal(got[0], run_flat(merged(dense, "tome", [3, 2, 4]), [x])[0])
    assert trial(dense, TokenPlan("tome", {})) is dense.exported.graph_module


def test_plans_that_do_not_fit() -> None:
    dense = program()
    with pytest.raises(PlanError, match="at most 8 there"):
        merged(dense, "tome", [9, 0, 0])
    with pytest.raises(PlanError, match="no attention"):
        MergeTokens().run(dense.but(plan=CompressionPlan(TokenPlan("tome", {"blocks.7.proj:token": 2}).choices())))
    with pytest.raises(OptionError, match=r"unknown token reducer 'tomme'[\s\S]*did you mean 'tome'"):
        merged(dense, "tomme", [1, 0, 0])
    frozen = program(read="all")
    with pytest.raises(PlanError, match="the graph returns every token"):
        MergeTokens().run(frozen.but(plan=CompressionPlan(TokenPlan("tome", {"blocks.0.proj:token": 2}).choices())))
    with pytest.raises(OptionError, match="needs a class token"):
        merged(program(front=0, read="mean"), "prune{score=class}", [2, 0, 0])


def test_models_without_a_class_token_prune_by_what_all_look_at() -> None:
    small = merged(program(front=0, read="mean"), "prune", [4, 4, 4])
    kinds = {n.args[2] for n in small.graph.nodes if op_name(n) == "fxprune::token_score"}
    assert kinds == {"received-value"}
