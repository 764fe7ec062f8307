"""Transforms: they change the graph or the weights, and drop the facts that no longer hold."""
