"""From the pruned program's tensors back into the dense program's kept entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ....ir.axis import Keep, kept_index
from ....ir.program import Program
from ....ir.rebuild import copy_graph, rebuild


@torch.no_grad()
def write_back(program: Program, keep: Keep, changed: Mapping[str, Tensor]) -> ExportedProgram:
    """The dense program with new values in the entries that stay; entries that will be cut keep theirs.

    changed   placeholder -> tensor in the shape that slicing leaves (the whole shape where no axis of it is cut)
    Law       slicing the result gives exactly ``changed``
    """
    exported, axes, bound = program.exported, program.need("axes"), program.tensor_of_placeholder
    state, constants = dict(exported.state_dict), dict(exported.constants)
    for placeholder, small in changed.items():
        name = bound[placeholder]
        home: dict[str, Any] = state if name in state else constants
        old = home[name]
        dims = axes.dims[placeholder]
        index = [kept_index(dim, keep).to(old.device) for dim in dims]
        if [len(i) for i in index] == list(old.shape):
            whole = small.detach().to(old.dtype).clone()
        else:
            whole = old.detach().clone()
            whole[torch.meshgrid(*index, indexing="ij")] = small.to(whole)
        home[name] = torch.nn.Parameter(whole, old.requires_grad) if isinstance(old, torch.nn.Parameter) else whole
    return rebuild(exported, copy_graph(exported), state_dict=state, constants=constants)
