"""The ops that fxprune inserts into graphs, a file each: reference, shapes, cost. Their axis rules lie with the others.

Every op is a ``torch.library`` op of the namespace ``fxprune`` whose implementation is its reference in plain ATen, so
it differentiates, traces, decomposes and runs on any device, and its fake is the reference run on fake tensors. A graph
holds it whole while passes work on it (one node, one axis rule, one cost); an artefact holds plain ATen.
"""

from . import ppt, prune, random, remove, restore, scores, tome, transform, zero_tprune
from .library import OPS, Op

__all__ = ["OPS", "Op", "ppt", "prune", "random", "remove", "restore", "scores", "tome", "transform", "zero_tprune"]
