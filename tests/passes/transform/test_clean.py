"""Clean: evaluation form, the same values bit for bit, the caller's program untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.errors import CaptureError
from fxprune.intake.capture import capture
from fxprune.ir.pipeline import Pipeline, snapshot
from fxprune.ir.program import Program
from fxprune.ir.rebuild import copy_graph, rebuild
from fxprune.passes.transform.clean import Clean


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def cleaned(function: Callable[..., Any], x: Tensor, **tensors: Tensor) -> tuple[Program, list[str]]:
    """The cleaned program and its ops; checks that captured and cleaned compute what the function does."""
    module = Lambda(function, **tensors)
    program = capture(module, (x,))
    before = snapshot(program)
    result = Pipeline((Clean(),)).run(program)
    assert snapshot(program) == before, "the caller's program is untouched"
    other = torch.randn(x.shape[0] + 1, *x.shape[1:])
    with torch.no_grad():
        expected = module(other.clone())
    got = result.exported.module()(other.clone())
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (expected, got)), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    return result, [str(n.target).removeprefix("aten.") for n in result.graph.nodes if n.op == "call_function"]


X = torch.randn(2, 4)


# ---------------------------------------------------------------- removals


@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout])
def test_dropout_of_every_kind_goes(drop: Callable[..., Tensor]) -> None:
    _, ops = cleaned(lambda _, x: drop(x + 1, 0.5, training=False) * 2, X)
    assert ops == ["add.Tensor", "mul.Tensor"]


def test_dropout_that_is_meant_stays_and_is_told() -> None:
    program = Clean().run(capture(Lambda(lambda _, x: F.dropout(x, 0.5, training=True)), (X,)))
    assert any("dropout" in str(n.target) for n in program.graph.nodes)
    assert program.notes == ("dropout drops values in evaluation too (training=True in the code of the model)",)


def test_assertions_go_and_so_does_what_only_they_read() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        torch._check(x.shape[0] < 1000)
        return x.to(torch.float64).to(torch.float32) + 1

    _, ops = cleaned(forward, X)
    assert ops == ["to.dtype", "to.dtype", "add.Tensor"]


def test_what_changes_nothing_goes() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        empty = torch.tensor([])
        return torch.cat([empty, x.float().to(x.device).detach()], -1).type_as(x) * torch.tensor(2.0)

    _, ops = cleaned(forward, X)
    assert ops == ["mul.Tensor"]


def test_a_detach_that_stops_a_gradient_stays() -> None:
    program, ops = cleaned(lambda m, x: (x * m.w).detach() + x * m.w, X, w=nn.Parameter(torch.randn(4)))
    assert "detach.default" in ops
    program.exported.module()(X).sum().backward()
    weight = program.exported.state_dict["w"]
    assert weight.grad is not None
    assert torch.equal(weight.grad, X.sum(0))


def test_unread_tensors_go_and_unread_inputs_stay() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.spare = nn.BatchNorm1d(4), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            return self.norm(x)

    program = capture(Unread(), (X, X))
    assert "norm.num_batches_tracked" in program.tensors
    result = Pipeline((Clean(),)).run(program)
    assert set(result.tensors) == {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert result.user_inputs == ["x", "unused"]
    assert result.notes == ("removed, nothing reads them: spare",)
    assert "spare" in program.tensors


def test_a_clean_program_is_returned_as_it_is() -> None:
    once = Clean().run(capture(Lambda(lambda _, x: F.dropout(x, training=False) + 1), (X,)))
    assert Clean().run(once) is once


def test_a_graph_exported_in_training_form_is_refused() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    program = capture(torch.export.export(module.train(), (torch.randn(2, 3, 5),)))
    with pytest.raises(CaptureError, match="runs in training form") as caught:
        Clean().run(program)
    assert "model.eval()" in caught.value.cure


# ---------------------------------------------------------------- in-place ops


def in_place(ops: list[str]) -> list[str]:
    return [op for op in ops if op.split(".")[0].endswith("_")]


def chained(_: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y.relu_().mul_(x)
    return F.silu(y, inplace=True)


def slices(_: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = y[:, 1]
    part = y[:, 2]
    part.add_(1)
    part.mul_(x[:, 0])  # writes through the slice again
    y[:, 1:3] = 5
    y[:, 3].eq_(0)
    return y


def fills(_: nn.Module, x: Tensor) -> Tensor:
    mask = torch.zeros(4, 4)
    mask[1:3, 1:] = 1
    mask[0].fill_(-2.0)
    mask[3].zero_()
    return x @ mask


def dtypes(_: nn.Module, x: Tensor) -> Tensor:
    y = (x * 3).half()
    y.add_(x)  # float32 into half
    return y.float().masked_fill_(y > 0, 2.0).index_put_((torch.tensor([0]),), x[1:2])


def one_of_several(_: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(2)
    values /= values.sum(-1, keepdim=True)  # leaves the indices alone
    return values, indices * 2


def writes_into_input(_: nn.Module, x: Tensor) -> Tensor:
    return x.add_(1) * x


@pytest.mark.parametrize("forward", [chained, slices, fills, dtypes, one_of_several, writes_into_input])
def test_in_place_ops_become_functions(forward: Callable[..., Tensor]) -> None:
    program, ops = cleaned(forward, X)
    assert in_place(ops) == []
    assert program.notes == ()


def another_view(_: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    z = y.view(-1)
    y.mul_(2)
    return z * 3


def view_written(_: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    y.view(-1).mul_(2)
    return y


def one_of_several_views(_: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    first, _second = y.chunk(2, -1)
    first.mul_(2)
    return y


def perhaps_a_view(_: nn.Module, x: Tensor) -> Tensor:
    y = x + 1
    z = torch.einsum("ij->ij", y)  # y itself, though no schema says so
    z.mul_(2)
    return y


@pytest.mark.parametrize("forward", [another_view, view_written, one_of_several_views, perhaps_a_view])
def test_an_op_that_another_view_would_notice_stays_and_is_told(forward: Callable[..., Tensor]) -> None:
    program, ops = cleaned(forward, X)
    assert in_place(ops) == ["mul_.Tensor"]
    assert len(program.notes) == 1
    assert "still writes in place" in program.notes[0]
    assert "is read later" in program.notes[0]


@pytest.mark.parametrize(("index", "straight"), [([-1], True), ([1, 2], True), ([2, 1], False), ([0, 2], False)])
def test_a_constant_index_of_neighbours_is_a_slice(index: list[int], straight: bool) -> None:
    program, ops = cleaned(lambda _, x: x.reshape(-1, X.shape[-1])[..., index] * 2, X)
    assert ("slice.Tensor" in ops) == straight
    assert ("index.Tensor" in ops) != straight
    assert bool(program.exported.constants) != straight


def test_an_index_that_a_checkpoint_may_change_stays() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        return x.index_select(1, module.order)

    program = Pipeline((Clean(),)).run(capture(Lambda(forward, order=torch.tensor([1, 2])), (X,)))
    assert any(n.target is torch.ops.aten.index_select.default for n in program.graph.nodes)


def test_a_product_by_einsum_is_no_view_of_the_weight() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        return torch.einsum("ij,jk->ik", x, module.weight).mul_(2)

    program = Pipeline((Clean(),)).run(capture(Lambda(forward, weight=torch.randn(4, 4)), (X,)))
    assert in_place([str(n.target).removeprefix("aten.") for n in program.graph.nodes]) == []
    assert not any("in place" in note for note in program.notes)


def test_a_write_into_a_buffer_stays_and_is_told() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        module.count.add_(1)
        return x * module.count

    module = Lambda(forward, count=torch.zeros(()))
    program = Pipeline((Clean(),)).run(capture(module, (X,)))
    assert any("keeps its value from call to call" in note for note in program.notes)
    assert module.count == 0, "capture does not run the model on the user's buffers"


# ---------------------------------------------------------------- copy and rebuild


def test_a_copy_keeps_names_and_shares_weights() -> None:
    class Builtins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input: Tensor, float: Tensor) -> Tensor:
            return self.linear(input) + float

    exported = capture(Builtins(), (X, X)).exported
    again = rebuild(exported, copy_graph(exported))
    assert [n.name for n in again.graph.nodes] == [n.name for n in exported.graph.nodes]
    assert all(again.state_dict[k] is v for k, v in exported.state_dict.items())
    node = next(n for n in again.graph.nodes if n.op == "call_function")
    node.args = (*node.args[:2],)
    assert snapshot(Program(again)) != snapshot(Program(exported)), "an edit of the copy leaves the original alone"
