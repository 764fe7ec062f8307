"""fxprune: make pretrained transformers and CNNs smaller and faster after training, with proof."""

__version__ = "0.1.0"
