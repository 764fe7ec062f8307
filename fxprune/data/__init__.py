"""Calibration batches, and figures on them."""

from .batch import Batch, Calibration, evenly
from .sources import generate, load_data

__all__ = ["Batch", "Calibration", "evenly", "generate", "load_data"]
