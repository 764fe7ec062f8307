"""Laws that every op of fxprune/ops obeys, checked on its own inputs: an op is its name, tensors and other arguments.

Tensors come batch first, so that the laws can trace at a batch of 2 and run at 1 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnxruntime
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxprune.ops import OPS
from fxprune.process.silence import quiet

FORBIDDEN = ("sort", "topk", "scatter", "index_add", "index_put", "cumsum", "nonzero", ".item", "assert", "masked_")
Results = tuple[Tensor, ...]


def call(name: str, *arguments: Any) -> Results:
    """What the op gives, as a tuple."""
    results = OPS[f"fxprune::{name}"].target(*arguments)
    return results if isinstance(results, tuple) else (results,)


@dataclass(frozen=True)
class Layout:
    """Sizes of one random input."""

    batch: int
    tokens: int
    protected: int
    sized: bool
    seed: int

    def draw(self, *shape: int) -> Tensor:
        """Random numbers in double precision, so that no choice hangs on rounding. [batch, tokens, *shape]"""
        generator = torch.Generator().manual_seed(self.seed + math.prod(shape) + 31 * len(shape))
        return torch.randn(self.batch, self.tokens, *shape, generator=generator, dtype=torch.float64)

    @property
    def x(self) -> Tensor:
        return self.draw(6)

    @property
    def metric(self) -> Tensor:
        return self.draw(5)

    @property
    def score(self) -> Tensor:
        return self.draw(1).squeeze(-1).softmax(-1)

    @property
    def size(self) -> Tensor | None:
        return self.draw(1).mul(3).abs().ceil() if self.sized else None

    @property
    def counts(self) -> Tensor:
        """``size``, or ones."""
        return self.draw(1) * 0 + 1 if self.size is None else self.size

    @property
    def attention(self) -> Tensor:
        return (2 * self.draw(3, self.tokens)).transpose(1, 2).softmax(-1)


def layouts() -> st.SearchStrategy[Layout]:
    """Even and odd token counts, none to five protected, with sizes and without."""
    return st.builds(
        lambda batch, free, protected, sized, seed: Layout(batch, free + protected, protected, sized, seed),
        st.integers(1, 3), st.integers(2, 13), st.sampled_from([0, 1, 2, 5]), st.booleans(), st.integers(0, 10**6),
    )  # fmt: skip


def most_merged(layout: Layout) -> int:
    """ToMe's cap."""
    return (layout.tokens - layout.protected) // 2


def most_dropped(layout: Layout) -> int:
    """One unprotected token stays."""
    return layout.tokens - layout.protected - 1


def unit(vector: Tensor) -> Tensor:
    """A direction on the grid that similarities are taken on."""
    return (vector / (vector @ vector + 1e-6).sqrt() * 4000).round()


def assert_reduces(layout: Layout, r: int, results: Results, expected: Sequence[Results]) -> None:
    """``results`` have the shapes of a reducer, leave protected tokens alone and equal the images' own ones."""
    x, size, place = results
    p = layout.protected
    assert x.shape == (layout.batch, layout.tokens - r, 6)
    assert size.shape == (layout.batch, layout.tokens - r, 1)
    assert place.shape == (layout.batch, layout.tokens)
    assert place.dtype == torch.int64
    assert torch.equal(x[:, :p], layout.x[:, :p])
    assert torch.equal(size[:, :p], layout.counts[:, :p])
    assert torch.equal(place[:, :p], torch.arange(p).expand(layout.batch, p))
    for i, (tokens, counts, places) in enumerate(expected):
        torch.testing.assert_close(x[i], tokens)
        torch.testing.assert_close(size[i], counts)
        assert place[i].tolist() == places.tolist()


def assert_conserves(layout: Layout, results: Results) -> None:
    """Sizes keep their sum, tokens their mean by size."""
    x, size, _ = results
    torch.testing.assert_close(size.sum(1), layout.counts.sum(1))
    torch.testing.assert_close((size * x).sum(1), (layout.counts * layout.x).sum(1))


def assert_identity(layout: Layout, results: Results) -> None:
    """Nothing was removed, bit for bit."""
    assert torch.equal(results[0], layout.x)
    assert torch.equal(results[1], layout.counts)
    assert torch.equal(results[2], torch.arange(layout.tokens).expand(layout.batch, -1))


def assert_sound(name: str, tensors: Sequence[Tensor | None], others: Sequence[Any]) -> None:
    """A second call equals the first, gradients reach the first tensor, half precision has no NaN and is near."""
    first, second = call(name, *tensors, *others), call(name, *tensors, *others)
    assert all(map(torch.equal, first, second))

    x = tensors[0].detach().clone().requires_grad_()  # type: ignore[union-attr]
    call(name, x, *tensors[1:], *others)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0

    _assert_outlined(name, tensors, others)
    for dtype in (torch.float16, torch.bfloat16):
        # The residual stream of a ViT has values of some hundred, whose sums half precision cannot hold.
        half = [None if t is None else (t * 200 if t is tensors[0] and t.ndim == 3 else t).to(dtype) for t in tensors]
        exact = call(name, *[None if t is None else t.double() for t in half], *others)
        for result, wanted in zip(call(name, *half, *others), exact, strict=True):
            assert result.isfinite().all()
            if result.dtype == dtype:
                most = float(wanted.abs().max())
                torch.testing.assert_close(result.double(), wanted.double(), rtol=0.02, atol=0.02 * most)


