"""Where 0.1.0 kept it; it lies in ``fxprune.process.libraries`` now, and this path goes with 0.3."""

from .process.libraries import survive_torchvision

__all__ = ["survive_torchvision"]
