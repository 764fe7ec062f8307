"""Ops of one's own: what models call."""

import torch

torch.library.define("fxprune_example::twist", "(Tensor x) -> Tensor")
torch.library.define("fxprune_example::dense", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("fxprune_example::twist", "CompositeImplicitAutograd")
def twist(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@torch.library.impl("fxprune_example::dense", "CompositeImplicitAutograd")
def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.T
