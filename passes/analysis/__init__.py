"""Analyses: they find facts about a program and leave it alone."""