def _assert_outlined(name: str, tensors: Sequence[Tensor | None], others: Sequence[Any]) -> None:
    """What the op says of its results without computing them is what they are."""
    op = OPS[f"fxprune::{name}"]
    if op.outline is None:
        return
    given: dict[str, Any] = dict(
        zip((a.name for a in op.target._schema.arguments), (*tensors, *others), strict=False)  # the rest: as by default
    )
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[key] = value.detach().clone().requires_grad_(key != "size")
    for result, said in zip(op.target(**given), op.outline(**given), strict=True):
        assert result.shape == said.shape
        assert result.stride() == said.stride()
        assert (result.dtype, result.requires_grad) == (said.dtype, said.requires_grad)


def assert_counted(name: str, tensors: dict[str, Tensor | None], others: dict[str, Any]) -> int:
    """The op's macs are those that PyTorch counts, and do not depend on the batch. Returns them."""
    op = OPS[f"fxprune::{name}"]
    batch = next(t for t in tensors.values() if t is not None).shape[0]
    with FlopCounterMode(display=False) as counter:
        op.target(*tensors.values(), *others.values())
    shapes = {key: None if t is None else tuple(t.shape) for key, t in tensors.items()}
    macs = op.macs(**shapes, **others)
    assert counter.get_total_flops() == 2 * batch * macs
    return macs


def assert_registered(name: str, tensors: Sequence[Tensor], others: Sequence[Any], *, traced: bool = True) -> None:
    """PyTorch's own check of an op: schema, fake tensors, autograd and, the slow part, tracing it forward and back."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(OPS[f"fxprune::{name}"].target, (*tensors, *others), test_utils=checks[: 3 + traced])


@dataclass(frozen=True)
class Deployed:
    """An op traced at a batch of 2, as an exported program and as an ONNX session."""

    name: str
    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        target, others = OPS[f"fxprune::{self.name}"].target, self.others

        class Holder(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return target(*tensors, *others)

        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) * len(self.tensors)
        traced = tuple(t[:1].expand(2, *t.shape[1:]).contiguous() for t in self.tensors)
        return torch.export.export(Holder(), traced, dynamic_shapes=(shapes,), strict=False)

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        with quiet():
            program = torch.onnx.export(self.exported, dynamo=True, opset_version=18)
        assert program is not None
        assert {node.domain for node in program.model.graph} == {""}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = program.model_proto.SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, *tensors: Tensor) -> Results:
        """What onnxruntime gives."""
        names = [node.name for node in self.session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(map(torch.from_numpy, self.session.run(None, feed)))

    def assert_deploys(self, vary: Callable[[Tensor, int], Tensor]) -> None:
        """One node when exported, the same results in plain ATen and in ONNX, at batches of 1 and 7."""
        op = OPS[f"fxprune::{self.name}"].target
        assert [node.target for node in self.exported.graph.nodes if "fxprune" in str(node.target)] == [op]
        with quiet():
            plain = self.exported.run_decompositions()
        names = [str(node.target) for node in plain.graph.nodes if node.op == "call_function"]
        assert not [name for name in names if any(word in name for word in ("fxprune", *FORBIDDEN))]
        module = plain.module()
        for batch in (1, 7):
            tensors = [vary(t, batch) for t in self.tensors]
            wanted = call(self.name, *tensors, *self.others)
            results = module(*tensors)
            for got, want in zip(results if isinstance(results, tuple) else (results,), wanted, strict=True):
                assert torch.equal(got, want)
            for got, want in zip(self.run(*tensors), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def other_batch(tensor: Tensor, batch: int) -> Tensor:
    """Random values like those of ``tensor``: normal ones, positive whole ones, or rows that sum to one."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *tensor.shape[1:])
    if tensor.ndim != 4 and (tensor == tensor.round()).all():
        return torch.randint(1, 4, shape, generator=generator).to(tensor.dtype)
    drawn = torch.randn(shape, generator=generator)
    return drawn.softmax(-1) if (tensor >= 0).all() else drawn


def some_equal(batch: int, tokens: int, width: int, kinds: int, seed: int) -> Tensor:
    """Vectors of a few kinds in random order: many tokens are identical. [batch, tokens, width]"""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, kinds, width, generator=generator)
    which = torch.randint(0, kinds, (batch, tokens), generator=generator)
    return drawn[torch.arange(batch)[:, None], which]
