"""Runs for tests of the driver's stages: a model opened as ``compile`` opens it."""

from __future__ import annotations

from typing import Any

from fxprune.driver.run import Run, open_model
from fxprune.process.events import OnEvent, Transcript
from fxprune.request.request import Request


def opened_run(model: Any, inputs: Any, data: Any = None, on_event: OnEvent = lambda _: None, **request: Any) -> Run:
    """The run that begins with ``model``; other keywords are those of :class:`Request`."""
    asked, tell = Request(**request), Transcript(on_event)
    return Run.of(asked, open_model(asked, tell, model, inputs, data=data), tell)
