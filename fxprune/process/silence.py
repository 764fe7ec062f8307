"""Silence for libraries that print, warn and log while they work."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing from Python code reaches stdout, stderr, the warnings or the log; exceptions pass through.

    Process-wide while it lasts, as Python's warning filters and log levels are.
    """
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


@contextmanager
def silence() -> Iterator[None]:
    """torch and the models warn while they are traced; what matters to the user is told through events."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
