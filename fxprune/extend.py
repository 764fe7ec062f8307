"""What authors of plugins import: one line brings all that a criterion, rule, reducer, search, backend or pass needs.

    from fxprune.extend import Criterion, Program, prunable

`fxprune help plugins` shows a whole package. These names stay; the modules they come from may move.
"""

from .data import Batch, Calibration
from .intake.archive import read_program, write_program
from .ir.axis import Axis, Dims
from .ir.cost import Expression, with_macs
from .ir.dataflow import Family, Product, declare
from .ir.group import Switch, Tie
from .ir.pipeline import Analysis, Pass, Search, Transform
from .ir.program import Program
from .ir.rebuild import copy_graph, rebuild
from .ops.library import define
from .ops.reduction import check_counts, sizes, unchanged
from .passes.analysis.importance.criterion import Criterion, prunable
from .passes.analysis.rules.tokens import reduced
from .passes.analysis.walk import Args, Walk, rule
from .passes.search.ladder import Ladder, ledger_at
from .passes.transform.reducers.reducer import Reducer
from .target.backend import Backend, Lowered, Runner
from .target.parity import eager

# fmt: off
__all__ = [
    "Analysis", "Args", "Axis", "Backend", "Batch", "Calibration", "Criterion", "Dims", "Expression", "Family",
    "Ladder", "Lowered", "Pass", "Product", "Program", "Reducer", "Runner", "Search", "Switch", "Tie", "Transform",
    "Walk", "check_counts", "copy_graph", "declare", "define", "eager", "ledger_at", "prunable", "read_program",
    "rebuild", "reduced", "rule", "sizes", "unchanged", "with_macs", "write_program",
]
