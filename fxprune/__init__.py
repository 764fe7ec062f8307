"""fxprune: make pretrained models smaller and faster after training, with proof.

    artifact = fxprune.compile(model, flops=0.5, data=loader, target="onnx", out="small")
    artifact.module      the pruned model, an nn.Module that trains
    artifact.report      what was removed, what it costs, how exact it is
    fxprune.load("small")

This file is the public API: what it does not name may change.
"""

from .artifact.artifact import Artifact
from .backends.hf.load import load_hf
from .data.batch import Batch, Calibration
from .driver.api import apply, compile, inspect, load, plan
from .errors import (
    BudgetInfeasible,
    CaptureError,
    FxpruneError,
    InternalError,
    LoadError,
    LoweringError,
    NothingToPrune,
    OptionError,
    PlanError,
    UnsupportedOp,
    VerifyError,
)
from .ir.cost import Budget, Cost, CostModel
from .ir.group import Kind, PruneGroup
from .ir.importance import ImportanceScores
from .ir.pipeline import Analysis, Pass, Pipeline, Search, Transform
from .ir.plan import Choice, CompressionPlan
from .ir.program import Program
from .process.events import Event, FxpruneWarning
from .target.backend import Backend, Lowered
from .workflows.lower import lower

__version__ = "0.2.0"

__all__ = [
    "Analysis",
    "Artifact",
    "Backend",
    "Batch",
    "Budget",
    "BudgetInfeasible",
    "Calibration",
    "CaptureError",
    "Choice",
    "CompressionPlan",
    "Cost",
    "CostModel",
    "Event",
    "FxpruneError",
    "FxpruneWarning",
    "ImportanceScores",
    "InternalError",
    "Kind",
    "LoadError",
    "Lowered",
    "LoweringError",
    "NothingToPrune",
    "OptionError",
    "Pass",
    "Pipeline",
    "PlanError",
    "Program",
    "PruneGroup",
    "Search",
    "Transform",
    "UnsupportedOp",
    "VerifyError",
    "apply",
    "compile",
    "inspect",
    "load",
    "load_hf",
    "lower",
    "plan",
]
