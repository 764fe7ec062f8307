"""``SparsifyBlocks``: zero what the plan's tiles do not keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...ir.linear_layers import sparse_layers
from ...ir.pipeline import Transform
from ...ir.program import Program
from ...ir.rebuild import copy_graph, rebuild
from ...ir.sparsity import Sparsity


@dataclass(frozen=True)
class SparsifyBlocks(Transform):
    """The same graph with zeros where tiles (or, with 2:4, single weights) are gone. Deterministic; needs no data.

    Weights keep their shape: what is executed is decided later, by the target and what was measured on it. Weights that
    are fine-tuned afterwards grow back unless their gradients are masked too.

    Needs ``plan``. Law: every kept entry is as it was; the law of slicing does not apply, nothing is cut.
    """

    needs: ClassVar[tuple[str, ...]] = ("plan",)

    def run(self, program: Program) -> Program:
        blocks = program.need("plan").blocks
        if not blocks:
            return program
        return program.without_facts(exported=mask_tiles(program, masks_of(program, blocks)))


def masks_of(program: Program, blocks: Mapping[str, Sparsity]) -> dict[str, Tensor]:
    """Parameter -> True where an entry stays, the way round that the weight is stored."""
    return {matrix.parameter: matrix.store(sparsity.mask()) for matrix, sparsity in sparse_layers(program, blocks)}


@torch.no_grad()
def mask_tiles(program: Program, masks: Mapping[str, Tensor]) -> ExportedProgram:
    """The program's graph with these parameters zero where their mask is False. Nothing of the lender is changed."""
    changed = {name: program.tensors[name] * mask.to(program.tensors[name].device) for name, mask in masks.items()}
    return with_parameters(program, changed)


def with_parameters(program: Program, changed: Mapping[str, Tensor]) -> ExportedProgram:
    """The program's graph with new values of some parameters, each in the dtype of the old one."""
    state = dict(program.exported.state_dict)
    for name, tensor in changed.items():
        old = state[name]
        fresh = tensor.detach().to(old)
        state[name] = torch.nn.Parameter(fresh, old.requires_grad) if isinstance(old, torch.nn.Parameter) else fresh
    return rebuild(program.exported, copy_graph(program.exported), state_dict=state)
