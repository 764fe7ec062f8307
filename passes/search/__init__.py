"""Searches: from scores and a budget to a plan. One file per search."""
