"""Costs against the papers' figures and brute force; budgets as people write them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import zoo
from support.laws import analysed
from torch import Tensor, nn

from fxprune.errors import OptionError
from fxprune.intake.capture import capture
from fxprune.ir.axis import Axis, new_dim, sum_dim
from fxprune.ir.cost import Budget, Cost, CostModel, expression
from fxprune.ir.pipeline import Pipeline
from fxprune.passes.analysis.find_groups import FindGroups
from fxprune.passes.analysis.propagate_axes import PropagateAxes
from fxprune.passes.transform.clean import Clean


class DeiTBlock(nn.Module):
    """One block of DeiT-S: width 384, 6 heads of 64, 1536 neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(384), nn.LayerNorm(384)
        self.qkv, self.proj = nn.Linear(384, 1152), nn.Linear(384, 384)
        self.fc1, self.fc2 = nn.Linear(384, 1536), nn.Linear(1536, 384)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 6, 64).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 384))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def test_a_deit_small_block_costs_what_the_papers_say() -> None:
    """c_head(197) = 24 333 440 and c_neuron(197) = 151 296 (4 T D d + 2 T^2 d; 2 T D: Kwon et al. 2022, section 3)."""
    program = Pipeline((Clean(), PropagateAxes(), FindGroups())).run(capture(DeiTBlock(), (torch.randn(2, 197, 384),)))
    per_element = {str(g.kind): g.macs for g in program.need("groups") if g.prunable}
    assert per_element["head"] == 24_333_440
    assert per_element["ffn"] == 151_296
    assert CostModel(program)().flops == 6 * 24_333_440 + 1536 * 151_296


def test_params_and_bytes_are_those_of_the_module() -> None:
    program = analysed("resnet18")
    module, _, _ = zoo.build("resnet18")
    cost = CostModel(program)()
    read = set(program.exported.graph_signature.inputs_to_parameters.values())
    assert cost.params == sum(p.numel() for n, p in module.named_parameters() if n in read)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in program.tensors.values())


def test_tied_weights_count_once() -> None:
    program = analysed("tied")
    distinct = {
        t.data_ptr(): t.numel()
        for n, t in program.tensors.items()
        if n in program.exported.graph_signature.inputs_to_parameters.values()
    }
    assert CostModel(program)().params == sum(distinct.values())


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.data())
def test_expressions_count_elements(sizes: list[int], data: st.DataObject) -> None:
    a, b, c = (Axis(s + 1) for s in sizes)
    dim = (*sum_dim([(a,), (b, c)]), c)
    kept = {x: data.draw(st.integers(1, x.size)) for x in (a, b, c)}
    count = expression(dim, {a, b, c}, {})
    assert count(kept) == (kept[a] + kept[b] * kept[c]) * kept[c]
    assert count({}) == (a.size + b.size * c.size) * c.size
    assert count.axes() == {a, b, c}


def test_symbols_count_at_their_example_size() -> None:
    assert expression(new_dim(1000003 * 64), set(), {1000003: 2}).constant == 128


@pytest.mark.parametrize("name", ["vit", "resnet18", "gated_ffn", "shuffle"])
def test_the_ledger_is_the_model_kept_up_to_date(name: str) -> None:
    program = analysed(name)
    model, generator = CostModel(program), torch.Generator().manual_seed(0)
    ledger, kept = model.ledger("flops", {}), {}
    for _ in range(30):
        live = [g for g in program.need("groups") if g.prunable]
        group = live[int(torch.randint(len(live), (1,), generator=generator))]
        count = int(torch.randint(1, group.size + 1, (1,), generator=generator))
        after = model({**kept, group.axis: count}).flops
        assert ledger.total + ledger.change(group.axis, count) == after
        ledger.set(group.axis, count)
        kept[group.axis] = count
        assert ledger.total == after


def test_separable_means_no_products_between_groups() -> None:
    vit, resnet = analysed("vit"), analysed("resnet18")

    def separable(program: object, kinds: set[str]) -> bool:
        groups = [g for g in program.need("groups") if g.prunable and str(g.kind) in kinds]  # type: ignore[attr-defined]
        return CostModel(program).separable("flops", [g.axis for g in groups])  # type: ignore[arg-type]

    assert separable(vit, {"head", "ffn"})
    assert not separable(vit, {"head", "qkv"})
    assert not separable(resnet, {"channel"})


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (0.5, 50),
        ("0.5", 50),
        (1, 100),
        (1.0, 100),
        ("2.3G", 2.3e9),
        ("800M", 8e8),
        ("64KiB", 65536),
        (4000, 4000),
        ("1e9", 1e9),
        ("1_000_000", 1e6),
    ],
)
def test_budgets_as_people_write_them(value: object, limit: float) -> None:
    assert Budget.parse("flops", value).limit(Cost(100, 10, 40)) == pytest.approx(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "positive"),
        ("0", "positive"),
        (-0.5, "positive"),
        (1.5, "at most 1"),
        ("2", "at most 1"),
        ("half", "not a budget"),
        ("", "not a budget"),
        ("5Q", "not a budget"),
        ("nan", "not a budget"),
        ("inf", "not a budget"),
        ("0.5.5", "not a budget"),
    ],
)
def test_budgets_that_make_no_sense(value: object, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Budget.parse("flops", value)  # type: ignore[arg-type]


def test_unknown_budgets_get_the_nearest_name() -> None:
    with pytest.raises(OptionError, match="did you mean 'flops'"):
        Budget.parse("flop", 0.5)
