"""Bases of residual streams: which streams may be rotated, what that makes of weights, and which basis is best."""
