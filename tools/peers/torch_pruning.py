"""Torch-Pruning as its documentation says to use it, at a given FLOPs ratio: the tool that a user would take instead.

Version 1.6.1 from PyPI (``tools/peers/requirements.txt``). Import this as ``peers.torch_pruning`` with ``tools`` on the
path: beside it on the path it would hide the package of the same name.

Its README and its transformer examples (prune_hf_bert.py, prune_timm_vit.py) say:

importance   ``MagnitudeImportance(p=2, group_reduction="mean")``, or ``TaylorImportance()`` after the backward passes
             of the training loss on some labelled batches ("a good choice for ViT pruning")
heads        ``num_heads`` of the q, k, v layers, ``prune_num_heads=True``, ``prune_head_dims=False`` and
             ``head_pruning_ratio`` equal to ``pruning_ratio``; the modules are told their new head counts afterwards
classifier   among ``ignored_layers``
settings     ``uniform`` (one ratio for all layers, the default), ``global_pruning=True``, and ``isomorphic=True`` with
             it; each over all widths, or as "bottleneck", which leaves the residual stream as it is

No fine-tuning follows here, for no row has any. ``round_to`` is left away, which gives the peer more freedom than the
multiples of 8 that fxprune keeps. MACs are those of fxprune (``torch.utils.flop_counter`` over one sample gives the
same number; the runner checks that for the dense model), and the ratio is found by bisection.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.data.batch import Batch
from fxprune.errors import BudgetInfeasible
from fxprune.process.silence import quiet

STEPS = 12  # of bisection, for either unknown
CLOSE = 0.99  # of the budget: near enough
MOST = 0.995  # largest pruning ratio that is tried


@dataclass(frozen=True)
class Pruned:
    """A smaller eager model, its MACs for one sample, and the settings that led there."""

    model: nn.Module
    macs: int
    setting: dict[str, Any]


@dataclass
class TorchPruning:
    """The peer on one model.

    fresh     a new copy of the dense model
    example   one sample of the size at which MACs are counted
    losses    training losses of a model on labelled batches, for Taylor
    """

    fresh: Callable[[], nn.Module]
    example: Batch
    losses: Callable[[nn.Module], Iterable[Tensor]]
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    def prune(self, importance: str, variant: str, ratio: float) -> Pruned:
        """As near below ``ratio`` of the dense MACs as its knobs allow. Raises BudgetInfeasible where they do not.

        First one ratio for widths and heads; then, where whole heads make a step too wide, the widths alone.
        """
        limit, broken = ratio * macs(self.fresh(), self.example), ""

        def attempt(width: float, heads: float) -> Pruned | None:
            """None where nothing that runs is left, such as an attention without a head."""
            nonlocal broken
            try:
                with quiet(), _plain_attention():
                    model, setting = self._prune(importance, variant, width, heads)
                return Pruned(model, macs(model, self.example), {**setting, "pruning_ratio": round(width, 5)})
            except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
                broken = f"{type(error).__name__} at ratio {width:.3f}: {str(error)[:80]}"
                return None

        best: Pruned | None = None

        def bisect(low: float, high: float, heads: float | None) -> tuple[float, float]:
            """(ratio whose result is too large, ratio whose result fits or is broken), close together."""
            nonlocal best
            for _ in range(STEPS):
                if best is not None and best.macs >= CLOSE * limit:
                    break
                middle = (low + high) / 2
                found = attempt(middle, middle if heads is None else heads)
                if found is not None and found.macs > limit:
                    low = middle
                    continue
                high = middle
                if found is not None and (best is None or best.macs < found.macs):
                    best = found
            return low, high

        low, high = bisect(0.0, MOST, None)
        if best is None:  # whole heads end the road: from the last ratio that runs, the widths go on
            bisect(low, MOST, low)
        else:
            bisect(0.0, high, high)
        if best is None:
            raise BudgetInfeasible(f"Torch-Pruning does not reach {ratio:g} of the FLOPs", where=variant, why=broken)
        return best

    def _prune(self, importance: str, variant: str, width: float, heads: float) -> tuple[nn.Module, dict[str, Any]]:
        import torch_pruning as tp

        model = self.fresh()
        if importance == "taylor":
            self._set_gradients(model)
            score = tp.importance.TaylorImportance()
        else:
            score = tp.importance.MagnitudeImportance(p=2, group_reduction="mean")
        ignored = outputs(model) + (stream(model) if "bottleneck" in variant else [])
        isomorphic = "isomorphic" in variant
        ranked = {"global_pruning": "global" in variant or isomorphic, "isomorphic": isomorphic}
        told = {layer: count for attention in attentions(model) for layer, count in attention.heads.items()}
        pruner = tp.pruner.BasePruner(
            model,
            dict(self.example.kwargs) or self.example.args,
            importance=score,
            pruning_ratio=width,
            ignored_layers=ignored,
            num_heads=told,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=heads,
            output_transform=_first,
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
            **ranked,
        )
        known = attentions(model)
        pruner.step()
        for attention in known:
            attention.adapt(pruner.num_heads[next(iter(attention.heads))])
        model.zero_grad()
        return model.eval(), {**ranked, "head_pruning_ratio": round(heads, 5) if told else None}

    def _set_gradients(self, model: nn.Module) -> None:
        """Gradients of the loss at the dense weights, summed over the batches; computed once."""
        if not self._gradients:
            dense = self.fresh()
            for loss in self.losses(dense):
                loss.backward()
            self._gradients = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
        for name, parameter in model.named_parameters():
            found = self._gradients.get(name)
            parameter.grad = torch.zeros_like(parameter) if found is None else found.clone()


def macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates of one forward pass: linear, matmul, convolution and both products of attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*example.args, **example.kwargs)
    return int(counter.get_total_flops()) // 2


def _first(output: Any) -> Tensor:
    return next(iter(output.values())) if isinstance(output, dict) else output


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The plain attention: the graph that Torch-Pruning follows has an edge for every product then."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


# --- what its user writes by hand for each model family -----------------------------------------------------------


@dataclass
class Attention:
    """One attention module: the layers that make heads, and how it learns of another count."""

    module: nn.Module
    heads: dict[nn.Module, int]

    def adapt(self, count: int) -> None:
        """Tell the module that ``count`` heads are left."""
        module: Any = self.module
        if hasattr(module, "query"):
            module.num_attention_heads, module.all_head_size = count, module.query.out_features
            module.attention_head_size = module.query.out_features // max(count, 1)
        elif hasattr(module, "num_heads"):
            module.num_heads, module.attn_dim = count, module.qkv.out_features // 3
            module.head_dim = module.attn_dim // max(count, 1)
        else:
            module.heads = count
            module.forward = types.MethodType(_any_width, module)


def attentions(model: nn.Module) -> list[Attention]:
    """Those of BERT (query, key, value), of timm and of the digits ViT (fused qkv)."""
    found = []
    for module in model.modules():
        any_module: Any = module
        if all(hasattr(module, n) for n in ("query", "key", "value", "num_attention_heads")):
            count = any_module.num_attention_heads
            found.append(Attention(module, {getattr(module, n): count for n in ("query", "key", "value")}))
        elif hasattr(module, "qkv"):
            count = any_module.num_heads if hasattr(module, "num_heads") else any_module.heads
            found.append(Attention(module, {any_module.qkv: count}))
    return found


def _any_width(self: Any, x: Tensor) -> Tensor:
    """The forward of the digits ViT's attention, with a width that need not be that of its input."""
    batch, tokens, _ = x.shape
    width = self.qkv.out_features // 3
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = functional.scaled_dot_product_attention(q, k, v)
    return self.dropout(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


def outputs(model: nn.Module) -> list[nn.Module]:
    """The classifier, whose width is the number of classes."""
    head = getattr(model, "head", None)
    return [head] if isinstance(head, nn.Linear) else []


def stream(model: nn.Module) -> list[nn.Module]:
    """Layers whose outputs are summed into the residual stream: what "bottleneck" leaves alone."""
    layers = dict(model.named_modules())
    ends = ("attn.proj", "mlp.fc2", "mlp.2", "attention.output.dense", "output.dense", "conv2", "shortcut.0")
    if any(hasattr(m, "conv2") for m in layers.values()):
        first = next((m for m in layers.values() if isinstance(m, nn.Conv2d)), None)
        return [m for n, m in layers.items() if n.endswith(ends)] + ([first] if first is not None else [])
    return [m for n, m in layers.items() if n.endswith(ends)]
