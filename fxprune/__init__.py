"""fxprune: make pretrained models smaller and faster after training, with proof.

    artifact = fxprune.compile(model, flops=0.5, data=loader, target="onnx", out="small")
    artifact.module      the pruned model, an nn.Module that trains
    artifact.report      what was removed, what it costs, how exact it is
    fxprune.load("small")

This file is the public API: what it does not name may change.
"""

from .api import apply, compile, inspect, load, plan
from .artifact import Artifact
from .backend import Backend, Lowered
from .batch import Batch, Calibration
from .cost import Budget, Cost, CostModel
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
from .events import Event, FxpruneWarning
from .group import Kind, PruneGroup
from .importance import ImportanceScores
from .lower import lower
from .pipeline import Analysis, Pass, Pipeline, Search, Transform
from .plan import Choice, CompressionPlan
from .program import Program

__version__ = "0.1.0"

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
    "lower",
    "plan",
]
