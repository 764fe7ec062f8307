"""The data that one graph of a compiled model is scored on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils import _pytree as pytree

from ..data.batch import Batch, Calibration
from ..data.sources import load_data
from ..driver.samples import LEAST
from ..intake.forward import leaf_names, parameter_names
from ..intake.load import Loaded
from ..process.events import Event, warn_only
from .graph import Slot, fit_sizes
from .session import Call, Options


def calibration_of(
    options: Options, part: Loaded, mine: Sequence[Slot], inputs: Sequence[Tensor], call: Call
) -> Calibration:
    """The data that was given, as this graph takes it; else the tensors that reach the graph in this call."""
    own = Calibration((Batch(part.args),), "the inputs of the first call")
    asked = options.asked.decision
    if asked.data is None:
        warn(
            f"no data was given: scored on the {own.samples} samples of the first call; give "
            "options={'data': ...} for a better choice"
        )
        return own
    leaves = call.leaves
    places = [next((i for i, leaf in enumerate(leaves) if leaf is t), -1) for t in inputs]
    loaded = part
    if call.root is not None:
        if -1 in places:
            warn(
                f"the data are inputs of {call.name}, and this graph lies behind a graph break: scored on the "
                f"{own.samples} samples that reach it in the first call"
            )
            return own
        words = leaf_names(parameter_names(call.root), call.args, call.kwargs)
        loaded = Loaded(call.root, part.name, call.args, dict(call.kwargs), input_names=words)
    data = load_data(
        asked.data, loaded, samples=LEAST if isinstance(asked.samples, str) else asked.samples, seed=asked.seed
    )
    batches = data.batches
    if call.root is not None:
        batches = tuple(
            Batch(tuple(flat[i] for i in places), labels=b.labels)
            for b in batches
            for flat in [pytree.tree_leaves((b.args, dict(b.kwargs)))]
        )
    fitted = fit_sizes(batches, inputs, [s.dims for s in mine])
    if not fitted:
        warn(
            f"no samples of the data have the sizes that this graph was made for, {[list(t.shape) for t in inputs]}: "
            "scored on the inputs of the first call; torch.compile(..., dynamic=True) makes a graph that takes all"
        )
        return own
    return Calibration(fitted, data.origin)


def warn(text: str) -> None:
    """Tell what the caller of a compiled model should know."""
    warn_only(Event("warning", text))
