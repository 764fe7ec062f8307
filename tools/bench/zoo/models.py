"""The models of tools/bench/zoo.py: the families of the tests at real size, with weights that make a mistake show."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fxprune.process.silence import quiet

# The list of families, and how weights are made and inputs varied, is the tests' own code: they need no tools, tools
# may need them (as tools/soak).
sys.path.append(str(Path(__file__).resolve().parents[3] / "tests"))

from support.families import FAMILIES
from support.family import TEXT, Built
from support.zoo import other_inputs, scramble

__all__ = ["MODELS", "TEXT", "Built", "build", "other_inputs"]
MODELS: dict[str, Callable[[], Built]] = {
    name: one for family in FAMILIES.values() for name, one in family.real.items()
}


def build(name: str, seed: int = 0) -> Built:
    """A scrambled model in eval mode with example inputs of batch 2."""
    torch.manual_seed(seed)
    with quiet():
        module, args, kwargs = MODELS[name]()
    return scramble(module, seed).eval(), args, kwargs
