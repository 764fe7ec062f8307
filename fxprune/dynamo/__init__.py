"""The same behind ``torch.compile(model, backend="fxprune")``."""

from .part import backend, plan_of, report_of
from .session import INNER, Options

__all__ = ["INNER", "Options", "backend", "plan_of", "report_of"]
