"""Strangers bring their models: looked at, compiled with and without data, written, loaded, and held against the eager
module with its weights masked by hand. Whatever happens, the module is bit for bit what it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import strangers
from support.fingerprints import fingerprint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.data import generate
from fxprune.intake.containers import plain
from fxprune.intake.load import load
from fxprune.ir.axis import kept_index, total
from fxprune.ir.plan import CompressionPlan
from fxprune.ir.program import Program
from fxprune.testing import keep_of

NOT_IN_ONNX = {
    "a kernel for each sample": "a convolution has a fixed number of groups there",
    "half precision": "onnxruntime has no kernels of bfloat16 on a CPU",
    "double precision": "onnxruntime has no convolution of float64",
}
QUIET: dict[str, Any] = {"on_event": lambda _: None}


def leaves(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(plain(value, [])) if isinstance(t, Tensor)]


def other_batch(inputs: Any) -> Any:
    """The same inputs with a sample more, in containers of their own."""
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[:1].clone()]), inputs)


def mask_by_hand(model: nn.Module, found: Program, plan: CompressionPlan) -> int:
    """Zero in every weight what makes, scales or reads a cut element; how many groups were cut."""
    keep = keep_of(found, plan)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    cut = 0
    for group in found.need("groups"):
        choice = plan.choices.get(group.name)
        if choice is None or len(choice.keep) == choice.size:
            continue
        cut += 1
        slots = [s for s in group.slots if s.parameter in parameters]
        assert any(s.position == 1 for s in slots), f"{group.name}: nothing that has a weight reads it"
        for slot in slots:
            gone = torch.ones(total(slot.dim), dtype=torch.bool)
            gone[kept_index(slot.dim, keep)] = False
            with torch.no_grad():
                parameters[slot.parameter].transpose(0, slot.position)[gone] = 0
    return cut


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning", "ignore::FutureWarning")
@pytest.mark.drawn(13)
@pytest.mark.parametrize("name", strangers.MODELS)
def test_a_stranger_is_cut_as_masked_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    model, args, kwargs = strangers.MODELS[name]()
    model.eval()
    inputs: Any = (args, kwargs) if args and kwargs else kwargs or args
    before = fingerprint(model, inputs)
    found = fxprune.inspect(model, inputs, **QUIET)
    small = fxprune.compile(model, inputs, flops=0.7, **QUIET)
    data = generate(load(model, input=inputs), samples=8, batch=4)
    target = "eager" if name in NOT_IN_ONNX else "onnx"
    written = fxprune.compile(model, inputs, flops=0.7, data=data, target=target, out=tmp_path / "small", **QUIET)
    assert fingerprint(model, inputs) == before

    assert small.report["cost"]["ratio"]["flops"] <= 0.7
    masked = copy.deepcopy(model)
    assert mask_by_hand(masked, found, small.plan)
    limit = 1e-5 if next(model.parameters()).dtype is not torch.bfloat16 else 3e-2
    for given in ((args, kwargs), other_batch((args, kwargs))):
        with torch.no_grad():
            got = small.module(*copy.deepcopy(given[0]), **copy.deepcopy(given[1]))
            want = masked(*copy.deepcopy(given[0]), **copy.deepcopy(given[1]))
        for ours, theirs in zip(leaves(got), leaves(want), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit * float(theirs.abs().max().clamp_min(1)))

    loaded = fxprune.load(tmp_path / "small")
    with torch.no_grad():
        again, kept = (one(*copy.deepcopy(args), **copy.deepcopy(kwargs)) for one in (loaded, written.module))
    assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(kept), strict=True))
    assert (tmp_path / "small" / ("model.onnx" if target == "onnx" else "model.pt2")).is_file()
