"""Closed-form recovery: where it applies, what it collects, how it solves, and what decides whether it is kept."""
