"""Saved MACs as saved time, and budgets of time."""
