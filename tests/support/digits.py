"""The toy that most tests prune."""

from __future__ import annotations

from fxprune.cli.demo import DigitsViT


def tiny_vit() -> DigitsViT:
    return DigitsViT(dim=32, depth=2, heads=4, hidden=96)
